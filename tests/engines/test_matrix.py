"""No false alarm and none missed: each case of the faithfulness tests, for every engine.

What is expected stands here as a table, from a feature of an adapter to what each engine does with
it. Features are read off the adapter's files, and by nothing that `check --for` uses. PEFT takes
all cases: its live model is what the faithfulness tests hold each against.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors import safe_open

import regraft
from faithful.cases import lora, one
from faithful.embedding_cases import GROWN
from faithful.harness import Case, Workshop
from faithful.test_architectures import CASES
from regraft.engines.checking import subject_of
from regraft.engines.registry import ENGINES, judge
from regraft.formats.hub import locate
from regraft.merging.inputs.any_dialect import open_adapter
from regraft.merging.inputs.base import open_base

TIED = ("llama_tied", "qwen2_tied", "gemma3", "gpt2", "opt", "bloom")
LAYERS = re.compile(r"(^|\.)layers\.\d+\.")
EMBEDS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
OTHER = "vision_tower|multi_modal_projector"
NORM = r"_layernorm|(^|\.)norm\."


@dataclass(frozen=True)
class Files:
    """An adapter's config, its tensors' shapes by name without PEFT's prefix, and its base."""

    base: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        with safe_open(self.folder / "adapter_model.safetensors", "np") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        return {name.removeprefix("base_model.model."): shape for name, shape in shapes.items()}

    @cached_property
    def modules(self) -> dict[str, tuple[int, ...]]:
        """The adapted modules, each with its A's shape."""
        ends = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")
        return {ends.sub("", n): shape for n, shape in self.shapes.items() if ends.search(n)}

    def adapts(self, *leaves: str) -> bool:
        """Whether it adapts a module whose name ends so."""
        return any(name.rpartition(".")[2] in leaves for name in self.modules)

    def has(self, pattern: str) -> bool:
        """Whether a tensor's name has this in it."""
        return any(re.search(pattern, name) for name in self.shapes)

    def saves(self, pattern: str = "") -> bool:
        """Whether a module of such a name is replaced."""
        saved = self.config["modules_to_save"] or ()
        whole = [n for n in self.shapes if "lora_" not in n and "trainable_tokens" not in n]
        return any(re.search(pattern, n) and any(s in n for s in saved) for n in whole)

    def copies(self) -> list[str]:
        """Return the grown embeddings that it carries and does not replace."""
        embedding = re.compile(
            r"(.*\.)?(embed_tokens|lm_head|wte)\.(token_adapter\.)?(base_layer\.)?weight"
        )
        return [
            name
            for name, shape in self.shapes.items()
            if shape[0] == GROWN and embedding.fullmatch(name) and not self.saves(re.escape(name))
        ]

    def in_layers(self, *leaves: str) -> bool:
        """Whether it adapts a module of such a name in a list called layers."""
        return any(n.rpartition(".")[2] in leaves for n in self.modules if LAYERS.search(n))

    def outside(self) -> bool:
        """Whether it adapts a module that neither its layer's number nor its name places."""
        named = ("embed_tokens", "lm_head")
        return any(not LAYERS.search(n) and not any(e in n for e in named) for n in self.modules)

    def stacks(self) -> int:
        """Return how many stacks of experts' weights of a layer it adapts, at most."""
        found = [n.replace(".base_layer", "") for n in self.modules if n.rpartition(".experts")[1]]
        return max(map(found.count, found), default=0)

    def lacks_a_part(self) -> bool:
        """Whether a layer has v_proj and no q_proj, and the like."""
        needed = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj"}
        needed["up_proj"] = "gate_proj"
        owners = {name.rpartition(".")[::2] for name in self.modules}
        return any((o, needed[leaf]) not in owners for o, leaf in owners if leaf in needed)

    def ranks(self) -> set[int]:
        """Return the ranks of linear layers' factors."""
        return {shape[0] for name, shape in self.modules.items() if "experts" not in name}


Feature = Callable[[Files], bool]
Verdicts = tuple[str, str, str, str]

ORDER = ("vllm", "sglang", "llama.cpp", "mlx")
REF, OUT, SCALE, WRONG = "refuses", "leaves out", "other scale", "misapplies"
_ = ""


def of(*bases: str) -> Feature:
    return lambda files: files.base in bases


def sides_of_a_tie(ensured: bool | None = None) -> Feature:
    """Whether an adapter has factors of a side of a tie, and says that both sides are meant."""
    return lambda f: (
        f.base in TIED
        and f.adapts(*EMBEDS, "lm_head")
        and ensured in (None, bool(f.config["ensure_weight_tying"]))
    )


def both(*features: Feature) -> Feature:
    return lambda files: all(feature(files) for feature in features)


def adapts(*leaves: str) -> Feature:
    return lambda files: files.adapts(*leaves)


def has(pattern: str) -> Feature:
    return lambda files: files.has(pattern)


def is_set(name: str) -> Feature:
    return lambda files: bool(files.config[name])


TABLE: Mapping[str, tuple[Feature, Verdicts]] = {
    # The base.
    "an encoder": (of("bert_seqcls"), (REF, _, _, REF)),
    "classes that vLLM takes no adapters for": (of("gpt2", "bloom"), (REF, _, _, _)),
    "kinds that mlx-lm lacks": (of("opt", "bloom", "t5", "vit_conv", "toynet"), (_, _, _, REF)),
    "kinds that llama.cpp lacks": (of("opt", "vit_conv", "toynet"), (_, _, REF, _)),
    # What is trained beside plain factors.
    "rsLoRA": (is_set("use_rslora"), (_, SCALE, SCALE, _)),
    "alpha pattern": (is_set("alpha_pattern"), (_, SCALE, SCALE, _)),
    "rank pattern": (is_set("rank_pattern"), (_, REF, _, _)),
    "DoRA": (has("magnitude"), (REF, REF, REF, _)),
    "DoRA of an embedding": (has(r"(embed\w*|wte)\.lora_magnitude"), (_, _, _, REF)),
    "bias of factors": (has(r"lora_B\.bias"), (REF, OUT, REF, REF)),
    "bias": (lambda f: f.config["bias"] != "none" and f.has(r"(?<!lora_B)\.bias$|_bias$"),
             (REF, OUT, REF, REF)),
    "saved": (lambda f: f.saves(), (REF, OUT, _, REF)),
    "saved, named as a norm": (lambda f: f.saves(NORM), (_, _, OUT, _)),
    "saved, named otherwise": (lambda f: f.saves(rf"^(?!.*({NORM}|{OTHER}))"), (_, _, REF, _)),
    "token rows": (has("trainable_tokens_delta"), (REF, OUT, REF, REF)),
    "a start from the base": (
        lambda f: str(f.config["init_lora_weights"]).lower() in ("pissa", "olora"),
        (REF, WRONG, WRONG, REF)),
    "a copy of a grown embedding": (lambda f: bool(f.copies()), (REF, OUT, _, REF)),
    "such a copy, adapted": (lambda f: any("base_layer" in c for c in f.copies()), (_, _, OUT, _)),
    "such a copy, not adapted": (
        lambda f: any("base_layer" not in c for c in f.copies()), (_, _, REF, _)),
    # Which modules are adapted.
    "a rank above 16": (lambda f: max(f.ranks(), default=0) > 16, (REF, _, _, _)),
    "a regular expression": (
        lambda f: isinstance(f.config["target_modules"], str), (_, REF, _, _)),
    "a part of joined modules": (lambda f: f.lacks_a_part(), (_, REF, _, _)),
    "modules outside of layers": (lambda f: f.outside(), (_, OUT, _, _)),
    "modules whose sizes are unknown": (
        lambda f: f.in_layers("fc1", "fc2", "out_proj", "dense", "query_key_value", "gate",
                              "dense_h_to_4h", "dense_4h_to_h", "experts"), (_, REF, _, _)),
    "convolutions": (lambda f: any(len(s) > 2 for s in f.modules.values()), (REF, REF, _, REF)),
    "experts": (lambda f: f.stacks() > 0, (_, REF, REF, _)),
    "experts, not as their class takes them": (
        lambda f: f.stacks() > 0 and (f.base != "gpt_oss" or f.stacks() < 2), (REF, _, _, _)),
    "experts whose gate and up are one": (
        lambda f: f.stacks() > 0 and f.base == "gpt_oss", (_, _, _, REF)),
    "biases of experts": (
        lambda f: any("bias" in each for each in f.config["target_parameters"] or ()),
        (REF, REF, REF, REF)),
    "a router of another name": (both(of("mixtral"), adapts("gate")), (OUT, _, _, _)),
    "transposed weights": (
        both(of("gpt2"), has(r"(c_attn|c_fc|mlp\.c_proj)\.lora")), (_, _, REF, _)),
    "square transposed weights": (both(of("gpt2"), has(r"attn\.c_proj\.lora")), (_, _, WRONG, _)),
    "other parts": (has(OTHER), (_, _, OUT, REF)),
    "other parts, adapted": (has(rf"({OTHER}).*lora"), (OUT, _, _, _)),
    "other parts, by SGLang": (lambda f: f.has(rf"({OTHER}).*lora") or f.saves(OTHER),
                               (_, WRONG, _, _)),
    "a classifier": (has(r"(classifier|pooler)\..*lora_A|classifier\.lora_A"), (_, _, OUT, _)),
    # Embeddings.
    "positions": (adapts("wpe", "position_embeddings"), (_, _, REF, _)),
    "a side of a tie": (sides_of_a_tie(), (_, _, REF, _)),
    "one side of a tie alone": (sides_of_a_tie(ensured=False), (_, _, _, REF)),
    "a head that is tied to wte": (
        both(of("gpt2", "bloom"), adapts("lm_head")), (_, OUT, _, _)),
    "embeddings that the class does not take": (
        both(of("qwen2_tied", "gemma3", "opt", "llava", "gpt_neox"),
             adapts(*EMBEDS, "lm_head")), (REF, _, _, _)),
}  # fmt: skip
"""What vLLM, SGLang, llama.cpp and mlx-lm do with each feature: nothing where they take it."""

ODD: Mapping[str, Mapping[str, set[str]]] = {
    # PEFT doubles rank and alpha of gate and up, which leaves alpha / r as it was.
    "mixtral-all-linear-0": {"sglang": {REF}},
    "qwen3_moe-all-linear-0": {"sglang": {REF}},
}
"""Cases in which features meet in another way."""

IN_DIFFUSERS: tuple[tuple[Feature, str], ...] = (
    (TABLE["saved"][0], REF), (TABLE["bias"][0], REF), (TABLE["token rows"][0], REF),
    (TABLE["a start from the base"][0], WRONG),
)  # fmt: skip
"""What diffusers does beside passing every name over."""

ADAPTERS = [(case, number) for case in CASES for number in range(len(case.configs))]


@pytest.fixture(scope="module")
def files_of(workshop: Workshop) -> Callable[[Case, int], Files]:
    return lambda case, number: Files(case.architecture, workshop.adapters(case)[number])


@pytest.mark.parametrize(("case", "number"), ADAPTERS, ids=lambda v: getattr(v, "id", str(v)))
def test_each_engine_does_what_is_foretold(
    case: Case,
    number: int,
    workshop: Workshop,
    files_of: Callable[[Case, int], Files],
) -> None:
    files = files_of(case, number)
    base = workshop.base(case.architecture, case.dtype, case.sharded)
    opened = open_base(locate(base, kind="base", token=None))
    subject = subject_of(opened, open_adapter(locate(files.folder, kind="adapter", token=None)))
    told = {
        name: {finding.effect for finding in judge(ENGINES[name], subject, {}).findings}
        for name in ENGINES
    }
    assert told == expected(case, number, files)


def expected(case: Case, number: int, files: Files) -> dict[str, set[str]]:
    """Return what each engine does with an adapter."""
    found: dict[str, set[str]] = {name: set() for name in ENGINES}
    for feature, verdicts in TABLE.values():
        if feature(files):
            for engine, verdict in zip(ORDER, verdicts, strict=True):
                found[engine] |= {verdict} - {""}
    found["ollama"] = {REF}
    found["diffusers"] = {OUT}
    for feature, effect in IN_DIFFUSERS:
        found["diffusers"] |= {effect} if feature(files) else set()
    return found | dict(ODD.get(f"{case.id}-{number}", {}))


# -- where PEFT is not the truth -------------------------------------------------------------------


def test_what_peft_leaves_unread_is_told_of_peft(workshop: Workshop) -> None:
    """It finds the other side of a tie by the name embed_tokens alone."""
    config = lora(["wte", "lm_head"], ensure_weight_tying=True)
    case = one("gpt2", "tied-ensured-both", config)
    (adapter,) = workshop.adapters(case)
    report = regraft.check(workshop.base("gpt2"), adapter, engine="peft").engine
    assert report is not None
    assert [(each.where, each.effect) for each in report.findings] == [("lm_head", OUT)]


def test_what_peft_adds_twice_is_told_of_peft(workshop: Workshop) -> None:
    (adapter,) = workshop.adapters(one("toynet", "attention", lora(["attention"])))
    report = regraft.check(workshop.base("toynet"), adapter, engine="peft").engine
    assert report is not None
    assert {each.effect for each in report.findings} == {WRONG}


@pytest.mark.parametrize(
    ("engine", "architecture"),
    [("vllm", "t5"), ("vllm", "vit_conv"), ("sglang", "gpt_neox"), ("sglang", "bloom")],
)
def test_a_class_that_is_not_an_engines_own_is_said_to_be_unknown(
    workshop: Workshop,
    engine: str,
    architecture: str,
) -> None:
    (adapter,) = workshop.adapters(next(c for c in CASES if c.architecture == architecture))
    report = regraft.check(workshop.base(architecture), adapter, engine=engine).engine
    assert report is not None
    assert any("has no class of its own" in note for note in report.notes)
