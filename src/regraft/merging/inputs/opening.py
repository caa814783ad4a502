"""What a call names: the base and adapters with their weights; found, opened and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.errors import InputError, UsageError
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import expanded, is_there
from regraft.formats.hub import locate
from regraft.formats.layout import looks_like
from regraft.formats.problems import of_each, quoted
from regraft.formats.reference import parse_reference
from regraft.merging.inputs.any_dialect import open_adapter
from regraft.merging.inputs.base import open_base, open_base_headers
from regraft.merging.inputs.expert_stacks import with_version

AdapterArg = str | Path | tuple[str | Path, float]
"""An adapter: a path or Hub id, ``"path=0.5"``, or ``(path, 0.5)``."""


def parse_adapters(adapters: AdapterArg | Sequence[AdapterArg]) -> list[tuple[str, float]]:
    """Return ``(source, weight)`` for every adapter, however it was given.

    Raises:
        UsageError: there is none, or a weight is not a finite number.
    """
    if isinstance(adapters, str | Path) or _is_pair(adapters):
        adapters = [adapters]  # type: ignore[list-item]
    pairs = [_parse_adapter(adapter) for adapter in adapters]  # type: ignore[arg-type]
    if not pairs:
        raise UsageError("no adapter was given", hint="Name at least one adapter to merge")
    return pairs


def refuse_swapped(base: str | Path, adapters: Sequence[tuple[str, float]]) -> None:
    """Refuse a call that has a base where the adapter belongs, and the adapter as the base.

    Raises:
        UsageError: it does. Of what lies on the Hub nothing is known yet.
    """
    if len(adapters) != 1 or looks_like(expanded(base)) != "adapter":
        return
    other = adapters[0][0]
    if looks_like(expanded(other)) in ("checkpoint", "merged", "gguf"):
        raise UsageError(
            "BASE and ADAPTER are swapped", where=str(base), expected="the base first",
            found=f"an adapter first, and then a model ({other})",
            hint=f"Write BASE {other} and ADAPTER {base}",
        )  # fmt: skip


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


def _parse_adapter(adapter: AdapterArg) -> tuple[str, float]:
    if isinstance(adapter, tuple):
        return str(adapter[0]), _weight(adapter[1], str(adapter[0]))
    text = str(adapter)
    if "=" not in text or is_there(text):
        return text, 1.0
    source, _, weight = text.rpartition("=")
    return source, _weight(weight, text)


def _weight(value: float | str, where: str) -> float:
    try:
        weight = float(value)
    except (ValueError, OverflowError):
        weight = float("nan")
    if weight != weight or weight in (float("inf"), float("-inf")):
        raise UsageError(
            "an adapter's weight has to be a number", where=where, expected="ADAPTER=WEIGHT",
            found=f"weight {value!r}"[:60], hint="Write for example ./adapter=0.5",
        )  # fmt: skip
    return weight


def open_adapters(
    adapters: Sequence[tuple[str, float]],
    token: str | None,
    peft_version: str | None = None,
    base: Checkpoint | None = None,
) -> list[tuple[AdapterFiles, float]]:
    """Open adapters, all of them before any is read.

    Args:
        adapters: sources and weights.
        token: Hub token.
        peft_version: the release of PEFT that trained those whose config does not say it.
        base: the model they are for, where it is open: some dialects cannot be read without.
    """

    def opened(adapter: tuple[str, float]) -> tuple[AdapterFiles, float]:
        files = open_adapter(locate(adapter[0], kind="adapter", token=token), base)
        return with_version(files, peft_version), adapter[1]

    return of_each(opened, adapters)


def open_named(
    base: str | Path | None,
    adapters: Sequence[tuple[str, float]],
    token: str | None,
    peft_version: str | None,
    *,
    headers_only: bool = False,
) -> tuple[Checkpoint, list[tuple[AdapterFiles, float]]]:
    """Open the base and adapters of a call; all that cannot be opened is raised together.

    Args:
        base: the base; None for the one that the adapters name in their configs.
        adapters: sources and weights.
        token: Hub token.
        peft_version: the release of PEFT that trained adapters whose config does not say it.
        headers_only: of a base on the Hub, read no more than headers.

    Raises:
        UsageError: base and adapter are swapped, or the adapters do not name one base.
        RegraftError: something cannot be opened.
    """
    named = base_named_by(adapters, token) if base is None else base
    refuse_swapped(named, adapters)

    def opened() -> Checkpoint:
        if headers_only:
            return open_base_headers(named, token)
        return open_base(locate(named, kind="base", token=token))

    held = list[Checkpoint]()

    def base_first() -> Checkpoint:
        held.append(opened())
        return held[0]

    openers: tuple[Callable[[], Any], ...] = (
        base_first, lambda: open_adapters(adapters, token, peft_version, *held),
    )  # fmt: skip
    checkpoint, files = of_each(lambda opener: opener(), openers)
    return checkpoint, files


def read_adapters(opened: Sequence[tuple[AdapterFiles, float]]) -> list[Adapter]:
    """Read adapters that were opened; what is wrong with any of them is raised together."""
    return of_each(lambda pair: read_adapter(*pair), opened)


def base_named_by(adapters: Sequence[tuple[str, float]], token: str | None) -> str:
    """Return the base that adapters name in their configs: a path that exists, or a Hub id.

    A relative path is looked for from the current folder, then from the adapter's own. A Hub id
    gets the revision that the config names.

    Raises:
        UsageError: an adapter names none, or they name several.
        RegraftError: an adapter cannot be opened.
    """
    opened = [files for files, _ in open_adapters(adapters, token)]
    named = [_base_of(files) for files in opened]
    if len(set(named)) == 1 and named[0]:
        return named[0]
    found = ", ".join(
        f"{f.source}: {name or 'none'}" for f, name in zip(opened, named, strict=True)
    )
    raise UsageError(
        "the adapters do not name one base", expected="base_model_name_or_path, of one base",
        found=found, hint="Name the base before the adapters",
    )  # fmt: skip


def _base_of(files: AdapterFiles) -> str:
    name, revision = (files.config.get(k) for k in ("base_model_name_or_path", "revision"))
    if not isinstance(name, str) or not name:
        return ""
    if is_there(expanded(name)):
        return name
    if not Path(name).is_absolute() and is_there(files.root / name):
        return str(files.root / name)
    if parse_reference(name) is None:
        raise _named_but_not_here(files, name)
    return (
        f"{name}@{revision}" if revision and isinstance(revision, str) and "@" not in name else name
    )


def _named_but_not_here(files: AdapterFiles, name: str) -> InputError:
    looked = [Path.cwd()] if Path(name).is_absolute() else [Path.cwd(), files.root]
    return InputError(
        "the base that the adapter names is not here", where=files.source,
        expected=f"it at {quoted(name)}" if len(looked) == 1 else
        f"it in {' or '.join(map(str, looked))}",
        found=f"base_model_name_or_path {quoted(name)}", hint="Name the base before the adapters",
    )  # fmt: skip
