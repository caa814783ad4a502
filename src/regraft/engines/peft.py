"""PEFT itself: what its live model does otherwise than its own formula says."""

from __future__ import annotations

from regraft.engines.facts import Engine, Rule

PEFT = Engine(
    name="peft",
    shown="PEFT",
    version="0.21.2",
    sources=("peft/tuners/lora/layer.py", "peft/utils/save_and_load.py"),
    distributions=("peft",),
    dialect="peft",
    rules=(
        Rule(
            "output projection of MultiheadAttention",
            "misapplies",
            "its delta is added twice in the forward pass of nn.MultiheadAttention",
        ),
    ),
)
