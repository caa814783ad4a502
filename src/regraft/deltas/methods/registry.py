"""The methods by name. A new one is one function, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from regraft.deltas.methods import on_cores, on_factors
from regraft.deltas.methods.form import Factors, Joint, MethodOptions, Reduced

Core = Callable[[Joint, MethodOptions], Reduced]
Factorwise = Callable[[Joint, MethodOptions], Factors]


@dataclass(frozen=True)
class Method:
    """A way to make one delta of several.

    Attributes:
        on_cores: makes it of their cores; None where it does not.
        on_factors: makes it of their factors; None where it does not.
        density: the share of elements that it keeps by default; None where it takes none out.
        equal_ranks: whether all deltas need one rank.
        exact: whether the outcome is the weighted sum of the deltas.
    """

    on_cores: Core | None = None
    on_factors: Factorwise | None = None
    density: float | None = None
    equal_ranks: bool = False
    exact: bool = False

    @property
    def summary(self) -> str:
        """What it does, in a sentence: the first line of its function's docstring."""
        function = self.on_cores or self.on_factors
        return (getattr(function, "__doc__", None) or "").partition("\n")[0]

    @property
    def has_rank(self) -> bool:
        """Whether a rank can be chosen; else it is the factors' own."""
        return self.on_cores is not None


METHODS = {
    "sum": Method(on_cores=on_cores.svd, exact=True),
    "cat": Method(on_factors=on_factors.cat, exact=True),
    "svd": Method(on_cores=on_cores.svd, exact=True),
    "knots": Method(on_cores=on_cores.knots, density=0.3),
    "tsv": Method(on_cores=on_cores.tsv),
    "iso": Method(on_cores=on_cores.iso),
    "core_space": Method(on_cores=on_cores.core_space, density=0.3),
    "compress_then_merge": Method(on_cores=on_cores.compress_then_merge, density=0.3),
    "peft_linear": Method(on_factors=on_factors.peft_linear, equal_ranks=True),
    "peft_ties": Method(on_factors=on_factors.peft_ties, density=0.2, equal_ranks=True),
    "peft_magnitude_prune": Method(
        on_factors=on_factors.peft_magnitude_prune, density=0.2, equal_ranks=True
    ),
}
