"""Factors of a file in another dialect: gathered by module, and checked as they become modules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from regraft.adapters.dialects.form import Kind, LoraModule, Moved, as_stored
from regraft.adapters.dialects.shared.once import modules_twice
from regraft.errors import AdapterError, Problem
from regraft.formats.problems import capped, quoted
from regraft.tensors import WORKING_DTYPES, TensorSpec

Parts = dict[str, TensorSpec]
"""The tensors of one module, by what they are."""


class Gathering:
    """The modules of an adapter while they are being made; all that is wrong is raised at once."""

    def __init__(self, weights: Path) -> None:
        """Begin with nothing.

        Args:
            weights: the file, for messages.
        """
        self.weights = weights
        self.modules: list[LoraModule] = []
        self.problems: list[Problem] = []

    def parts(
        self, tensors: Mapping[str, TensorSpec], pattern: re.Pattern[str], expected: str
    ) -> dict[str, Parts]:
        """Return tensors by module and by what they are.

        Args:
            tensors: of the file.
            pattern: matches a whole name, with groups ``module`` and ``what``.
            expected: the names that tensors have, for messages.
        """
        found: dict[str, Parts] = defaultdict(dict)
        for name, spec in tensors.items():
            match = pattern.fullmatch(name)
            if match is None:
                self.refuse("tensor has a name that this dialect does not have", name, expected)
            elif spec.dtype not in WORKING_DTYPES:
                wanted = " or ".join(WORKING_DTYPES)
                self.refuse(
                    "tensor has a dtype that adapters do not have", name, wanted, spec.dtype
                )
            elif match["what"] in found[match["module"]]:
                self.refuse("tensor is in the file under two names", name, "one tensor")
            else:
                found[match["module"]][match["what"]] = spec
        return found

    def pair(
        self, name: str, parts: Parts, keys: tuple[str, str], dimensions: Sequence[int] = (2,)
    ) -> tuple[Moved, Moved] | None:
        """Return the two factors of a module as they are stored; None where they are not sound.

        Args:
            name: the module's, as the file has it.
            parts: its tensors.
            keys: what its A and B are called.
            dimensions: how many they may have.
        """
        if any(key not in parts for key in keys):
            self.refuse("module lacks a factor", name, " and ".join(keys), ", ".join(parts))
            return None
        a, b = (parts[key] for key in keys)
        if (
            len(a.shape) != len(b.shape)
            or len(a.shape) not in dimensions
            or 0 in (*a.shape, *b.shape)
        ):
            wanted = " or ".join("two stacks" if d > 2 else "two matrices" for d in dimensions)
            self.refuse("factors have odd shapes", name, wanted, f"{a.shape} and {b.shape}")
            return None
        return as_stored(a), as_stored(b)

    def add(
        self,
        name: str,
        a: Moved,
        b: Moved,
        scale: float,
        *,
        kind: Kind = "linear",
        magnitude: Moved | None = None,
        stored: str = "",
    ) -> None:
        """Add a module whose factors lie as PEFT's do, unless they do not fit each other.

        Args:
            name: transformers' name.
            a: A ``(r, in)``.
            b: B ``(out, r)``.
            scale: what B A is multiplied by.
            kind: what kind of layer it is.
            magnitude: DoRA's ``(out,)``.
            stored: its name in the file, for messages.
        """
        shown = stored or name
        if a.shape[0] != b.shape[1]:
            self.refuse("factors do not fit each other", shown, "one rank",
                        f"A {a.shape}, B {b.shape}")  # fmt: skip
        elif magnitude is not None and magnitude.shape != (b.shape[0],):
            self.refuse("DoRA's magnitudes do not fit the factors", shown, f"({b.shape[0]},)",
                        str(magnitude.shape))  # fmt: skip
        else:
            rank = a.shape[0]
            self.modules.append(LoraModule(name, rank, scale, a, b, kind, None, magnitude))

    def refuse(self, what: str, name: str, expected: str = "", found: str = "") -> None:
        """Note what is wrong with a module or tensor."""
        self.problems.append(Problem(what, f"{self.weights}, {quoted(name)}", expected, found))

    def done(self) -> tuple[LoraModule, ...]:
        """Return the modules.

        Raises:
            AdapterError: something was wrong, or there are none, or two have one name.
        """
        self.problems += modules_twice(self.modules, self.weights)
        if not self.modules and not self.problems:
            self.problems.append(Problem("the adapter holds no tensors", str(self.weights)))
        if self.problems:
            raise AdapterError(capped(self.problems, self.weights))
        return tuple(self.modules)
