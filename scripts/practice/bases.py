"""Tiny random models of the architectures on which PEFT is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY, IMAGE = 64, 63
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
BERT = {**LLAMA, "num_attention_heads": 2}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True)
class Base:
    """A base: how it is made, what it is asked, and the names of its modules.

    ``auto`` is the class of transformers that loads it from a folder; empty for a toy. ``size`` is
    the shape of the features that a toy is asked.
    """

    name: str
    make: Callable[[], Any]
    linear: tuple[str, ...]
    embedding: str = ""
    head: str = ""
    auto: str = ""
    asked: str = "ids"
    experts: str = ""
    size: tuple[int, ...] = (9, 10)


def made(base: Base) -> Any:
    """Return the base with weights that are the same each time, ready to answer."""
    torch.manual_seed(0)
    model = base.make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def inputs(base: Base) -> dict[str, Any]:
    """Return what the base is asked: token ids (2, 6), features (3, 8), or images."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return {
        "ids": {"input_ids": ids},
        "pairs": {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
        "x": {"x": torch.randn(3, 8, generator=generator)},
        "x_ids": {"x": ids},
        "x_images": {"x": images},
        "images": {"pixel_values": images},
        "ids_and_images": {"input_ids": with_images(ids), "pixel_values": images},
        "features": {"x": torch.randn(base.size, generator=generator)},
        "ids_of_rows": {"x": torch.arange(90).view(9, 10)},
    }[base.asked]


def with_images(ids: Any) -> Any:
    """Return token ids whose first four of each row stand for an image."""
    return torch.cat([torch.full((len(ids), 4), IMAGE), ids.clamp(max=IMAGE - 1)], 1)


def answer(model: Any, base: Base, asked: dict[str, Any] | None = None) -> Any:
    """Return the model's logits, last hidden state, or plain output as one tensor."""
    found = model(**(inputs(base) if asked is None else asked))
    for name in ("logits", "start_logits", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return found


class Perceptron(nn.Module):  # type: ignore[misc]
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Any) -> Any:
        return self.lin1(torch.relu(self.lin0(x)))


class Transposed(nn.Module):  # type: ignore[misc]
    """An embedding and GPT-2's transposed linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d = nn.Embedding(VOCABULARY, 8), tf.pytorch_utils.Conv1D(6, 8)

    def forward(self, x: Any) -> Any:
        return self.conv1d(self.emb(x))


class Convolution(nn.Module):  # type: ignore[misc]
    """A convolution of one, two or three dimensions, and a linear head."""

    def __init__(self, dimensions: int, groups: int = 1) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.dimensions, self.channels = dimensions, 3 if groups == 1 else 4
        self.conv, self.lin0 = kind(self.channels, 4, 3, groups=groups), nn.Linear(4, 5)

    def forward(self, x: Any) -> Any:
        x = x[:, :1].expand(-1, self.channels, -1, -1)
        x = {1: x[..., 0], 2: x, 3: torch.stack([x] * 3, 2)}[self.dimensions]
        return self.lin0(self.conv(x).flatten(2).mean(-1))


class Attention(nn.Module):  # type: ignore[misc]
    """PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        x = x[None]
        return self.lin0(self.mha(x, x, x)[0])


def _llama(kind: str, **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(tf, f"{kind}Config")(**{**LLAMA, **changes})
        return getattr(tf, f"{kind}ForCausalLM")(config)

    return make


def _model(kind: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, kind)(getattr(tf, config)(**settings))


ATTENTION = ("q_proj", "v_proj")
LM = "AutoModelForCausalLM"
PARTS: dict[str, Any] = {"embedding": "embed_tokens", "head": "lm_head", "auto": LM}

ROBERTA = {**BERT, "pad_token_id": 1, "max_position_embeddings": 66}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
EXPERTS = "mlp.experts.gate_up_proj"
LLAMA4 = {
    "num_local_experts": 4,
    "intermediate_size_mlp": 24,
    "head_dim": 4,
    "moe_layers": [0, 1],
    "attention_chunk_size": 32,
}


def _llava() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    vision = tf.CLIPVisionConfig(
        **sizes, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=8
    )
    return tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**LLAMA),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


BASES = (
    Base("llama", _llama("Llama"), (*ATTENTION, "down_proj"), **PARTS),
    Base(
        "llama_tied", _llama("Llama", tie_word_embeddings=True), ATTENTION, "embed_tokens", "", LM
    ),
    Base("mistral", _llama("Mistral"), ATTENTION, **PARTS),
    Base("qwen2", _llama("Qwen2"), ATTENTION, **PARTS),
    Base(
        "mixtral",
        _llama("Mixtral", num_local_experts=4),
        ATTENTION,
        **PARTS,
        experts="mlp.experts.gate_up_proj",
    ),
    Base(
        "gpt2",
        _model("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=16, n_layer=2, n_head=2),
        ("c_attn", "c_proj"),
        "wte",
        "",
        LM,
    ),
    Base(
        "opt",
        _model(
            "OPTForCausalLM",
            "OPTConfig",
            **{**BERT, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1},
        ),
        ATTENTION,
        "embed_tokens",
        "",
        LM,
    ),
    Base(
        "gpt_neox",
        _model("GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT),
        ("query_key_value",),
        "embed_in",
        "embed_out",
        LM,
    ),
    Base(
        "bloom",
        _model(
            "BloomForCausalLM", "BloomConfig", vocab_size=64, hidden_size=16, n_layer=2, n_head=2
        ),
        ("query_key_value",),
        "word_embeddings",
        "",
        LM,
    ),
    Base(
        "t5",
        _model("T5ForConditionalGeneration", "T5Config", **T5, num_heads=2),
        ("q", "v"),
        "shared",
        "",
        "AutoModelForSeq2SeqLM",
        "pairs",
    ),
    Base(
        "bart",
        _model(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=64,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        ),
        ATTENTION,
        "",
        "",
        "AutoModelForSeq2SeqLM",
        "pairs",
    ),
    Base(
        "bert_classes",
        _model("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3),
        ("query", "value"),
        "word_embeddings",
        "classifier",
        "AutoModelForSequenceClassification",
    ),
    Base(
        "bert_features",
        _model("BertModel", "BertConfig", **BERT),
        ("query", "value"),
        "word_embeddings",
        "",
        "AutoModel",
    ),
    Base(
        "vit_classes",
        _model(
            "ViTForImageClassification",
            "ViTConfig",
            **{**BERT, "image_size": 8, "patch_size": 4, "num_labels": 3},
        ),
        ATTENTION,
        "",
        "classifier",
        "AutoModelForImageClassification",
        "images",
    ),
    Base(
        "gptj",
        _model(
            "GPTJForCausalLM",
            "GPTJConfig",
            vocab_size=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            rotary_dim=4,
            n_positions=64,
        ),
        ATTENTION,
        "wte",
        "lm_head",
        LM,
    ),
    Base(
        "gemma3",
        lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**LLAMA, head_dim=4, sliding_window=4)),
        ATTENTION,
        "embed_tokens",
        "",
        LM,
    ),
    Base("qwen3_moe", _llama("Qwen3Moe", **MOE), ATTENTION, **PARTS, experts=EXPERTS),
    Base(
        "llama4",
        lambda: tf.Llama4ForCausalLM(tf.Llama4TextConfig(**{**LLAMA, **LLAMA4})),
        ATTENTION,
        **PARTS,
        experts="feed_forward.experts.down_proj",
    ),
    Base(
        "gpt_oss",
        _llama("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=4),
        ATTENTION,
        **PARTS,
        experts="mlp.experts.down_proj",
    ),
    Base(
        "roberta_classes",
        _model("RobertaForSequenceClassification", "RobertaConfig", **ROBERTA, num_labels=3),
        ("query", "value"),
        "word_embeddings",
        "classifier",
        "AutoModelForSequenceClassification",
    ),
    Base(
        "roberta_features",
        _model("RobertaModel", "RobertaConfig", **ROBERTA),
        ("query", "value"),
        "word_embeddings",
        "",
        "AutoModel",
    ),
    Base(
        "deberta_features",
        _model("DebertaModel", "DebertaConfig", **DEBERTA),
        ("in_proj",),
        "word_embeddings",
        "",
        "AutoModel",
    ),
    Base(
        "deberta_v2_features",
        _model("DebertaV2Model", "DebertaV2Config", **DEBERTA),
        ("query_proj", "value_proj"),
        "word_embeddings",
        "",
        "AutoModel",
    ),
    Base(
        "bert_tokens",
        _model("BertForTokenClassification", "BertConfig", **BERT, num_labels=3),
        ("query", "value"),
        "word_embeddings",
        "classifier",
        "AutoModelForTokenClassification",
    ),
    Base(
        "roberta_tokens",
        _model("RobertaForTokenClassification", "RobertaConfig", **ROBERTA, num_labels=3),
        ("query", "value"),
        "word_embeddings",
        "classifier",
        "AutoModelForTokenClassification",
    ),
    Base(
        "bert_answers",
        _model("BertForQuestionAnswering", "BertConfig", **BERT),
        ("query", "value"),
        "word_embeddings",
        "qa_outputs",
        "AutoModelForQuestionAnswering",
    ),
    Base(
        "roberta_answers",
        _model("RobertaForQuestionAnswering", "RobertaConfig", **ROBERTA),
        ("query", "value"),
        "word_embeddings",
        "qa_outputs",
        "AutoModelForQuestionAnswering",
    ),
    Base(
        "llama_classes",
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**LLAMA, num_labels=3)),
        ATTENTION,
        "embed_tokens",
        "score",
        "AutoModelForSequenceClassification",
    ),
    Base(
        "resnet_classes",
        _model(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
        ),
        ("convolution",),
        "",
        "classifier",
        "AutoModelForImageClassification",
        "images",
    ),
    Base(
        "llava",
        lambda: tf.LlavaForConditionalGeneration(_llava()),
        ATTENTION,
        "embed_tokens",
        "lm_head",
        "AutoModelForImageTextToText",
        "ids_and_images",
    ),
)

TOYS = (
    Base("perceptron", Perceptron, ("lin0",), "", "lin1", "", "x"),
    Base("transposed", Transposed, ("conv1d",), "emb", "", "", "x_ids"),
    Base("conv1d", lambda: Convolution(1), ("conv",), "", "lin0", "", "x_images"),
    Base("conv2d", lambda: Convolution(2), ("conv",), "", "lin0", "", "x_images"),
    Base("conv3d", lambda: Convolution(3), ("conv",), "", "lin0", "", "x_images"),
    Base("grouped", lambda: Convolution(2, 2), ("conv",), "", "lin0", "", "x_images"),
    Base("attention", Attention, ("mha",), "", "lin0", "", "x"),
)
