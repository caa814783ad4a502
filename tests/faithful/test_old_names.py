"""Adapters and bases whose names come from different versions of transformers find each other.

Version 5 fused the experts of a mixture into one tensor, moved the parts of vision-language models
and renamed ViT's attention, in its modules; the checkpoints it writes keep the older names. So an
adapter's names and a base's names can each be old or new. Every pair has to give the same model.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from faithful.cases import ATTENTION, lora
from faithful.harness import Workshop, assert_close, assert_visible, merge_and_load
from regraft.testing import zoo
from regraft.testing.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    rewrite_adapter,
)

Renames = Sequence[tuple[str, str]]
"""Pairs of a regular expression and its replacement, applied in order."""


def renamed(text: str, renames: Renames) -> str:
    """Return ``text`` after every replacement."""
    for pattern, replacement in renames:
        text = re.sub(pattern, replacement, text)
    return text


def with_names(base: Path, renames: Renames, workshop: Workshop) -> Path:
    """Return ``base`` with the names of the module tree, then renamed; written once."""
    key = hashlib.sha256(str(renames).encode()).hexdigest()[:12]
    folder = workshop.shared / f"{base.name}-named-{key}"
    return workshop.made(folder, lambda new: write_with_names(base, new, renames))


def write_with_names(base: Path, folder: Path, renames: Renames) -> None:
    """Write ``base`` anew with the names of the module tree, then renamed."""
    from safetensors.torch import save_file

    model = zoo.model_class(base).from_pretrained(base, dtype="auto")
    tied = set(model.all_tied_weights_keys)
    folder.mkdir()
    save_file(
        {
            renamed(name, renames): tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name not in tied
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copy(base / "config.json", folder)


def assert_same_function(
    architecture: str, base: Path, adapter: Path, expected: Any, workshop: Workshop
) -> None:
    """Merge ``adapter`` into ``base`` and compare the logits with ``expected``."""
    inputs = zoo.example_inputs(architecture)
    assert_visible(expected, workshop.plain_logits(base, inputs))
    merged = merge_and_load(base, adapter, workshop.fresh("merged"), architecture)
    assert_close(zoo.logits(merged, inputs), expected)


# Renamed modules. The truth is the live model under the adapter's own, new names.

VIT_OLD: Renames = [
    (r"\bvit\.layers\.", "vit.encoder.layer."),
    (r"attention\.([qkv])_proj", r"attention.attention.\1"),
    (r"attention\.attention\.q\b", "attention.attention.query"),
    (r"attention\.attention\.k\b", "attention.attention.key"),
    (r"attention\.attention\.v\b", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]
LLAVA_OLD: Renames = [
    (r"\bmodel\.language_model\.", "language_model.model."),
    (r"(^|base_model\.model\.)lm_head", r"\1language_model.lm_head"),
    (r"\bmodel\.vision_tower\.", "vision_tower.vision_model."),
    (r"\bmodel\.multi_modal_projector", "multi_modal_projector"),
]
LLAVA_MIDDLE: Renames = [(r"\bvision_tower\.", "vision_tower.vision_model.")]
NEOX_OLD: Renames = [(r"(^|base_model\.model\.)lm_head", r"\1embed_out")]

VIT_TARGETS = r".*(attention\.[qkvo]_proj|fc1|fc2|projection|classifier)"
LLAVA_TARGETS = r".*(q_proj|down_proj|fc1|linear_1|lm_head|embed_tokens|patch_embedding)"


@dataclass(frozen=True)
class Rename:
    """An architecture, an adapter on it, and the names of an older version.

    Attributes:
        architecture: a name of the zoo.
        config: the adapter, in the new names.
        old: from the new names of adapter and base to older ones.
        fields: of the adapter's config, in the older names.
    """

    architecture: str
    config: Mapping[str, Any]
    old: Renames
    fields: Mapping[str, Any]


RENAMES = {
    "vit": Rename(
        "vit_conv",
        lora(VIT_TARGETS),
        VIT_OLD,
        {"target_modules": ["query", "key", "value", "dense", "projection", "classifier"]},
    ),
    "vit-dora-biases": Rename(
        "vit_conv",
        lora(r".*(q_proj|fc2)", use_dora=True, bias="all"),
        VIT_OLD,
        {"target_modules": r".*(query|[0-9]\.output\.dense)"},
    ),
    "vit-patterns": Rename(
        "vit_conv",
        lora(["q_proj", "o_proj", "fc1"], rank_pattern={"q_proj": 2}, alpha_pattern={"fc1": 20}),
        VIT_OLD,
        {
            "target_modules": ["query", "attention.output.dense", "intermediate.dense"],
            "rank_pattern": {"query": 2},
            "alpha_pattern": {"intermediate.dense": 20},
        },
    ),
    "vit-whole": Rename(
        "vit_conv",
        lora(["q_proj"], modules_to_save=["layers.1.mlp.fc1", "classifier"]),
        VIT_OLD,
        {
            "target_modules": ["query"],
            "modules_to_save": ["layer.1.intermediate.dense", "classifier"],
        },
    ),
    "llava": Rename("llava", lora(LLAVA_TARGETS), LLAVA_OLD, {}),
    "llava-4.52": Rename("llava", lora(LLAVA_TARGETS), LLAVA_MIDDLE, {}),
    "llava-whole": Rename(
        "llava",
        lora(r".*language_model.*q_proj", modules_to_save=["multi_modal_projector", "lm_head"]),
        LLAVA_OLD,
        {},
    ),
    "llava-tokens": Rename(
        "llava", lora(["q_proj"], trainable_token_indices=[5, 17, 33]), LLAVA_OLD, {}
    ),
    "gpt-neox": Rename(
        "gpt_neox",
        lora(["lm_head", "query_key_value"]),
        NEOX_OLD,
        {"target_modules": ["embed_out", "query_key_value"]},
    ),
}


@pytest.mark.parametrize("stored", ["old-base", "new-base", "saved-base"])
@pytest.mark.parametrize("trained", ["old-adapter", "new-adapter"])
@pytest.mark.parametrize("name", RENAMES)
def test_renamed_modules(name: str, trained: str, stored: str, workshop: Workshop) -> None:
    rename = RENAMES[name]
    saved = workshop.base(rename.architecture)
    adapter = workshop.adapter(saved, rename.config)
    inputs = zoo.example_inputs(rename.architecture)
    expected = workshop.live_logits(saved, [adapter], inputs)
    if trained == "old-adapter":
        adapter = rewrite_adapter(
            adapter,
            workshop.fresh("old-adapter"),
            lambda key, tensor: (renamed(key, rename.old), tensor),
            **rename.fields,
        )
    base = saved
    if stored != "saved-base":
        names = rename.old if stored == "old-base" else []
        base = with_names(saved, names, workshop)
    assert_same_function(rename.architecture, base, adapter, expected, workshop)


# Experts one by one. The truth is computed here: each expert's slice of the live model's fused
# parameter gets its own delta.

FUSED = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
}
"""Where an expert's matrix lies: the fused parameter, and which part of its rows."""


@dataclass(frozen=True)
class ExpertNames:
    """How version 4 named the experts of an architecture.

    Attributes:
        block: the module that holds gate and experts.
        leaves: an expert's matrices: gate, up, down.
        layers: the layers that have experts.
        experts: how many there are.
    """

    block: str
    leaves: tuple[str, str, str]
    layers: tuple[int, ...]
    experts: int


OLD_EXPERTS = {
    "mixtral": ExpertNames("block_sparse_moe", ("w1", "w3", "w2"), (0, 1), 3),
    "qwen3_moe": ExpertNames("mlp", ("gate_proj", "up_proj", "down_proj"), (0, 1), 5),
}


def expert_slice(model: Any, module: str) -> Any:
    """Return a view of the live model's weight that ``module``, in old names, stands for."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)", module)
    if found is None:
        module = module.replace("block_sparse_moe.", "mlp.")
        return model.get_parameter(f"{module}.weight").data
    layer, expert, leaf = int(found[1]), int(found[2]), found[3]
    parameter, part = FUSED[leaf]
    weight = getattr(model.model.layers[layer].mlp.experts, parameter).data[expert]
    return weight.chunk(2)[part] if parameter == "gate_up_proj" else weight


def random_pairs(model: Any, modules: Sequence[str], rank: Callable[[str], int]) -> dict[str, Any]:
    """Return LoRA pairs for ``modules``, by key in an adapter's file."""
    import torch

    generator = torch.Generator().manual_seed(3)
    pairs = {}
    for module in modules:
        rows, columns = expert_slice(model, module).shape
        key = f"base_model.model.{module}"
        a = torch.randn((rank(module), columns), generator=generator)
        pairs[f"{key}.lora_A.weight"] = a / columns**0.5
        pairs[f"{key}.lora_B.weight"] = torch.randn((rows, rank(module)), generator=generator)
    return pairs


def with_magnitudes(model: Any, pairs: dict[str, Any]) -> dict[str, Any]:
    """Return the pairs with a DoRA magnitude per module, near the norm of its rows."""
    import torch

    generator = torch.Generator().manual_seed(4)
    magnitudes = {}
    for key in pairs:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            norm = expert_slice(model, module.removeprefix("base_model.model.")).norm(dim=1)
            noise = torch.randn(norm.shape, generator=generator)
            magnitudes[f"{module}.lora_magnitude_vector"] = norm * (1 + 0.5 * noise)
    return pairs | magnitudes


def save_adapter(folder: Path, tensors: dict[str, Any], config: Mapping[str, Any]) -> Path:
    """Write an adapter's two files as PEFT does."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    LoraConfig(inference_mode=True, **config).save_pretrained(folder)
    assert (folder / CONFIG_FILE).exists()
    return folder


def merge_by_hand(model: Any, tensors: Mapping[str, Any], scale: Callable[[str], float]) -> Any:
    """Add every pair to the live model's own weights, with DoRA where there is a magnitude."""
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        module = stem.removeprefix("base_model.model.")
        weight = expert_slice(model, module)
        merged = weight + scale(module) * tensors[f"{stem}.lora_B.weight"] @ a
        magnitude = tensors.get(f"{stem}.lora_magnitude_vector")
        if magnitude is not None:
            merged = (magnitude / merged.norm(dim=1))[:, None] * merged
        weight.copy_(merged)
    return model


@dataclass(frozen=True)
class ExpertCase:
    """A version 4 adapter on some of a mixture's modules.

    Attributes:
        select: which of an expert's modules are adapted, given (expert, leaf).
        others: further modules per layer, below ``model.layers.N``; ``{block}`` is filled in.
        fields: of the adapter's config, on top of rank 4 and alpha 6.
        special: rank and alpha of the modules whose name holds the key.
        dora: whether each module has a magnitude.
    """

    select: Callable[[int, str], bool]
    others: tuple[str, ...] = ()
    fields: Mapping[str, Any] = ()  # type: ignore[assignment]
    special: tuple[str, int, int] = ("no module", 4, 6)
    dora: bool = False


EXPERT_CASES = {
    "all": ExpertCase(lambda _expert, _leaf: True),
    "down-only": ExpertCase(lambda _expert, leaf: leaf in ("w2", "down_proj")),
    "gate-only": ExpertCase(lambda _expert, leaf: leaf in ("w1", "gate_proj")),
    "some-experts": ExpertCase(lambda expert, _leaf: expert != 1),
    "one-matrix": ExpertCase(lambda expert, leaf: expert == 2 and leaf in ("w2", "down_proj")),
    "with-attention": ExpertCase(
        lambda _expert, _leaf: True,
        others=("self_attn.q_proj", "self_attn.o_proj", "{block}.gate"),
    ),
    "patterns": ExpertCase(
        lambda _expert, _leaf: True,
        fields={"rank_pattern": {"experts.1.*": 2}, "alpha_pattern": {"experts.1.*": 7}},
        special=(".experts.1.", 2, 7),
    ),
    "dora": ExpertCase(lambda _expert, _leaf: True, fields={"use_dora": True}, dora=True),
}


def old_modules(names: ExpertNames, case: ExpertCase) -> list[str]:
    """Return the adapted modules in version 4's names."""
    modules = []
    for layer in names.layers:
        stem = f"model.layers.{layer}"
        modules += [f"{stem}.{other.format(block=names.block)}" for other in case.others]
        modules += [
            f"{stem}.{names.block}.experts.{expert}.{leaf}"
            for expert in range(names.experts)
            for leaf in names.leaves
            if case.select(expert, leaf)
        ]
    return modules


def old_expert_adapter(architecture: str, name: str, base: Path, folder: Path) -> tuple[Path, Any]:
    """Write the case's adapter; return its folder and the model it should turn ``base`` into."""
    names, case = OLD_EXPERTS[architecture], EXPERT_CASES[name]
    mark, rank, alpha = case.special
    model = zoo.load_base(base)
    modules = old_modules(names, case)
    tensors = random_pairs(model, modules, lambda module: rank if mark in module else 4)
    if case.dora:
        tensors = with_magnitudes(model, tensors)
    save_adapter(folder, tensors, lora(modules) | dict(case.fields))
    by_hand = merge_by_hand(
        model, tensors, lambda module: alpha / rank if mark in module else 6 / 4
    )
    return folder, by_hand


def base_in(layout: str, architecture: str, workshop: Workshop) -> Path:
    """Return the base with its experts apart (as published), so but sharded, or fused."""
    saved = workshop.base(architecture, sharded=layout == "apart-sharded")
    return with_names(saved, [], workshop) if layout == "fused" else saved


LAYOUTS = ["apart", "apart-sharded", "fused"]


def pairwise(*parameters: Iterable[str]) -> list[tuple[str, ...]]:
    """Return half of all combinations, in which any two values still meet."""
    numbered = product(*(enumerate(values) for values in parameters))
    return [
        tuple(value for _, value in each)
        for each in numbered
        if sum(number for number, _ in each) % 2 == 0
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "name", "layout"), pairwise(OLD_EXPERTS, EXPERT_CASES, LAYOUTS)
)
def test_adapter_of_single_experts(
    architecture: str, name: str, layout: str, workshop: Workshop
) -> None:
    base = base_in(layout, architecture, workshop)
    adapter, model = old_expert_adapter(architecture, name, base, workshop.fresh("old-experts"))
    expected = zoo.logits(model, zoo.example_inputs(architecture))
    assert_same_function(architecture, base, adapter, expected, workshop)


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
NEW_EXPERTS = {
    "both": lora([], target_parameters=BOTH),
    "gate-up": lora([], target_parameters=BOTH[:1]),
    "down": lora([], target_parameters=BOTH[1:]),
    "with-attention": lora(ATTENTION, target_parameters=BOTH, rank_pattern={"gate_up_proj": 3}),
}


@pytest.mark.parametrize(
    ("architecture", "name", "layout"), pairwise(OLD_EXPERTS, NEW_EXPERTS, LAYOUTS)
)
def test_adapter_of_fused_experts(
    architecture: str, name: str, layout: str, workshop: Workshop
) -> None:
    base = base_in(layout, architecture, workshop)
    adapter = workshop.adapter(workshop.base(architecture), NEW_EXPERTS[name])
    expected = workshop.live_logits(base, [adapter], zoo.example_inputs(architecture))
    assert_same_function(architecture, base, adapter, expected, workshop)
