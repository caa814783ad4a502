"""What becomes of each pair of factors: its rank, and where its scale is kept.

By default every module keeps its scale in the config. In the uniform form the scales are in B, all
modules have one rank, and ``lora_alpha`` is ``r``: right also for programs that read one scale for
all modules, or divide by the rank of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regraft.adapters.settings import RESAVE, LoraSettings
from regraft.errors import UnsupportedError
from regraft.formats.problems import quoted
from regraft.shrinking.targets import TIE, Pair


@dataclass(frozen=True)
class Form:
    """What a pair of factors is to become.

    Attributes:
        kept: singular values of the delta that are kept.
        rank: of the new factors; those beyond ``kept`` are zeros.
        folded: what B and its bias are multiplied by, so that the scale becomes 1; None where the
            config keeps the scale.
    """

    kept: int
    rank: int
    folded: float | None = None

    def is_that_of(self, pair: Pair) -> bool:
        """Whether nothing changes."""
        return self.kept == self.rank == pair.rank and self.folded is None


def scaled_by_config(ranks: Sequence[int]) -> list[Form]:
    """Return the forms of pairs whose scale the config keeps."""
    return [Form(rank, rank) for rank in ranks]


def uniform_forms(pairs: Sequence[Pair], ranks: Sequence[int]) -> list[Form]:
    """Return the forms of pairs that all get the largest of the new ranks, and the scale 1."""
    return [Form(rank, max(ranks), pair.scale) for pair, rank in zip(pairs, ranks, strict=True)]


def is_uniform(settings: LoraSettings, pairs: Sequence[Pair], ranks: Sequence[int]) -> bool:
    """Whether pairs of these ranks have one rank, and one scale without ``use_rslora``."""
    one = len({*ranks}) <= 1 and not settings.use_rslora
    return one and all(math.isclose(pair.scale, pairs[0].scale, rel_tol=1e-12) for pair in pairs)


def why_not_uniform(settings: LoraSettings, pairs: Sequence[Pair]) -> str:
    """Return why an adapter's scales cannot be kept in B; "" if they can."""
    if settings.begins_with_base:
        return (
            f"init_lora_weights={quoted(settings.init_lora_weights)}: what was taken out of the "
            "base when training began is computed from the factors and their scale"
        )
    tied = {pair.name: pair.scale for pair in pairs if pair.group == TIE}
    if len({*tied.values()}) > 1:
        return f"modules that share their factors have different scales: {', '.join(tied)}"
    return ""


def refuse_uniform(label: str, reason: str) -> UnsupportedError:
    """Return the refusal of a uniform form that was asked for."""
    resaved = f", or: {RESAVE.replace('merge', 'shrink')}" if "init_lora" in reason else ""
    return UnsupportedError(
        f"the adapter has no uniform form: {reason}",
        where=f"{label}/adapter_config.json",
        hint=f"Leave --uniform out{resaved}",
    )
