"""What a dialect cannot say: each such tensor by name, with what can be done."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from regraft.adapters.dialects.form import LoraModule, PlainAdapter
from regraft.errors import Problem, UnsupportedError
from regraft.formats.problems import capped

_MERGE = "Merge it (`regraft merge`), and use the merged model"


def refuse(problems: Sequence[Problem], file: str) -> None:
    """Raise what is wrong, if anything is.

    Raises:
        UnsupportedError: something is.
    """
    if problems:
        raise UnsupportedError(capped(problems, Path(file)))


def unsayable(
    adapter: PlainAdapter, program: str, kinds: Collection[str] = ("linear",)
) -> list[Problem]:
    """Return what a program has no place for, where it has factors of layers and nothing else.

    Args:
        adapter: what is to be written.
        program: as messages name it.
        kinds: kinds of layers that it has factors for.
    """
    problems = [
        Problem(f"{program} has no place for a tensor that is replaced", name, hint=_MERGE)
        for name in (*adapter.whole, *adapter.token_rows)
    ]
    for module in adapter.modules:
        if module.kind not in kinds:
            problems.append(Problem(f"{program} has no LoRA for this kind of layer ({module.kind})",
                                    module.name, hint=_MERGE))  # fmt: skip
        if module.bias is not None:
            problems.append(Problem(f"{program} has no bias of B", module.name, hint=_MERGE))
    if not adapter.modules and not problems:
        problems.append(Problem("the adapter adapts no module", hint=_MERGE))
    return problems


def magnitudes(modules: Iterable[LoraModule], program: str) -> list[Problem]:
    """Return the modules with DoRA's magnitudes, for a program that has none."""
    return [
        Problem(f"{program} has no DoRA", module.name, hint=_MERGE)
        for module in modules if module.magnitude is not None
    ]  # fmt: skip


def unlike(modules: Sequence[LoraModule], program: str) -> list[Problem]:
    """Return the modules without magnitudes of an adapter that has some, where all have to."""
    if all(module.magnitude is None for module in modules):
        return []
    return [
        Problem(f"{program} has DoRA for all modules or for none", module.name, hint=_MERGE)
        for module in modules if module.magnitude is None
    ]  # fmt: skip


def unnamed(names: Iterable[str], program: str) -> list[Problem]:
    """Return the modules that a program has no name for."""
    return [Problem(f"{program} has no LoRA for this module", name, hint=_MERGE) for name in names]
