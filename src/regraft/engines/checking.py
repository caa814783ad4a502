"""The verb ``check``: would adapters merge, and would an engine answer with them as trained?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from regraft.adapters.dialects.peft import read_adapter
from regraft.api import check_opened
from regraft.engines.facts import Engine
from regraft.engines.registry import check_options, engine_named, judge
from regraft.engines.report import EngineReport
from regraft.engines.subject import Subject
from regraft.errors import RegraftError, UsageError
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.watching import watched
from regraft.merging.inputs.base import see
from regraft.merging.inputs.opening import AdapterArg, open_named, parse_adapters
from regraft.merging.options import MergeOptions
from regraft.merging.planning.report import CheckReport
from regraft.shrinking.targets import read_pairs


@watched(to_the_end=True)
def check(
    base: str | Path | None,
    adapters: AdapterArg | Sequence[AdapterArg],
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    method: str = "sum",
    max_memory: str | int = "512MiB",
    peft_version: str | None = None,
    engine: str | None = None,
    engine_options: Mapping[str, object] | None = None,
    token: str | None = None,
) -> CheckReport:
    """Say whether adapters would merge into a base, with everything that stands in the way.

    Reads headers, and of an adapter that carries a fingerprint a few values of the base. NaN in an
    adapter, which headers do not show, is found by the merge itself.

    Of a base on the Hub too, only headers are read.

    With ``engine``, it also says what that engine would leave out of the adapter, refuse, or apply
    with another scale, and what to do about each.

    Args:
        base: a folder, a single ``.safetensors`` or ``.gguf`` file, or a Hub id; None for the one
            that the adapters name in their configs.
        adapters: one adapter or several, each optionally with a weight.
        dtype: as for :func:`regraft.merge`.
        quantize: as for :func:`regraft.merge`.
        method: as for :func:`regraft.merge`.
        max_memory: as for :func:`regraft.merge`.
        peft_version: as for :func:`regraft.merge`.
        engine: ``"vllm"``, ``"sglang"``, ``"llama.cpp"``, ``"ollama"``, ``"mlx"``, ``"peft"`` or
            ``"diffusers"``, with a version if that is known: ``"vllm==0.32.0"``. It takes one
            adapter, whose weight changes nothing.
        engine_options: options that its server is started with and that change what it takes,
            such as ``{"max_lora_rank": 64}``.
        token: Hub token.

    Raises:
        UsageError: the call contradicts itself, or no engine of that name is known.
        InputError: the base or an adapter cannot be opened at all.
        EnvironmentShortfall: an input cannot be read, or needs an optional package.
    """
    asked = _asked(engine, engine_options, adapters)
    options = MergeOptions.of(
        dtype=dtype, max_memory=max_memory, quantize=quantize, method=method,
        peft_version=peft_version, undo=None,
    )  # fmt: skip
    checkpoint, opened = open_named(
        base, parse_adapters(adapters), token, peft_version, headers_only=True
    )
    report = check_opened(checkpoint, opened, options)
    if asked is None:
        return report
    judged = _judged(asked, checkpoint, opened[0][0], _texts(engine_options))
    if judged is None:  # it contradicts itself, as the report says
        return report
    return replace(report, ok=report.ok and judged.ok, engine=judged)


def _asked(
    engine: str | None, options: Mapping[str, object] | None, adapters: object
) -> tuple[Engine, str | None] | None:
    """Return the engine that is asked about, and its version; None where none is.

    Raises:
        UsageError: there is no such engine or option, or there are several adapters.
    """
    if engine is None:
        if options:
            raise UsageError("engine options mean nothing without an engine",
                             where="--engine-option", hint="Name one: --for vllm")  # fmt: skip
        return None
    found = engine_named(engine)
    check_options(found[0], _texts(options))
    if len(parse_adapters(adapters)) > 1:  # type: ignore[arg-type]
        raise UsageError("engines are asked about one adapter at a time", where="--for",
                         expected="one adapter", hint="Ask about each of them")  # fmt: skip
    return found


def _texts(options: Mapping[str, object] | None) -> dict[str, str]:
    return {name.replace("-", "_"): str(value) for name, value in (options or {}).items()}


def _judged(
    asked: tuple[Engine, str | None],
    base: Checkpoint,
    adapter: AdapterFiles,
    options: Mapping[str, str],
) -> EngineReport | None:
    engine, version = asked
    try:
        return judge(engine, subject_of(base, adapter), options, version)
    except RegraftError:
        return None


def subject_of(base: Checkpoint, adapter: AdapterFiles) -> Subject:
    """Return an adapter beside its base, as engines' facts are held against it.

    Raises:
        RegraftError: the adapter contradicts itself, or the base cannot be seen as plain weights.
    """
    read = read_adapter(adapter)
    return Subject(read, tuple(read_pairs(read)), see(base)[0], adapter)
