"""Optional packages: asked for by name, and kept from printing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from regraft.errors import InputError, MissingExtraError, UnsupportedError

_INSTALL = {
    "accelerate": "pip install accelerate",
    "bitsandbytes": "pip install bitsandbytes",
    "gguf": "pip install 'regraft[gguf]'",
    "jinja2": "pip install 'regraft[gguf]'",
}
"""How to install what the extra of torch does not bring."""


def require(*names: str, why: str, where: str = "") -> None:
    """Make sure that packages are installed; they are not imported.

    Args:
        names: of the packages, as they are imported.
        why: what needs them, as the beginning of a sentence.
        where: the option that asks for it, if one does.

    Raises:
        MissingExtraError: some are not.
    """
    missing = [name for name in names if find_spec(name) is None]
    if not missing:
        return
    commands = dict.fromkeys(_INSTALL.get(n, "pip install 'regraft[torch]'") for n in missing)
    raise MissingExtraError(
        f"{why} needs {' and '.join(missing)}", where=where,
        hint=f"Run {' and '.join(commands)}",
    )  # fmt: skip


def from_pretrained(cls: Any, source: Any, **kwargs: Any) -> Any:
    """Call transformers' ``cls.from_pretrained(source, ...)`` without running code of the model's.

    Left to itself, transformers asks on standard input whether to run it, and a pipe answers.

    Args:
        cls: a class of transformers, auto or not.
        source: the folder.
        kwargs: of that call; ``trust_remote_code`` is False if it is not given.

    Raises:
        UnsupportedError: the model needs code of its own, or transformers does not know it.
    """
    trusted = bool(kwargs.pop("trust_remote_code", False))
    try:
        return cls.from_pretrained(source, trust_remote_code=trusted, **kwargs)
    except ValueError as error:
        if not trusted and "trust_remote_code" in str(error):
            raise _needs_code(source) from None
        if "does not recognize this architecture" in str(error):
            raise UnsupportedError(
                "transformers does not know this kind of model", where=str(source),
                found=str(error).strip().partition("\n")[0], hint="Update transformers",
            ) from None  # fmt: skip
        raise


def _needs_code(source: Any) -> UnsupportedError:
    return UnsupportedError(
        "the model needs Python code that lies with it, which is not run", where=str(source),
        expected="a class of transformers", found="auto_map in its config.json",
        hint="If you trust the code, load the model in Python with trust_remote_code=True and put "
        "adapters on it with regraft.attach; merging needs no code",
    )  # fmt: skip


TEMPLATE_SECONDS = 10.0
"""So long a chat template may take; it is a program that comes with a model."""


def from_template(
    tokenizer: Any, messages: Iterable[Any], *, add_generation_prompt: bool = True, hint: str = ""
) -> str:
    """Return messages as a tokenizer's chat template writes them.

    Args:
        tokenizer: of transformers.
        messages: with ``role`` and ``content``.
        add_generation_prompt: whether an answer is to follow.
        hint: what to do where the template refuses them.

    Raises:
        InputError: the template fails in whatever way, or does not end in ten seconds.
    """
    found: list[str] = []
    failed: list[Exception] = []

    def render() -> None:
        try:
            found.append(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # of whatever kind: the template is a stranger's program
            failed.append(error)

    # A thread cannot be stopped; as a daemon it keeps no process from ending.
    thread = threading.Thread(target=render, daemon=True, name="chat template")
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if found:
        return found[0]
    cause = failed[0] if failed else None
    said = str(cause) or type(cause).__name__ if cause else f"no end after {TEMPLATE_SECONDS:g} s"
    raise InputError(
        "the model's chat template refuses these messages", found=said, hint=hint
    ) from cause


@contextmanager
def quieted(remarks: Any, verbosity: int = logging.CRITICAL) -> Iterator[None]:
    """Hide transformers' bars, and its remarks below a level of :mod:`logging`.

    Args:
        remarks: ``transformers.utils.logging``; whoever has transformers hands it in.
        verbosity: the level.
    """
    before, bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity(verbosity)
    remarks.disable_progress_bar()
    try:
        yield
    finally:
        remarks.set_verbosity(before)
        if bars:
            remarks.enable_progress_bar()
