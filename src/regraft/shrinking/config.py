"""The config of an adapter with other ranks, right for whoever reads it.

Every module keeps its scale, and so its alpha changes with its rank; in the uniform form, where the
scales are in B, all have the scale 1. ``r`` becomes the largest
rank, because programs that serve adapters make room for that many. Where all modules had one scale,
``lora_alpha`` over ``r`` is that scale still, also for programs that read no patterns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from regraft.adapters.pattern_making import patterns
from regraft.adapters.settings import LoraSettings
from regraft.adapters.wrappers import plain_config
from regraft.shrinking.targets import new_alpha


def with_ranks(
    config: Mapping[str, Any], settings: LoraSettings, ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return a config with new ranks, and alphas that keep every scale; all else is as it was.

    Args:
        config: the adapter's, whose every key is kept.
        settings: what it means.
        ranks: the new rank of every adapted module (or parameter), by the config's name for it.
    """
    alphas = {
        key: new_alpha(
            settings.alpha_of(key), settings.rank_of(key), rank, rslora=settings.use_rslora
        )
        for key, rank in ranks.items()
    }
    r = max(ranks.values())
    alpha = Counter(alphas[key] for key in ranks if ranks[key] == r).most_common(1)[0][0]
    changes = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": patterns(ranks, r),
        "alpha_pattern": patterns(alphas, alpha),
    }
    return _changed(config, settings, changes, [*ranks.values()])


def with_one_scale(config: Mapping[str, Any], settings: LoraSettings, rank: int) -> dict[str, Any]:
    """Return a config in which all modules have one rank, and the scale 1.

    Args:
        config: the adapter's, whose every key is kept.
        settings: what it means.
        rank: of every module.
    """
    changes = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    return _changed(config, settings, changes, [rank])


def _changed(
    config: Mapping[str, Any], settings: LoraSettings, changes: Mapping[str, Any],
    ranks: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Return a config with changes, but for keys that it lacks and that would say nothing."""
    made = {key: value for key, value in changes.items() if value or key in config}
    changed = {**plain_config(config), **made}
    if settings.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
        changed["init_lora_weights"] = True  # PEFT draws such values on loading, of even rank only
    return changed
