"""PEFT itself: what its live model does otherwise than its own formula says."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.engines.facts import Engine, Rule, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject, is_head


def untargeted(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find factors of modules that the config does not target, which are left unread.

    Where `ensure_weight_tying` is set, it finds the other side of `embed_tokens` by itself.
    """
    del settings
    config = subject.adapter.settings
    targeted = [pair for pair in subject.pairs if config.targets(pair.target.module)]
    by_tie = config.ensure_weight_tying and any(
        pair.target.module.endswith("embed_tokens") for pair in targeted
    )
    for pair in subject.pairs:
        if pair in targeted or pair.keys[0] != pair.target.module:
            continue
        if config.targets(pair.name.removesuffix(".out_proj")):
            continue
        if not (by_tie and is_head(subject, pair.target.module)):
            because = "its config does not target the module, so the tensors are left unread"
            way_out = "Name the module in target_modules of adapter_config.json"
            yield Finding("leaves out", pair.name, because, way_out)


PEFT = Engine(
    name="peft",
    shown="PEFT",
    version="0.21.2",
    sources=("peft/tuners/lora/layer.py", "peft/utils/save_and_load.py"),
    distributions=("peft",),
    dialect="peft",
    checks=(untargeted,),
    rules=(
        Rule(
            "output projection of MultiheadAttention",
            "misapplies",
            "its delta is added twice in the forward pass of nn.MultiheadAttention",
        ),
    ),
)
