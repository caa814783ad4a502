"""The table of cases: which architecture is tested with which feature of PEFT's LoRA.

Every entry is the fields of a ``LoraConfig``; the harness makes the adapter, random throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faithful.harness import Case

Config = Mapping[str, Any]


def lora(targets: Any = "all-linear", **fields: Any) -> Config:
    """Return a configuration whose scale (1.5) is neither 1 nor a power of two."""
    return {"r": 4, "lora_alpha": 6, "target_modules": targets} | fields


def one(architecture: str, feature: str, config: Config, **fields: Any) -> Case:
    """Return a case of a single adapter."""
    return Case(architecture, feature, (config,), **fields)


ULP_FLIPS = 2e-3
"""Tolerance where what PiSSA or OLoRA leave of a base is rounded to bfloat16: two factorizations
that agree to float32 rounding can round a weight to neighbouring values."""

PATTERNS: Config = {
    "rank_pattern": {r".*\.0\..*": 2, r".*\.1\..*[aeo].*": 5},
    "alpha_pattern": {r".*\.1\..*": 9, r".*(k|up|fc1|query|qkv)[a-z_]*": 3},
}
"""Patterns that overlap, so that the first one has to win."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOY_CONVS = ["conv1d", "conv2d", "pointwise", "conv3d"]

LINEAR_TARGETS: dict[str, Any] = {
    "llama": "all-linear",
    "llama_tied": "all-linear",
    "qwen2_tied": "all-linear",
    "mistral": "all-linear",
    "phi3": "all-linear",
    "gemma3": "all-linear",
    "gpt2": "all-linear",
    "opt": "all-linear",
    "gpt_neox": "all-linear",
    "bloom": "all-linear",
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "gpt_oss": ATTENTION,
    "t5": "all-linear",
    "bert_seqcls": "all-linear",
    "vit_conv": "all-linear",
    "llava": "all-linear",
    "toynet": [*TOY_CONVS, "head"],
}
"""Every linear layer of each architecture (experts have cases of their own)."""

EVERYWHERE: dict[str, Config] = {
    "lora": {},
    "rslora-patterns": PATTERNS | {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": PATTERNS | {"use_dora": True, "use_rslora": True},
}
"""Features that every architecture is tested with."""


def everywhere() -> list[Case]:
    """Return the cases that all architectures share; every other base is in several files."""
    return [
        one(architecture, feature, lora(targets, **fields), sharded=number % 2 == 1)
        for architecture, targets in LINEAR_TARGETS.items()
        for number, (feature, fields) in enumerate(EVERYWHERE.items())
    ]


# Which modules are adapted, and how they are named.

LLAMA_NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(4)
    for module in (*(f"self_attn.{name}" for name in ATTENTION), "mlp.gate_proj", "mlp.up_proj")
]

TARGETS = [
    one("llama", "layers-to-transform", lora(ATTENTION, layers_to_transform=[1])),
    one(
        "llama_deep",
        "layers-pattern",
        lora(["q_proj", "up_proj"], layers_to_transform=[0, 3], layers_pattern="layers"),
    ),
    one("llama", "exclude-list", lora(exclude_modules=["q_proj", "model.layers.0.mlp.up_proj"])),
    one("llama", "exclude-regex", lora(exclude_modules=r".*layers\.1\.mlp.*")),
    one("llama", "regex", lora(r".*layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)")),
    one("llama_deep", "20-exact-names", lora(LLAMA_NAMES[:20])),
    one("llama_deep", "24-exact-names", lora(LLAMA_NAMES)),
    one("llama", "one-module", lora(["model.layers.1.mlp.down_proj"])),
    one("llama", "rank-1", lora(r=1, lora_alpha=1)),
    one("llama", "rank-above-width", lora(["q_proj"], r=40, lora_alpha=11)),
    one("llama", "dropout", lora(lora_dropout=0.3)),
    one("llama", "float32-base", lora(), dtype="float32"),
    one("llama", "float16-base", lora(), dtype="float16"),
    one(
        "llama",
        "patterns-by-full-name",
        lora(
            rank_pattern={
                "model.layers.0.self_attn.q_proj": 3,
                "q_proj": 7,
                "^model.*down_proj": 5,
            },
            alpha_pattern={"layers.1.mlp.up_proj": 2, "up_proj": 16, "proj": 5},
        ),
    ),
    one("llama", "parameter-of-a-linear", lora([], target_parameters=["q_proj.weight"])),
    one("gpt2", "parameter-of-a-conv1d", lora([], target_parameters=["c_attn.weight"])),
    one("gpt2", "parameter-of-a-square-conv1d", lora([], target_parameters=["attn.c_proj.weight"])),
    one("gpt2", "fan-in-fan-out", lora(["c_attn", "c_proj"], fan_in_fan_out=True)),
    one("llava", "language-model-only", lora(r".*language_model.*(q|v|down)_proj")),
    one("llava", "vision-tower-only", lora(r".*vision_tower.*(q_proj|fc2)")),
    one("llava", "projector", lora(["linear_1", "linear_2"])),
    one("bert_seqcls", "task-type", lora(["query", "value"], task_type="SEQ_CLS")),
    one("llama", "task-type", lora(task_type="CAUSAL_LM")),
    one("t5", "task-type", lora(["q", "v"], task_type="SEQ_2_SEQ_LM")),
]

# Initialisations. Those that change the base are recomputed on load by PEFT, hence by the truth.

INITS = [
    one("llama", "gaussian", lora(init_lora_weights="gaussian")),
    one("llama", "orthogonal", lora(init_lora_weights="orthogonal")),
    one("llama", "no-init", lora(init_lora_weights=False)),
    one("llama", "eva", lora(init_lora_weights="eva")),
    one("llama", "mica", lora(init_lora_weights="mica")),
    one("llama", "pissa", lora(init_lora_weights="pissa"), dtype="float32"),
    one("llama", "pissa-bfloat16", lora(init_lora_weights="pissa"), tolerance=ULP_FLIPS),
    one(
        "llama",
        "pissa-rslora",
        lora(init_lora_weights="pissa", use_rslora=True),
        tolerance=ULP_FLIPS,
    ),
    one("gpt2", "pissa", lora(init_lora_weights="pissa"), tolerance=ULP_FLIPS),
    one("llama", "olora", lora(init_lora_weights="olora"), tolerance=ULP_FLIPS),
    one("bert_seqcls", "olora", lora(init_lora_weights="olora"), dtype="float32"),
]

# Biases.

BIASED: dict[str, Any] = {
    "qwen2_tied": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc1"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "gpt_oss": ["q_proj", "o_proj"],
    "t5": ["q", "wo"],
    "bert_seqcls": ["query", "dense"],
    "vit_conv": ["q_proj", "fc1", "projection"],
    "toynet": [*TOY_CONVS, "head"],
}

BIASES = [
    one(architecture, f"bias-{kind.replace('_', '-')}", lora(targets, bias=kind))
    for architecture, targets in BIASED.items()
    for kind in ("all", "lora_only")
]

LORA_BIASES = [
    one("qwen2_tied", "lora-bias", lora(["q_proj", "k_proj", "v_proj"], lora_bias=True)),
    one("gpt2", "lora-bias", lora(["c_attn", "c_proj"], lora_bias=True, use_rslora=True)),
    one("opt", "lora-bias", lora(lora_bias=True)),
    one("vit_conv", "lora-bias", lora(["projection", "fc1"], lora_bias=True)),
    one("toynet", "lora-bias", lora(["conv1d", "conv2d", "conv3d", "head"], lora_bias=True)),
    one("bert_seqcls", "lora-bias-and-bias-all", lora(["query"], lora_bias=True, bias="all")),
    one(
        "bert_seqcls", "lora-bias-and-lora-only", lora(["query"], lora_bias=True, bias="lora_only")
    ),
]

# Experts.

MIXTRAL_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

EXPERTS = [
    one("mixtral", "experts", lora([], target_parameters=MIXTRAL_EXPERTS)),
    one("mixtral", "experts-sharded", lora([], target_parameters=MIXTRAL_EXPERTS), sharded=True),
    one("mixtral", "experts-reversed", lora([], target_parameters=MIXTRAL_EXPERTS[::-1])),
    one("mixtral", "experts-gate-up", lora([], target_parameters=["experts.gate_up_proj"])),
    one("mixtral", "experts-down", lora([], target_parameters=["experts.down_proj"])),
    one("mixtral", "experts-by-leaf", lora([], target_parameters=["gate_up_proj", "down_proj"])),
    one("mixtral", "experts-and-attention", lora(ATTENTION, target_parameters=MIXTRAL_EXPERTS)),
    one("mixtral", "router", lora([], lora_alpha=40, target_parameters=["gate.weight"])),
    one("mixtral", "all-linear", lora()),
    one(
        "mixtral",
        "experts-patterns",
        lora(
            ["q_proj"],
            target_parameters=MIXTRAL_EXPERTS,
            rank_pattern={"experts.down_proj": 2, "experts.gate_up_proj": 3},
            alpha_pattern={"experts.down_proj": 7},
            use_rslora=True,
        ),
    ),
    one(
        "mixtral",
        "experts-of-one-layer",
        lora([], target_parameters=["layers.1.mlp.experts.down_proj"]),
    ),
    one(
        "mixtral",
        "experts-uneven",
        lora(
            [],
            target_parameters=[
                "layers.0.mlp.experts.gate_up_proj",
                "layers.1.mlp.experts.gate_up_proj",
                "layers.1.mlp.experts.down_proj",
            ],
        ),
    ),
    one("qwen3_moe", "experts", lora([], target_parameters=MIXTRAL_EXPERTS)),
    one("qwen3_moe", "experts-and-linear", lora(ATTENTION, target_parameters=MIXTRAL_EXPERTS)),
    one("qwen3_moe", "experts-down", lora([], target_parameters=["experts.down_proj"])),
    one("qwen3_moe", "all-linear", lora()),
    one("gpt_oss", "experts", lora([], target_parameters=MIXTRAL_EXPERTS)),
    one("gpt_oss", "experts-down", lora([], target_parameters=["experts.down_proj"])),
    one("gpt_oss", "experts-gate-up", lora([], target_parameters=["experts.gate_up_proj"])),
    one(
        "gpt_oss",
        "experts-biases",
        lora([], target_parameters=["experts.gate_up_proj_bias", "experts.down_proj_bias"]),
    ),
    Case(
        "mixtral",
        "two-experts-adapters",
        (
            lora([], target_parameters=MIXTRAL_EXPERTS),
            lora(["q_proj"], r=2, target_parameters=MIXTRAL_EXPERTS),
        ),
        weights=(0.5, 1.25),
    ),
]

# Convolutions.

CONVS = [
    one("toynet", "conv1d", lora(["conv1d"])),
    one("toynet", "conv2d", lora(["conv2d"], use_rslora=True)),
    one("toynet", "conv2d-1x1", lora(["pointwise"])),
    one("toynet", "conv3d", lora(["conv3d"])),
    one("toynet", "conv1d-dora", lora(["conv1d"], use_dora=True)),
    one("toynet", "conv2d-dora", lora(["conv2d"], use_dora=True)),
    one("toynet", "conv3d-dora", lora(["conv3d"], use_dora=True)),
    one("vit_conv", "patches", lora(["projection"])),
    one("vit_conv", "patches-dora", lora(["projection"], use_dora=True)),
    one("vit_conv", "patches-whole", lora(["q_proj"], modules_to_save=["projection"])),
    one("llava", "patches", lora(["patch_embedding"])),
]

# Several adapters in one merge: their deltas add up in the order given.

SEVERAL = [
    Case("llama", "two", (lora(), lora(["q_proj", "up_proj"], r=3))),
    Case("llama", "two-weighted", (lora(), lora(["q_proj", "up_proj"], r=3)), (0.25, -1.5)),
    one("llama", "alpha-negative", lora(lora_alpha=-3, alpha_pattern={"up_proj": 5, "v_proj": 0})),
    one("gpt2", "dora-alpha-negative", lora(lora_alpha=-6, use_dora=True)),
    Case("llama", "one-weighted", (lora(use_rslora=True, **PATTERNS),), (0.7,)),
    Case("llama", "three", (lora(), lora(["q_proj"], r=1), lora(["v_proj"])), (1.0, 0.5, 2.0)),
    Case("gpt2", "two-weighted", (lora(), lora(["c_attn", "wte"], r=3)), (0.5, 1.5)),
    Case("toynet", "two-weighted", (lora(TOY_CONVS), lora(["conv2d", "embed"], r=2)), (0.5, 2.0)),
    Case(
        "opt", "two-lora-biases", (lora(lora_bias=True), lora(["q_proj"], lora_bias=True)), (2, 0.5)
    ),
    Case("llama", "dora-then-lora", (lora(use_dora=True), lora(["q_proj", "up_proj"], r=3))),
    Case("llama", "lora-then-dora", (lora(["q_proj", "up_proj"], r=3), lora(use_dora=True))),
    Case("llama", "dora-then-dora", (lora(use_dora=True), lora(["q_proj"], r=3, use_dora=True))),
    Case("llama", "lora-and-head", (lora(), lora(["q_proj"], modules_to_save=["lm_head"]))),
    Case("llama", "lora-and-tokens", (lora(), lora(["v_proj"], trainable_token_indices=[5, 33]))),
]
