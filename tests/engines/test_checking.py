"""``check --for``: each part that an engine would not answer with as trained, and the way out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from cli.kinds import Run
from merging.toys import (
    CONFIG,
    HIDDEN,
    INTER,
    Q0,
    VOCAB,
    attention,
    dora,
    draw,
    embedding,
    llama_tensors,
    lora,
    write_adapter,
    write_base,
)
from regraft.engines.registry import ENGINES, engine_named
from regraft.engines.report import EngineReport, Finding
from regraft.engines.vllm import model_facts, takes_no_adapters
from regraft.errors import UsageError
from regraft.translating import convert_adapter

NORM = "model.layers.0.input_layernorm.weight"
HEAD = "lm_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an untied llama, one projection of which has a bias."""
    tensors = llama_tensors() | {f"{Q0}.bias": draw(HIDDEN)}
    return write_base(tmp_path_factory.mktemp("engines") / "base", tensors)


def told(base: Path, adapter: Path, engine: str, **options: Any) -> EngineReport:
    """Return what an engine would do with an adapter that merges."""
    report = regraft.check(base, adapter, engine=engine, engine_options=options)
    assert not report.problems
    assert report.engine is not None
    assert report.ok == report.engine.ok
    return report.engine


def effects(report: EngineReport) -> dict[str, str]:
    """Return what is done to each part that is found."""
    return {finding.where: finding.effect for finding in report.findings}


def test_every_engine_says_what_it_was_read_from() -> None:
    assert list(ENGINES) == ["vllm", "sglang", "llama.cpp", "ollama", "mlx", "peft", "diffusers"]
    assert all(engine.version and engine.sources for engine in ENGINES.values())


# -- what is taken ---------------------------------------------------------------------------------

TAKE_PEFT = ("vllm", "sglang", "llama.cpp", "mlx", "peft")


@pytest.mark.parametrize("engine", TAKE_PEFT)
def test_a_plain_adapter_is_taken(base: Path, tmp_path: Path, engine: str) -> None:
    assert told(base, write_adapter(tmp_path / "a"), engine).findings == ()


@pytest.mark.parametrize("engine", ["vllm", "peft", "mlx"])
def test_rslora_and_patterns_are_taken_where_they_are_known(
    base: Path, tmp_path: Path, engine: str
) -> None:
    adapter = write_adapter(
        tmp_path / "a", use_rslora=True, alpha_pattern={"q_proj": 3}, rank_pattern={"v_proj": 3}
    )
    assert told(base, adapter, engine).findings == ()


def test_one_pattern_of_ranks_alone_is_right_in_llama_cpp(base: Path, tmp_path: Path) -> None:
    """It divides alpha by the rank that a tensor has."""
    tensors = attention() | lora(Q0, HIDDEN, HIDDEN, rank=5)
    adapter = write_adapter(tmp_path / "a", tensors, rank_pattern={Q0: 5})
    assert told(base, adapter, "llama.cpp").findings == ()


# -- what is not -----------------------------------------------------------------------------------

Case = tuple[Mapping[str, Any], Mapping[str, Any], str]

ODD: dict[str, Case] = {
    "dora": (dora(Q0, HIDDEN, HIDDEN), {"use_dora": True, "target_modules": [Q0]}, Q0),
    "bias of a factor": (
        lora(Q0, HIDDEN, HIDDEN) | {f"base_model.model.{Q0}.lora_B.bias": draw(HIDDEN)},
        {"lora_bias": True, "target_modules": [Q0]},
        Q0,
    ),
    "a norm that is saved": (
        lora(Q0, HIDDEN, HIDDEN) | {f"base_model.model.{NORM}": draw(HIDDEN)},
        {"target_modules": [Q0], "modules_to_save": ["input_layernorm"]},
        NORM,
    ),
    "a head that is saved": (
        lora(Q0, HIDDEN, HIDDEN) | {"base_model.model.lm_head.weight": draw(VOCAB, HIDDEN)},
        {"target_modules": [Q0], "modules_to_save": ["lm_head"]},
        "lm_head.weight",
    ),
    "token rows": (
        lora(Q0, HIDDEN, HIDDEN)
        | {
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": draw(
                2, HIDDEN
            )
        },
        {"target_modules": [Q0], "trainable_token_indices": {"embed_tokens": [3, 5]}},
        "model.embed_tokens",
    ),
}
"""Adapters that have something beside plain factors, and the part that has it."""

WHAT: dict[str, dict[str, str]] = {
    "vllm": dict.fromkeys(ODD, "refuses"),
    "sglang": dict.fromkeys(ODD, "leaves out") | {"dora": "refuses"},
    "llama.cpp": dict.fromkeys(ODD, "refuses") | {"a norm that is saved": "leaves out"},
    "mlx": {name: "refuses" for name in ODD if name != "dora"},
    "peft": {},
}


@pytest.mark.parametrize("engine", WHAT)
@pytest.mark.parametrize("name", ODD)
def test_what_is_beside_plain_factors(base: Path, tmp_path: Path, engine: str, name: str) -> None:
    tensors, config, where = ODD[name]
    report = told(base, write_adapter(tmp_path / "a", dict(tensors), **config), engine)
    wanted = WHAT[engine].get(name)
    found = {(finding.where, finding.effect) for finding in report.findings}
    assert ((where, wanted) in found) if wanted else not found
    assert all(finding.way_out and finding.because for finding in report.findings)


@pytest.mark.parametrize(
    ("config", "applied", "scale"),
    [
        ({"use_rslora": True}, 2.0, 6 / 3**0.5),
        ({"alpha_pattern": {"q_proj": 3, "v_proj": 3}}, 2.0, 1.0),
    ],
)
@pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
def test_one_scale_for_all(
    base: Path, tmp_path: Path, engine: str, config: dict[str, Any], applied: float, scale: float
) -> None:
    report = told(base, write_adapter(tmp_path / "a", **config), engine)
    assert {finding.effect for finding in report.findings} == {"other scale"}
    assert len(report.findings) == 4
    for finding in report.findings:
        assert (finding.applied, finding.scale) == pytest.approx((applied, scale))
        assert "regraft convert" in finding.way_out


def test_an_alpha_of_0_is_none_to_llama_cpp(base: Path, tmp_path: Path) -> None:
    report = told(base, write_adapter(tmp_path / "a", lora_alpha=0), "llama.cpp")
    assert {(finding.applied, finding.scale) for finding in report.findings} == {(1.0, 0.0)}


def test_ollama_takes_none(base: Path, tmp_path: Path) -> None:
    report = told(base, write_adapter(tmp_path / "a"), "ollama")
    assert {finding.effect for finding in report.findings} == {"refuses"}
    assert len(report.findings) == 4
    assert "regraft export" in report.findings[0].way_out


def test_diffusers_passes_names_of_no_part_over(base: Path, tmp_path: Path) -> None:
    assert set(effects(told(base, write_adapter(tmp_path / "a"), "diffusers")).values()) == {
        "leaves out"
    }


# -- vLLM: names and the server's options ----------------------------------------------------------


def seeing(prefix: str) -> dict[str, np.ndarray]:
    """Return a llama's tensors as the language model of one that sees."""
    return {
        name.replace("model.", f"{prefix}.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in llama_tensors().items()
    }


@pytest.mark.parametrize(
    ("architecture", "effect"),
    [("Gemma3ForConditionalGeneration", "leaves out"), ("Mistral3ForConditionalGeneration", None)],
)
def test_names_of_the_text_model_in_one_that_sees(
    tmp_path: Path, architecture: str, effect: str | None
) -> None:
    """Some classes map the names of a text model to their own, and others let them pass."""
    config = CONFIG | {"architectures": [architecture], "model_type": "unknown"}
    base = write_base(tmp_path / "b", seeing("model.language_model"), config)
    report = told(base, write_adapter(tmp_path / "a"), "vllm")
    assert {finding.effect for finding in report.findings} == ({effect} if effect else set())
    if effect:
        assert len(report.findings) == 4
        assert "rename" in report.findings[0].way_out


def test_a_class_that_takes_no_adapters(tmp_path: Path) -> None:
    config = CONFIG | {"architectures": ["GPT2LMHeadModel"]}
    report = told(write_base(tmp_path / "b", None, config), write_adapter(tmp_path / "a"), "vllm")
    assert "takes no LoRA" in report.findings[0].because


def test_a_rank_above_the_servers(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", lora(Q0, HIDDEN, HIDDEN, 40), r=40, target_modules=[Q0])
    assert effects(told(base, adapter, "vllm")) == {Q0: "refuses"}
    assert told(base, adapter, "vllm", max_lora_rank=64).ok
    assert "--max-lora-rank" in told(base, adapter, "vllm").findings[0].way_out


def test_modules_that_the_server_was_told_to_leave_out(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    assert len(told(base, adapter, "vllm", lora_target_modules="down_proj").findings) == 4
    assert told(base, adapter, "vllm", lora_target_modules="qkv_proj").ok
    assert told(base, adapter, "vllm", lora_target_modules="q_proj,v_proj").ok


def test_a_module_that_latent_attention_never_calls(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.kv_b_proj"
    config = CONFIG | {"architectures": ["DeepseekV2ForCausalLM"], "kv_lora_rank": 8}
    tensors = llama_tensors() | {f"{name}.weight": draw(HIDDEN, HIDDEN)}
    adapter = write_adapter(tmp_path / "a", lora(name, HIDDEN, HIDDEN), target_modules=[name])
    report = told(write_base(tmp_path / "b", tensors, config), adapter, "vllm")
    assert effects(report) == {name: "leaves out"}
    assert "VLLM_MLA_DISABLE" in report.findings[0].way_out
    assert told(tmp_path / "b", adapter, "vllm", VLLM_MLA_DISABLE=1).ok


def test_keys_that_are_values_too(tmp_path: Path) -> None:
    """A layer of Gemma 4 without ``v_proj``: the values would have the delta of ``k_proj``, too."""
    names = [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)]
    kinds = ["sliding_attention", "full_attention"]
    base = {"architectures": ["Gemma4ForCausalLM"], "layer_types": kinds}
    adapter = write_adapter(
        tmp_path / "a", lora(names[0], HIDDEN, HIDDEN) | lora(names[1], HIDDEN, HIDDEN),
        target_modules=["k_proj"],
    )  # fmt: skip
    for is_so, found in ((True, {names[1]: "leaves out"}), (False, {})):
        config = CONFIG | base | {"attention_k_eq_v": is_so}
        folder = write_base(tmp_path / f"{is_so}", None, config)
        assert effects(told(folder, adapter, "vllm")) == found


def test_a_rank_of_the_config_that_no_module_has(base: Path, tmp_path: Path) -> None:
    """vLLM holds what the config says against its limit, and looks at no tensor."""
    tensors = lora(Q0, HIDDEN, HIDDEN, 4)
    ranks = {"r": 40, "rank_pattern": {"q_proj": 4}}
    adapter = write_adapter(tmp_path / "a", tensors, target_modules=[Q0], **ranks)
    report = told(base, adapter, "vllm")
    assert effects(report) == {Q0: "refuses"}
    assert "--uniform" in report.findings[0].way_out
    assert told(base, adapter, "vllm", max_lora_rank=64).ok
    convert_adapter(adapter, tmp_path / "uniform", to="peft", uniform=True)
    assert told(base, tmp_path / "uniform", "vllm").ok


@pytest.mark.parametrize(("name", "taken"), [("embed_tokens", False), ("layer", True)])
def test_copies_of_an_embedding(base: Path, tmp_path: Path, name: str, taken: bool) -> None:
    """vLLM reads past the copy of an adapted embedding, and past no other."""
    embed = "model.embed_tokens"
    stored = f"base_model.model.{embed}" + (".base_layer" if taken else "")
    tensors = embedding(embed, VOCAB, HIDDEN) if taken else attention()
    copied = dict(tensors) | {f"{stored}.weight": draw(VOCAB, HIDDEN)}
    config = {"target_modules": ["embed_tokens"]} if taken else {}
    report = told(base, write_adapter(tmp_path / name, copied, **config), "vllm")
    assert effects(report) == ({} if taken else {f"{embed}.weight": "refuses"})


def test_embeddings_are_taken_by_classes_that_say_so(tmp_path: Path) -> None:
    tensors = embedding("model.embed_tokens", VOCAB, HIDDEN)
    adapter = write_adapter(tmp_path / "a", dict(tensors), target_modules=["embed_tokens"])
    for architecture, taken in (("LlamaForCausalLM", True), ("Qwen2ForCausalLM", False)):
        config = CONFIG | {"architectures": [architecture]}
        found = told(write_base(tmp_path / architecture, None, config), adapter, "vllm")
        assert found.ok is taken


def test_the_table_of_vllm_is_of_the_version_that_the_facts_are_of() -> None:
    path = Path(regraft.__file__).parent / "engines/vllm_models.json"
    assert json.loads(path.read_text())["version"] == ENGINES["vllm"].version
    assert takes_no_adapters("GPT2LMHeadModel")
    assert not takes_no_adapters("NobodysForCausalLM")
    facts = model_facts("Gemma3ForConditionalGeneration")
    assert facts is not None
    assert facts.renamed("model.language_model.layers.0.x") == "language_model.model.layers.0.x"


# -- SGLang: layers and joined parts ---------------------------------------------------------------


def test_half_of_a_joined_module_is_refused_by_sglang(base: Path, tmp_path: Path) -> None:
    up = "model.layers.0.mlp.up_proj"
    adapter = write_adapter(tmp_path / "a", lora(up, INTER, HIDDEN), target_modules=[up])
    assert effects(told(base, adapter, "sglang")) == {up: "refuses"}


def test_another_rank_is_refused_by_sglang(base: Path, tmp_path: Path) -> None:
    tensors = attention() | lora(Q0, HIDDEN, HIDDEN, rank=5)
    adapter = write_adapter(tmp_path / "a", tensors, rank_pattern={Q0: 5}, alpha_pattern={Q0: 10})
    assert effects(told(base, adapter, "sglang")) == {Q0: "refuses"}


# -- versions, options, the command ----------------------------------------------------------------


def test_another_version_is_said_to_be_unknown(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    report = told(base, adapter, "vllm==0.99.0")
    assert report.asked == "0.99.0"
    assert any("0.99.0 does is not known" in note for note in report.notes)
    assert not any("not known" in note for note in told(base, adapter, "vllm==0.32.0").notes)


@pytest.mark.parametrize(
    ("engine", "options", "found"),
    [("vlm", {}, "vlm"), ("vllm", {"rank": 3}, "rank"), ("vllm", {"max_lora_rank": "x"}, "x")],
)
def test_unknown_engines_and_options(
    base: Path, tmp_path: Path, engine: str, options: dict[str, Any], found: str
) -> None:
    with pytest.raises(UsageError, match=found):
        regraft.check(base, write_adapter(tmp_path / "a"), engine=engine, engine_options=options)


def test_options_want_an_engine_and_engines_one_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    with pytest.raises(UsageError, match="without an engine"):
        regraft.check(base, adapter, engine_options={"max_lora_rank": 8})
    with pytest.raises(UsageError, match="one adapter at a time"):
        regraft.check(base, [adapter, adapter], engine="vllm")


def test_names_are_read_with_and_without_a_version() -> None:
    assert engine_named("vLLM==0.32.0") == (ENGINES["vllm"], "0.32.0")
    assert engine_named("mlx") == (ENGINES["mlx"], None)


def test_the_command_exits_with_1_and_shows_the_way_out(
    run: Run, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", use_rslora=True)
    answer = run("check", str(base), str(adapter), "--for", "llama.cpp")
    assert answer.exit_code == 1
    assert "2 instead of 3.4641" in answer.stdout
    assert "model.layers.{0..1}.self_attn.q_proj (x2)" in answer.stdout
    assert "way out: Write it with the scale in the factors" in answer.stdout
    assert run("check", str(base), str(adapter), "--for", "vllm").exit_code == 0


def test_the_command_as_json(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", lora(Q0, HIDDEN, HIDDEN, 40), r=40, target_modules=[Q0])
    arguments = ["check", str(base), str(adapter), "--for", "vllm", "--json"]
    found = run(*arguments)
    engine = json.loads(found.stdout)["engine"]
    assert (found.exit_code, engine["engine"], engine["version"]) == (1, "vllm", "0.32.0")
    assert Finding(**engine["findings"][0]).where == Q0
    assert run(*arguments, "--engine-option", "max_lora_rank=64").exit_code == 0


def test_what_does_not_merge_is_said_beside_it(run: Run, base: Path, tmp_path: Path) -> None:
    name = "model.layers.7.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "a", lora(name, HIDDEN, HIDDEN), target_modules=[name])
    report = regraft.check(base, adapter, engine="vllm")
    assert report.problems
    assert report.engine is not None
    assert effects(report.engine) == {name: "leaves out"}
    assert run("check", str(base), str(adapter), "--for", "vllm").exit_code == 1
