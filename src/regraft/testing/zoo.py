"""Tiny random base models, one per architecture whose names or layers differ in a telling way.

Sizes are small and mostly odd, so that a transposed or mis-sliced tensor cannot fit by luck. (Those
of experts are multiples of 4: torch's grouped product wants rows of 16 bytes.) Every parameter is
random, norms and biases too: a tensor that is dropped or left at its initial value changes the
logits.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regraft.testing.copying import ModelTemplate

VOCAB = 61
SEED = 20

InputKind = Literal["tokens", "seq2seq", "pixels", "multimodal", "toy"]


@dataclass(frozen=True)
class Architecture:
    """How to make one tiny model and how to call it.

    Attributes:
        build: returns the model with the library's own initial values.
        auto: name of the transformers class that loads its checkpoints; empty for a class of ours.
        inputs: which of :func:`example_inputs` it takes.
    """

    build: Callable[[], Any]
    auto: str = "AutoModelForCausalLM"
    inputs: InputKind = "tokens"


def _llama(tied: bool = False, layers: int = 2, vocab: int = VOCAB) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=27,
            intermediate_size=41,
            num_hidden_layers=layers,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=tied,
            **_special_tokens(),
        )
    )


def _special_tokens() -> dict[str, int]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _qwen2_tied() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=43,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **_special_tokens(),
        )
    )


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=29,
            intermediate_size=43,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=7,
            **_special_tokens(),
        )
    )


def _phi3() -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **_special_tokens(),
        )
    )


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB,
            hidden_size=27,
            intermediate_size=41,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=7,
            **_special_tokens(),
        )
    )


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=27,
            n_layer=2,
            n_head=3,
            n_positions=32,
            n_inner=47,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=27,
            ffn_dim=41,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=32,
            word_embed_proj_dim=27,
            **_special_tokens(),
        )
    )


def _gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=41,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCAB,
            hidden_size=27,
            n_layer=2,
            n_head=3,
            **_special_tokens(),
        )
    )


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=28,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            num_local_experts=3,
            num_experts_per_tok=2,
            **_special_tokens(),
        )
    )


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB,
            hidden_size=28,
            intermediate_size=31,
            moe_intermediate_size=12,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            num_experts=5,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[2],
            tie_word_embeddings=False,
            **_special_tokens(),
        )
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=7,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **_special_tokens(),
        )
    )


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=23,
            d_kv=7,
            d_ff=37,
            num_layers=2,
            num_heads=3,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def _bert_seqcls() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=27,
            intermediate_size=41,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=32,
            num_labels=5,
            pad_token_id=0,
        )
    )


def _vit_conv() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=27,
            intermediate_size=41,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=12,
            patch_size=4,
            num_channels=3,
            num_labels=5,
        )
    )


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=21,
        intermediate_size=31,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=8,
        patch_size=4,
        projection_dim=21,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=_llama().config,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    )


def _toynet() -> Any:
    from regraft.testing.toynet import ToyConfig, ToyNet

    return ToyNet(ToyConfig())


IMAGE_TOKEN = 59
"""The id that stands for one image patch in the multimodal inputs."""

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama),
    "llama_tied": Architecture(lambda: _llama(tied=True)),
    "llama_deep": Architecture(lambda: _llama(layers=4)),
    "qwen2_tied": Architecture(_qwen2_tied),
    "mistral": Architecture(_mistral),
    "phi3": Architecture(_phi3),
    "gemma3": Architecture(_gemma3),
    "gpt2": Architecture(_gpt2),
    "opt": Architecture(_opt),
    "gpt_neox": Architecture(_gpt_neox),
    "bloom": Architecture(_bloom),
    "mixtral": Architecture(_mixtral),
    "qwen3_moe": Architecture(_qwen3_moe),
    "gpt_oss": Architecture(_gpt_oss),
    "t5": Architecture(_t5, "AutoModelForSeq2SeqLM", "seq2seq"),
    "bert_seqcls": Architecture(_bert_seqcls, "AutoModelForSequenceClassification"),
    "vit_conv": Architecture(_vit_conv, "AutoModelForImageClassification", "pixels"),
    "llava": Architecture(_llava, "AutoModelForImageTextToText", "multimodal"),
    "toynet": Architecture(_toynet, "", "toy"),
}
"""Every architecture of the zoo, by name."""


def randomize(model: Any, seed: int = SEED) -> None:
    """Fill every parameter of ``model`` with values that keep activations near one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.data = centre + 0.2 * noise
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight", "shared.weight")):
            parameter.data = 0.5 * noise
        else:
            fan_in = parameter.shape[1:] if "experts" not in name else parameter.shape[-1:]
            parameter.data = noise / math.sqrt(math.prod(fan_in))


def make_model(name: str, dtype: str = "float32") -> Any:
    """Return the random model ``name`` in memory, in evaluation mode."""
    import torch

    model, state = _built(name)
    torch.set_rng_state(state)
    return model.copy().to(getattr(torch, dtype)).eval()


@functools.lru_cache(maxsize=len(ARCHITECTURES))
def _built(name: str) -> tuple[ModelTemplate, Any]:
    """Return a model to copy, which takes a tenth of the time, and torch's random state after it:
    what is drawn next is the same whether the model was built or copied."""
    import torch

    torch.manual_seed(SEED)
    model = ARCHITECTURES[name].build()
    randomize(model)
    model.tie_weights()
    return ModelTemplate(model), torch.get_rng_state()


def make_base(
    name: str, folder: Path, dtype: str = "bfloat16", max_shard_size: str | None = None
) -> Path:
    """Write the checkpoint of architecture ``name`` into ``folder`` and return ``folder``.

    Args:
        name: a key of :data:`ARCHITECTURES`.
        folder: where to write; made if it is not there.
        dtype: torch's name of the stored dtype.
        max_shard_size: as in ``save_pretrained``; a small one gives several shards and an index.
    """
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    make_model(name, dtype).save_pretrained(folder, **sharding)
    return folder


def model_class(folder: Path) -> Any:
    """Return the class that the checkpoint in ``folder`` names as its architecture."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    if name == "ToyNet":
        from regraft.testing.toynet import ToyNet

        return ToyNet
    return getattr(transformers, name)


def load_base(folder: Path) -> Any:
    """Return the checkpoint's model in float32 (whatever its stored dtype), in evaluation mode.

    Tiny models are loaded once, and copied: copying takes a thirtieth of the time.
    """
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    if sum(stat.st_size for _, stat in files) > _TINY:
        return _load_base(folder)
    marks = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
    return _loaded_before(folder, marks).copy()


_TINY = 2**22


@functools.lru_cache(maxsize=64)
def _loaded_before(folder: Path, _marks: tuple[tuple[str, int, int], ...]) -> ModelTemplate:
    return ModelTemplate(_load_base(folder))


def _load_base(folder: Path) -> Any:
    import torch

    return model_class(folder).from_pretrained(folder, dtype=torch.float32).eval()


def example_inputs(name: str) -> dict[str, Any]:
    """Return the forward arguments of architecture ``name``: two rows, seeded."""
    return _INPUTS[ARCHITECTURES[name].inputs]()


def _ids(rows: int = 2, length: int = 13, low: int = 3, high: int = 58, seed: int = 7) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (rows, length), generator=generator)


def _pixels(size: int, seed: int = 8) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, 3, size, size), generator=generator)


def _token_inputs() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _seq2seq_inputs() -> dict[str, Any]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(length=9, seed=9)}


def _pixel_inputs() -> dict[str, Any]:
    return {"pixel_values": _pixels(12)}


def _multimodal_inputs() -> dict[str, Any]:
    ids = _ids()
    ids[:, 2:6] = IMAGE_TOKEN  # one per patch: (8 / 4) ** 2
    return {"input_ids": ids, "pixel_values": _pixels(8)}


def _toy_inputs() -> dict[str, Any]:
    return {"input_ids": _ids(length=16, high=37)}


_INPUTS: dict[InputKind, Callable[[], dict[str, Any]]] = {
    "tokens": _token_inputs,
    "seq2seq": _seq2seq_inputs,
    "pixels": _pixel_inputs,
    "multimodal": _multimodal_inputs,
    "toy": _toy_inputs,
}


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the model's logits on ``inputs`` as a float64 numpy array."""
    import numpy as np
    import torch

    with torch.no_grad():
        output = model(**inputs)
    tensor = output if isinstance(output, torch.Tensor) else output.logits
    return tensor.float().numpy().astype(np.float64)
