"""Small models that see, whose language model stands under a name of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 1, "patch_size": 14}  # fmt: skip
IMAGE = {"image_token_id": 300, "video_token_id": 301}


def seeing(sizes: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return makers of the models, whose language models have the sizes given."""
    text = {**sizes, "head_dim": 32, "pad_token_id": 0}
    return {
        "gemma3": lambda: _gemma3({**text, "tie_word_embeddings": True}),
        "gemma4": lambda: _gemma4({**text, "tie_word_embeddings": True}),
        "mistral3": lambda: _mistral3(text),
        "qwen3_vl": lambda: _qwen3_vl(text),
    }


def _gemma3(text: dict[str, Any]) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**text, "sliding_window": 64, "query_pre_attn_scalar": 32},
            vision_config={**VISION, "image_size": 28}, mm_tokens_per_image=1,
            image_token_index=300, boi_token_index=301, eoi_token_index=302,
        )
    )  # fmt: skip


def _gemma4(text: dict[str, Any]) -> Any:
    """Return a model whose second layer has no ``v_proj``: its keys are its values, too."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    own = {
        "sliding_window": 64, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "global_head_dim": 32, "vocab_size_per_layer_input": text["vocab_size"],
        "layer_types": ["sliding_attention", "full_attention"], "attention_k_eq_v": True,
        "num_global_key_value_heads": text["num_key_value_heads"],
    }  # fmt: skip
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text | own, vision_config={**VISION, "head_dim": 32},
                     audio_config=None, audio_token_id=302, **IMAGE)
    )  # fmt: skip


def _mistral3(text: dict[str, Any]) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {**VISION, "model_type": "pixtral", "head_dim": 32, "image_size": 28}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config={**text, "model_type": "mistral", "sliding_window": None},
                       vision_config=vision, image_token_index=300, spatial_merge_size=1)
    )  # fmt: skip


def _qwen3_vl(text: dict[str, Any]) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4],
            "mrope_interleaved": True}  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 1, "patch_size": 14,
        "out_hidden_size": text["hidden_size"], "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision,
                      vision_start_token_id=302, vision_end_token_id=303, **IMAGE)
    )  # fmt: skip
