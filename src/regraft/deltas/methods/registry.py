"""The methods by name. A new one is one function, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regraft.deltas.methods import on_cores, on_elements, on_factors
from regraft.deltas.methods.form import Factors, Joint, MethodOptions, Reduced
from regraft.deltas.methods.on_elements import Band, Limits
from regraft.deltas.rounding import Floats

Core = Callable[[Joint, MethodOptions], Reduced]
Factorwise = Callable[[Joint, MethodOptions], Factors]
Elementwise = Callable[[Band, MethodOptions], Floats]


@dataclass(frozen=True)
class Method:
    """A way to make one delta of several.

    Attributes:
        on_cores: makes it of their cores; None where it does not.
        on_factors: makes it of their factors; None where it does not.
        on_elements: makes it of their elements, a band of rows at a time; None where it does not.
        limits: of such a method, which elements stay, by the order of their magnitudes; None where
            that is no matter of limits.
        density: the share of elements that it keeps by default; None where it takes none out.
        equal_ranks: whether all deltas need one rank.
        exact: whether the outcome is the weighted sum of the deltas.
    """

    on_cores: Core | None = None
    on_factors: Factorwise | None = None
    on_elements: Elementwise | None = None
    limits: Limits | None = None
    density: float | None = None
    equal_ranks: bool = False
    exact: bool = False

    @property
    def summary(self) -> str:
        """What it does, in a sentence: the first line of its function's docstring."""
        function = self.on_cores or self.on_factors or self.on_elements
        return (getattr(function, "__doc__", None) or "").partition("\n")[0]

    @property
    def has_rank(self) -> bool:
        """Whether a rank can be chosen; else it is the factors' own."""
        return self.on_factors is None

    def highest_rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the highest rank that the outcome for a matrix (out, in) can have."""
        return min(*shape) if self.on_elements is not None else min(sum(ranks), *shape)


METHODS = {
    "sum": Method(on_cores=on_cores.svd, exact=True),
    "cat": Method(on_factors=on_factors.cat, exact=True),
    "svd": Method(on_cores=on_cores.svd, exact=True),
    "knots": Method(on_cores=on_cores.knots, density=0.3),
    "tsv": Method(on_cores=on_cores.tsv),
    "iso": Method(on_cores=on_cores.iso),
    "core_space": Method(on_cores=on_cores.core_space, density=0.3),
    "compress_then_merge": Method(on_cores=on_cores.compress_then_merge, density=0.3),
    "ties": Method(on_elements=on_elements.ties, limits=on_elements.largest, density=0.2),
    "dare": Method(on_elements=on_elements.dare, density=0.5),
    "dare_ties": Method(on_elements=on_elements.dare_ties, density=0.5),
    "della": Method(on_elements=on_elements.della, density=0.5),
    "breadcrumbs": Method(
        on_elements=on_elements.breadcrumbs, limits=on_elements.without_outliers, density=0.9
    ),
    "magnitude_prune": Method(
        on_elements=on_elements.magnitude_prune, limits=on_elements.largest, density=0.2
    ),
    "peft_linear": Method(on_factors=on_factors.peft_linear, equal_ranks=True),
    "peft_ties": Method(on_factors=on_factors.peft_ties, density=0.2, equal_ranks=True),
    "peft_magnitude_prune": Method(
        on_factors=on_factors.peft_magnitude_prune, density=0.2, equal_ranks=True
    ),
}
