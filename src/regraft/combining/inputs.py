"""The adapters of a call, in whatever dialect: opened, read, and held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from regraft.adapters.dialects.form import PlainAdapter
from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.fingerprint import KEY, Fingerprint, parsed, verdict
from regraft.errors import MismatchError, Problem, UsageError
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.hub import locate
from regraft.formats.problems import of_each
from regraft.merging.inputs.base import open_base, see
from regraft.merging.inputs.opening import AdapterArg, open_adapters, parse_adapters
from regraft.translating import plain_adapter


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that is to be combined with others.

    Attributes:
        files: its files.
        plain: its modules, without its dialect.
        weight: the user's factor on its scale.
        inputs: the folder or file of the user's that it was read from.
    """

    files: AdapterFiles
    plain: PlainAdapter
    weight: float
    inputs: Path

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.files.source


@dataclass(frozen=True)
class Inputs:
    """The adapters of a call, and the base where it was named."""

    adapters: tuple[OpenedAdapter, ...]
    base: Checkpoint | None

    @property
    def labels(self) -> tuple[str, ...]:
        """How messages name the adapters."""
        return tuple(adapter.label for adapter in self.adapters)

    @property
    def paths(self) -> list[Path]:
        """What is read of this machine."""
        paths = [adapter.inputs for adapter in self.adapters]
        if self.base is None:
            return paths
        single = self.base.single_file
        return paths + ([s.path for s in self.base.shards] if single else [self.base.root])


def open_inputs(
    adapters: AdapterArg | Sequence[AdapterArg], base: str | Path | None, token: str | None
) -> Inputs:
    """Open and read adapters, from headers and configs.

    Raises:
        UsageError: there is none, or a weight is no number.
        MismatchError: they were trained on other bases, by the fingerprints that they carry.
        RegraftError: one cannot be read; what is wrong with any of them is raised together.
    """
    wanted = parse_adapters(adapters)
    _refuse_zero(wanted)
    opened_base = None if base is None else open_base(locate(str(base), kind="base", token=token))
    opened = open_adapters(wanted, token, None, opened_base)
    read = of_each(_read, opened)
    _check_fingerprints(read)
    seen = None if opened_base is None else see(opened_base, None)[0]
    return Inputs(tuple(read), seen)


def _refuse_zero(wanted: Sequence[tuple[str, float]]) -> None:
    if all(weight == 0 for _, weight in wanted):
        raise UsageError(
            "all adapters have the weight 0: nothing would be left of them", where="weights",
            expected="a weight that is not 0", hint="Write for example ./adapter=0.5",
        )  # fmt: skip


def _read(pair: tuple[AdapterFiles, float]) -> OpenedAdapter:
    files, weight = pair
    adapter = read_adapter(files)
    return OpenedAdapter(files, plain_adapter(files, adapter), weight, adapter.inputs)


def _check_fingerprints(adapters: Sequence[OpenedAdapter]) -> None:
    """Refuse adapters that carry fingerprints of other bases.

    A fingerprint is of parameters that its adapter adapts: two are held against each other where
    both have values of one parameter.

    Raises:
        MismatchError: two of them differ.
    """
    found = [(each.label, parsed(each.plain.metadata.get(KEY, ""))) for each in adapters]
    held = [(label, prints) for label, prints in found if prints is not None]
    problems = [
        Problem(
            "the adapters were trained on other bases", f"{one} and {other}",
            "the values of one base in the fingerprints that they carry",
            f"others for {', '.join(names[:3])}" + ", ..." * (len(names) > 3),
            "Combine adapters of one base: on another one a delta is noise",
        )
        for (one, mine), (other, theirs) in combinations(held, 2)
        if (names := _off(mine, theirs))
    ]  # fmt: skip
    if problems:
        raise MismatchError(problems)


def _off(mine: Fingerprint, theirs: Fingerprint) -> list[str]:
    """Return the parameters that two fingerprints have with the values of different bases."""
    there = dict(zip(theirs.shapes, theirs.values, strict=True))
    coded = mine.coded or theirs.coded
    return [
        name
        for name, values in zip(mine.shapes, mine.values, strict=True)
        if mine.shapes[name] == theirs.shapes.get(name)
        and verdict(values, there[name], coded=coded) == "another"
    ]
