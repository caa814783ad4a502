"""Which modules are transformers' Conv1D, a linear layer that stores its weight as (in, out).

Sizes tell the two apart except where they are equal, so this table is asked for square weights.
"""

from __future__ import annotations

_LEAVES = frozenset(("c_attn", "q_attn", "c_proj", "c_fc"))
_MODEL_TYPES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))


def is_conv1d(model_type: str | None, module: str) -> bool | None:
    """Return whether a module is a Conv1D; None when the model type is not known.

    Args:
        model_type: ``config.json``'s.
        module: the module's name.
    """
    if model_type is None:
        return None
    return model_type in _MODEL_TYPES and module.rpartition(".")[2] in _LEAVES
