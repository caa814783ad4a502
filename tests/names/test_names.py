"""The table says what transformers says, and names lead from saved files to live parameters."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from regraft.names import NameMap, Piece, class_for_task, table
from regraft.names.architecture import tensors_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).parents[2]
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = TEXT | {"num_experts": 3, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
QWEN_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "patch_size": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", TEXT),
    "llama tied": ("LlamaForCausalLM", TEXT | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", TEXT),
    "mixtral": ("MixtralForCausalLM", TEXT | {"num_local_experts": 3}),
    "qwen3 moe": ("Qwen3MoeForCausalLM", MOE),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
    ),
    "bert": ("BertForSequenceClassification", TEXT),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2 with swiglu": ("Dinov2Model", VISION | {"use_swiglu_ffn": True}),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
        },
    ),
    "llava over qwen3 moe": (
        "LlavaForConditionalGeneration",
        {
            "text_config": MOE | {"model_type": "qwen3_moe"},
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
        },
    ),
    "qwen2 vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN_VISION,
        },
    ),
    "qwen3 vl moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": MOE | {"rope_parameters": ROPE, "decoder_sparse_step": 1},
            "vision_config": QWEN_VISION
            | {"intermediate_size": 24, "out_hidden_size": 16, "deepstack_visual_indexes": [0]},
        },
    ),
    "gpt oss": ("GptOssForCausalLM", TEXT | {"num_local_experts": 3}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
}
ARCHITECTURES = sorted({name for name, _ in TINY.values()})


@pytest.fixture(scope="module")
def extraction() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("names.extraction")
    finally:
        sys.path.pop(0)


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


# --- the table against transformers ---------------------------------------------------------------


def test_the_table_was_made_from_the_transformers_installed_here() -> None:
    assert table.load()["transformers"] == transformers.__version__


@pytest.mark.slow
def test_every_raw_mapping_is_transformers_own(extraction: ModuleType) -> None:
    fresh = as_json(extraction.extract_mappings())
    assert table.load()["mappings"] == fresh
    assert len(fresh) > 200


def test_every_auto_class_of_the_table_is_transformers_own(extraction: ModuleType) -> None:
    fresh = extraction.auto_classes()
    assert table.load()["auto"] == {name: fresh[name] for name in table.load()["auto"]}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_as_a_fresh_instance_shows_it(extraction: ModuleType, name: str) -> None:
    fresh = as_json(extraction.extract_architecture(getattr(transformers, name)))
    facts = dict(table.architecture(name) or {})
    default = getattr(transformers, name).config_class().to_dict()
    assert tensors_of(name, default) == set(fresh.pop("holds"))
    assert {key: facts[key] for key in facts if key not in ("holds", "lacks")} == fresh


def test_what_could_not_be_built_is_listed_and_is_not_what_people_adapt() -> None:
    skipped = table.load()["skipped"]
    assert not set(skipped) & set(ARCHITECTURES)
    assert len(skipped) < 120


# --- saved files against live parameters ----------------------------------------------------------


class Saved:
    """A tiny live model, the tensors of its file, and the map for its config.json."""

    def __init__(self, name: str, folder: Path) -> None:
        class_name, settings = TINY[name]
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        self.model = model_class(model_class.config_class(**settings)).eval()
        self.model.save_pretrained(folder)
        self.tensors = safetensors_torch.load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.names = NameMap.for_config(self.config).for_names(self.tensors)


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(request.param, tmp_path_factory.mktemp("saved"))


each_model = pytest.mark.parametrize("saved", sorted(TINY), indirect=True)


def reassemble(shape: tuple[int, ...], found: list[tuple[Piece, Any]]) -> Any:
    """Return the parameter that the tensors of a file make up, by their pieces alone."""
    experts: dict[int | None, list[tuple[Piece, Any]]] = defaultdict(list)
    for piece, tensor in found:
        experts[piece.expert].append((piece, slice_of(tensor, piece, shape)))
    matrices = [join(experts[i]) for i in sorted(experts, key=lambda i: -1 if i is None else i)]
    return matrices[0] if None in experts else torch.stack(matrices)


def slice_of(tensor: Any, piece: Piece, shape: tuple[int, ...]) -> Any:
    if piece.chunks > 1:
        tensor = tensor.chunk(piece.chunks, piece.chunk_axis)[piece.chunk]
    if piece.transposed and not (piece.check_shape and tuple(tensor.shape) == shape):
        tensor = tensor.transpose(-1, -2)
    return tensor


def join(parts: list[tuple[Piece, Any]]) -> Any:
    parts = sorted(parts, key=lambda pair: pair[0].part)
    assert [piece.part for piece, _ in parts] == list(range(parts[0][0].parts))
    return torch.cat([tensor for _, tensor in parts], dim=parts[0][0].axis)


@each_model
def test_a_files_tensors_make_up_the_live_parameters_bit_for_bit(saved: Saved) -> None:
    live = saved.model.state_dict()
    found: dict[str, list[tuple[Piece, Any]]] = defaultdict(list)
    for name, tensor in saved.tensors.items():
        for piece in saved.names.pieces(name):
            assert not piece.unsupported
            found[piece.parameter].append((piece, tensor))
    assert set(found) <= set(live)
    assert set(live) - set(found) <= set(saved.names.tied_now)
    for name, tensors in found.items():
        whole = reassemble(tuple(live[name].shape), tensors)
        assert torch.equal(whole, live[name]), name


@each_model
def test_a_canonical_name_stays_as_it_is(saved: Saved) -> None:
    for name in saved.model.state_dict():
        assert saved.names.targets(name) == (Piece(name),)
        assert [piece.parameter for piece in saved.names.pieces(name)] == [name]


@each_model
def test_facts_agree_with_the_live_model(saved: Saved) -> None:
    model, names = saved.model, saved.names
    modules = dict(model.named_modules())
    assert names.known
    assert names.architecture == type(model).__name__
    assert names.base_model_prefix == model.base_model_prefix
    assert dict(names.tied_now) == dict(model.all_tied_weights_keys)
    assert names.input_embedding is not None
    assert modules[names.input_embedding] is model.get_input_embeddings()
    output = model.get_output_embeddings()
    assert (modules[names.output_embedding] if names.output_embedding else None) is output


@each_model
def test_experts_are_known_in_the_order_they_were_registered(saved: Saved) -> None:
    for path, module in saved.model.named_modules():
        if hasattr(module, "is_transposed"):
            parameters = tuple(name for name, _ in module.named_parameters(recurse=False))
            assert saved.names.expert_parameters(path) == parameters
            assert saved.names.is_transposed(path) is module.is_transposed
        else:
            assert saved.names.expert_parameters(path) == ()
            assert saved.names.is_transposed(path) is None


@each_model
def test_names_of_the_base_model_alone_are_among_the_candidates(saved: Saved) -> None:
    prefix = f"{saved.names.base_model_prefix}."
    for name in saved.model.state_dict():
        short = name.removeprefix(prefix)
        parameters = [c[0].parameter for c in saved.names.canonical_candidates(short)]
        assert name in parameters


# --- names of old ---------------------------------------------------------------------------------


def names_of(architecture: str, **config: Any) -> NameMap:
    return NameMap.for_config({"architectures": [architecture], **config})


def test_mixtrals_experts_of_old_are_slices_of_the_stacked_ones() -> None:
    names = names_of("MixtralForCausalLM")
    old = "model.layers.7.block_sparse_moe."
    new = "model.layers.7.mlp."
    gate_up = new + "experts.gate_up_proj"
    assert names.pieces(old + "experts.11.w1.weight") == (Piece(gate_up, 11, 0, 2, 0),)
    assert names.pieces(old + "experts.11.w3.weight") == (Piece(gate_up, 11, 1, 2, 0),)
    assert names.pieces(old + "experts.0.w2.weight") == (Piece(new + "experts.down_proj", 0),)
    assert names.pieces(old + "gate.weight") == (Piece(new + "gate.weight"),)


def test_qwen_moe_experts_are_slices_of_the_stacked_ones() -> None:
    names = names_of("Qwen3MoeForCausalLM")
    old = "model.layers.0.mlp.experts.3.gate_proj.weight"
    assert names.targets(old) == (Piece("model.layers.0.mlp.experts.gate_up_proj", 3, 0, 2),)


@pytest.mark.parametrize(
    ("architecture", "old", "new"),
    [
        (
            "LlavaForConditionalGeneration",
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "model.language_model.layers.0.self_attn.q_proj.weight",
        ),
        ("LlavaForConditionalGeneration", "language_model.lm_head.weight", "lm_head.weight"),
        (
            "Qwen2VLForConditionalGeneration",
            "model.layers.1.mlp.down_proj.weight",
            "model.language_model.layers.1.mlp.down_proj.weight",
        ),
        ("Qwen2VLForConditionalGeneration", "visual.merger.mlp.0.bias", None),
        (
            "ViTForImageClassification",
            "vit.encoder.layer.3.attention.attention.query.weight",
            "vit.layers.3.attention.q_proj.weight",
        ),
        (
            "ViTForImageClassification",
            "vit.encoder.layer.3.attention.output.dense.bias",
            "vit.layers.3.attention.o_proj.bias",
        ),
        ("ViTForImageClassification", "classifier.weight", "classifier.weight"),
        (
            "BertForSequenceClassification",
            "bert.embeddings.LayerNorm.gamma",
            "bert.embeddings.LayerNorm.weight",
        ),
    ],
)
def test_an_old_name_lands_on_the_parameter(architecture: str, old: str, new: str | None) -> None:
    new = new or f"model.{old}"
    assert names_of(architecture).pieces(old) == (Piece(new),)


def test_a_text_tower_of_another_type_brings_its_own_names_within_its_scope() -> None:
    config = {"text_config": {"model_type": "qwen3_moe"}}
    names = names_of("LlavaForConditionalGeneration", **config)
    tower = "model.language_model.layers.2.mlp.experts."
    old = "language_model.model.layers.2.mlp.experts.1.up_proj.weight"
    assert names.pieces(old) == (Piece(tower + "gate_up_proj", 1, 1, 2),)
    elsewhere = "model.vision_tower.mlp.experts.1.up_proj.weight"
    assert names.pieces(elsewhere) == (Piece(elsewhere),)
    assert names.expert_parameters(tower.rstrip(".")) == ("gate_up_proj", "down_proj")


def test_a_fused_tensor_holds_one_slice_per_parameter() -> None:
    names = names_of("Dinov2Model")
    pieces = names.pieces("encoder.layer.0.mlp.weights_in.weight")
    assert [p.parameter.split(".")[-2] for p in pieces] == ["gate_proj", "up_proj"]
    assert [(p.chunk, p.chunks, p.chunk_axis) for p in pieces] == [(0, 2, 0), (1, 2, 0)]


def test_a_layout_that_files_keep_is_the_files_and_not_the_adapters() -> None:
    names = names_of("Qwen3VLMoeForConditionalGeneration")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert names.pieces(name) == (Piece(name, transposed=True, check_shape=True),)
    assert names.targets(name) == (Piece(name),)


def test_a_conversion_that_is_not_undone_is_named_with_the_right_parameter() -> None:
    names = names_of("Kimi_K25ForConditionalGeneration")
    pieces = names.pieces("vision_tower.encoder.blocks.0.wqkv.weight")
    assert [p.parameter.rsplit(".", 2)[1] for p in pieces] == ["q_proj", "k_proj", "v_proj"]
    assert [p.unsupported for p in pieces] == ["PermuteForRope", "PermuteForRope", ""]


def test_names_that_shift_are_told_apart_by_the_file_they_come_with() -> None:
    names = names_of("Kimi_K25ForConditionalGeneration")
    old = [f"vision_tower.encoder.blocks.0.norm{i}.weight" for i in (0, 1)]
    renamed = [names.for_names(old).pieces(name)[0].parameter for name in old]
    new = [f"model.vision_tower.layers.0.norm{i}.weight" for i in (1, 2)]
    assert renamed == new
    assert [names.for_names(new).pieces(name)[0].parameter for name in new] == new


# --- what the map knows of a configuration --------------------------------------------------------


def test_no_configuration_gives_a_map_that_changes_nothing() -> None:
    names = NameMap.for_config(None)
    assert not names.known
    assert names.pieces("a.LayerNorm.gamma") == (Piece("a.LayerNorm.gamma"),)
    assert names.canonical_candidates("x") == ((Piece("x"),),)
    assert dict(names.tied) == {}


def test_a_class_with_its_own_code_is_unknown_and_its_ties_are_a_guess() -> None:
    config = {"architectures": ["OwnForCausalLM"], "auto_map": {}, "model_type": "llama"}
    assert dict(NameMap.for_config(config | {"auto_map": {"AutoModel": "own.Own"}}).tied) == {}
    config["tie_word_embeddings"] = True
    config["auto_map"] = {"AutoModel": "own.Own"}
    names = NameMap.for_config(config)
    assert not names.known
    assert dict(names.tied_now) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_model_type_without_architectures_stands_for_its_usual_class() -> None:
    assert NameMap.for_config({"model_type": "mistral"}).architecture == "MistralForCausalLM"
    assert NameMap.for_config({"model_type": "vit"}).architecture == "ViTModel"


def test_the_architecture_given_goes_before_the_configurations() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    names = NameMap.for_config(config, "LlamaForSequenceClassification")
    assert names.architecture == "LlamaForSequenceClassification"
    assert names.output_embedding is None


@pytest.mark.parametrize(
    ("architecture", "config", "ties"),
    [
        ("LlamaForCausalLM", {}, False),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, True),
        ("Gemma2ForCausalLM", {}, True),
        ("Gemma2ForCausalLM", {"tie_word_embeddings": False}, False),
        ("Qwen2VLForConditionalGeneration", {}, False),
        (
            "Qwen2VLForConditionalGeneration",
            {"text_config": {"tie_word_embeddings": True}},
            True,
        ),
    ],
)
def test_a_model_ties_as_its_configuration_and_class_say(
    architecture: str, config: dict[str, Any], ties: bool
) -> None:
    names = names_of(architecture, **config)
    assert names.ties is ties
    assert names.tied


@pytest.mark.parametrize(
    ("task", "model_type", "expected"),
    [
        ("CAUSAL_LM", "llama", "LlamaForCausalLM"),
        ("CAUSAL_LM", "llava", "LlavaForConditionalGeneration"),
        ("SEQ_CLS", "bert", "BertForSequenceClassification"),
        ("TOKEN_CLS", "bert", "BertForTokenClassification"),
        ("QUESTION_ANS", "bert", "BertForQuestionAnswering"),
        ("SEQ_2_SEQ_LM", "t5", "T5ForConditionalGeneration"),
        ("FEATURE_EXTRACTION", "qwen3", "Qwen3Model"),
        ("IMAGE_CLS", "vit", "ViTForImageClassification"),
        ("SEQ_CLS", "unheard_of", None),
        ("UNHEARD_OF", "bert", None),
    ],
)
def test_a_task_type_names_a_class(task: str, model_type: str, expected: str | None) -> None:
    assert class_for_task(task, model_type) == expected


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"model_type": 3}, {"model_type": []}])
def test_a_strange_configuration_is_no_error(value: Any) -> None:
    config = {"architectures": value, "model_type": value, "text_config": value}
    NameMap.for_config(config).pieces("model.x.weight")
    NameMap.for_config(config, "LlavaForConditionalGeneration").pieces("model.x.weight")
    NameMap.for_config({"architectures": [value]}).pieces("model.x.weight")


# --- cost -----------------------------------------------------------------------------------------


def test_the_room_needs_the_standard_library_only() -> None:
    code = (
        "import sys, regraft.names as n; n.NameMap.for_config({'model_type': 'llama'});"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_twenty_thousand_names_take_a_fraction_of_a_second() -> None:
    names = names_of("Qwen3MoeForCausalLM")
    many = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        for layer in range(53)
        for expert in range(128)
        for projection in ("gate_proj", "up_proj", "down_proj")
    ]
    started = time.process_time()
    for name in many:
        names.pieces(name)
    assert time.process_time() - started < 1.5  # measured: 0.2 s
