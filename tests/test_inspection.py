"""``inspect``: the right facts, from headers alone, in no time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import regraft
from cli import tiny
from measuring import seconds_of_cpu, work_to_compare
from regraft import inspection
from regraft.errors import (
    AccessError,
    AdapterError,
    EnvironmentShortfall,
    FormatError,
    InputError,
)
from regraft.formats.hub import Located
from regraft.inspection import DTypeShare, FileFacts, inspect

KEY = "base_model.model.model"


def factors(module: str, rank: int = 4, width: int = 8) -> dict[str, np.ndarray]:
    """Return the two factors of one module."""
    return {
        f"{KEY}.{module}.lora_A.weight": np.zeros((rank, width), np.float32),
        f"{KEY}.{module}.lora_B.weight": np.zeros((width, rank), np.float32),
    }


# ---- models


def test_a_base_tells_its_architecture_size_and_files(tmp_path: Path) -> None:
    found = inspect(tiny.make_base(tmp_path / "base"))
    tensors = tiny.base_tensors()
    assert (found.kind, found.source) == ("base", str(tmp_path / "base"))
    assert found.parameters == sum(t.size for t in tensors.values())
    assert found.bytes == 4 * found.parameters
    assert found.dtypes == (DTypeShare("F32", len(tensors), found.parameters, found.bytes),)
    assert found.files == (FileFacts("model.safetensors", found.bytes, len(tensors)),)
    model = found.model
    assert model is not None
    assert (model.model_type, model.architectures) == ("llama", ("LlamaForCausalLM",))
    assert (model.layers, model.hidden, model.vocab) == (2, 16, 32)
    assert (model.tied_embeddings, model.quantization) == (False, None)
    assert (found.merge, found.adapter) == (None, None)


def test_a_sharded_base_lists_its_shards(tmp_path: Path) -> None:
    found = inspect(tiny.make_sharded_base(tmp_path / "base"))
    assert [(f.name, f.tensors) for f in found.files] == [
        ("model-00001-of-00002.safetensors", 8),
        ("model-00002-of-00002.safetensors", len(tiny.base_tensors()) - 8),
    ]
    assert sum(f.bytes for f in found.files) == found.bytes


def test_dtypes_are_listed_with_the_largest_share_first(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(10, np.float16), "b": np.zeros(20, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert inspect(tmp_path).dtypes == (DTypeShare("F32", 1, 20, 80), DTypeShare("F16", 1, 10, 20))


def test_a_lone_file_is_a_base_without_a_config(tmp_path: Path) -> None:
    save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "weights.safetensors")
    found = inspect(tmp_path / "weights.safetensors")
    assert (found.kind, found.parameters, found.model) == ("base", 6, None)


def test_the_shape_of_a_language_model_inside_another_is_found(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base")
    config = {"model_type": "vlm", "text_config": {"hidden_size": 64, "num_hidden_layers": 3}}
    (base / "config.json").write_text(json.dumps(config))
    model = inspect(base).model
    assert model is not None
    assert (model.model_type, model.hidden, model.layers, model.vocab) == ("vlm", 64, 3, None)


def test_gpt2_names_of_the_same_sizes_are_known(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"n_embd": 12, "n_layer": 5}))
    model = inspect(base).model
    assert model is not None
    assert (model.hidden, model.layers) == (12, 5)


def test_a_config_of_wrong_kinds_tells_nothing(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base")
    odd = {"hidden_size": "big", "architectures": "Llama", "tie_word_embeddings": 1}
    (base / "config.json").write_text(json.dumps(odd | {"quantization_config": "4bit"}))
    model = inspect(base).model
    assert model is not None
    assert (model.hidden, model.architectures) == (None, ())
    assert (model.tied_embeddings, model.quantization) == (None, None)


def test_quantization_is_named(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", quantization_config={"quant_method": "gptq"})
    model = inspect(base).model
    assert model is not None
    assert model.quantization == "gptq"


def test_a_merged_model_tells_what_it_was_made_of(tmp_path: Path) -> None:
    found = inspect(tiny.make_receipt(tiny.make_base(tmp_path / "merged")))
    assert found.kind == "merged"
    merge = found.merge
    assert merge is not None
    assert merge.base == "org/base@" + "f" * 40
    assert merge.adapters == (("./style", 0.5),)
    assert (merge.created, merge.regraft) == ("2025-01-02T03:04:05Z", "0.1.0")
    assert (merge.relative_delta, merge.changed_share) == (0.0125, 0.75)


@pytest.mark.parametrize("receipt", [{}, {"base": 3}, {"base": {"source": "x"}}])
def test_a_receipt_that_is_none_is_a_format_error(tmp_path: Path, receipt: dict[str, Any]) -> None:
    folder = tiny.make_receipt(tiny.make_base(tmp_path / "merged"))
    (folder / "regraft" / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(FormatError, match="receipt"):
        inspect(folder)


# ---- adapters


def test_an_adapter_tells_its_rank_scale_targets_and_base(tmp_path: Path) -> None:
    found = inspect(tiny.make_adapter(tmp_path / "adapter"))
    facts = found.adapter
    assert (found.kind, found.model, found.merge) == ("adapter", None, None)
    assert facts is not None
    assert (facts.peft_type, facts.task_type) == ("LORA", "CAUSAL_LM")
    assert (facts.base, facts.base_revision) == ("org/tiny-llama", "abc123")
    assert (facts.r, facts.alpha, facts.scale) == (4, 8, 2.0)
    assert facts.ranks == {4: 4}
    assert facts.target_modules == ("q_proj", "v_proj")
    assert (facts.modules, facts.adapted) == (4, {"q_proj": 2, "v_proj": 2})
    assert (facts.bias, facts.init, facts.peft_version) == ("none", "true", "0.18.0")
    assert (facts.rslora, facts.dora, facts.patterned, facts.lora_bias) == (False,) * 4
    assert facts.unmergeable == ()
    assert found.parameters == sum(t.size for t in tiny.adapter_tensors().values())


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    facts = inspect(tiny.make_adapter(tmp_path / "a", use_rslora=True)).adapter
    assert facts is not None
    assert facts.rslora
    assert facts.scale == pytest.approx(8 / math.sqrt(4))


def test_ranks_that_differ_by_module_are_counted(tmp_path: Path) -> None:
    tensors = factors("layers.0.q", 4) | factors("layers.0.k", 2) | factors("layers.1.q", 4)
    facts = inspect(tiny.make_adapter(tmp_path / "a", tensors, rank_pattern={"k": 2})).adapter
    assert facts is not None
    assert (facts.ranks, facts.patterned) == ({2: 1, 4: 2}, True)


def test_embeddings_dora_and_token_rows_are_seen(tmp_path: Path) -> None:
    tensors = {
        f"{KEY}.embed_tokens.lora_embedding_A": np.zeros((3, 32), np.float32),
        f"{KEY}.embed_tokens.lora_embedding_B": np.zeros((16, 3), np.float32),
        f"{KEY}.layers.0.q.lora_magnitude_vector": np.zeros(8, np.float32),
        f"{KEY}.other.token_adapter.trainable_tokens_delta": np.zeros((5, 16), np.float32),
        **factors("layers.0.q"),
    }
    facts = inspect(tiny.make_adapter(tmp_path / "a", tensors)).adapter
    assert facts is not None
    assert facts.ranks == {3: 1, 4: 1}
    assert facts.adapted == {"embed_tokens": 1, "q": 1}
    assert (facts.dora, facts.token_rows) == (True, 5)


def test_experts_adapted_as_parameters_count_with_the_configs_rank(tmp_path: Path) -> None:
    """Two parameters of eight experts: A stacks all experts' ranks."""
    tensors = factors("layers.0.mlp.experts.base_layer", 32) | factors("layers.0.mlp.experts", 32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    facts = inspect(tiny.make_adapter(tmp_path / "a", tensors, target_parameters=names)).adapter
    assert facts is not None
    assert facts.ranks == {4: 2}
    assert facts.adapted == {"experts": 2}
    assert facts.target_parameters == tuple(names)


def test_a_regex_of_targets_stays_one_string(tmp_path: Path) -> None:
    facts = inspect(tiny.make_adapter(tmp_path / "a", target_modules=r".*\.q_proj")).adapter
    assert facts is not None
    assert facts.target_modules == r".*\.q_proj"


def test_an_adapters_name_left_in_the_keys_is_no_part_of_the_module(tmp_path: Path) -> None:
    tensors = {f"{KEY}.l.q.lora_A.default.weight": np.zeros((4, 8), np.float32)}
    facts = inspect(tiny.make_adapter(tmp_path / "a", tensors)).adapter
    assert facts is not None
    assert facts.adapted == {"q": 1}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"use_qalora": True}, "QALoRA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"peft_type": None}, "peft_type"),
    ],
)
def test_features_that_cannot_be_merged_are_named(
    tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    facts = inspect(tiny.make_adapter(tmp_path / "a", **config)).adapter
    assert facts is not None
    assert len(facts.unmergeable) == 1
    assert word in facts.unmergeable[0]


def test_the_adapters_weights_file_is_enough_to_name_it(tmp_path: Path) -> None:
    folder = tiny.make_adapter(tmp_path / "a")
    assert inspect(folder / "adapter_model.safetensors").kind == "adapter"


# ---- bad input


def test_all_config_values_of_the_wrong_kind_are_listed(tmp_path: Path) -> None:
    bad = {"r": "8", "lora_alpha": True, "modules_to_save": [1], "target_modules": 5}
    with pytest.raises(AdapterError) as caught:
        inspect(tiny.make_adapter(tmp_path / "a", **bad))
    wheres = " ".join(problem.where for problem in caught.value.problems)
    assert all(f"adapter_config.json, {name}" in wheres for name in bad)


def test_a_missing_path_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        inspect(tmp_path / "nothing")


def test_an_empty_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an empty folder"):
        inspect(tmp_path)


def test_a_truncated_file_is_a_format_error(tmp_path: Path) -> None:
    weights = tiny.make_base(tmp_path / "base") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(FormatError, match="cut short"):
        inspect(tmp_path / "base")


def test_gguf_that_is_cut_short_is_a_format_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="GGUF"):
        inspect(tmp_path / "model.gguf")


def test_what_the_system_refuses_is_an_access_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(inspection, "open_checkpoint", refuse)
    with pytest.raises(AccessError, match="Permission denied"):
        inspect(tiny.make_base(tmp_path / "base"))


# ---- the Hub


def as_from_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let every source be a Hub model whose small files lie in ``folder``."""

    def located(path: str, **_: object) -> Located:
        return Located(folder, path, "org/model", "c" * 40)

    monkeypatch.setattr(inspection, "locate", located)


def answer_headers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let the Hub answer a request for headers with a value, or with an error."""

    def headers(*_: object, **__: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", headers)


def test_a_base_on_the_hub_is_known_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    info = SimpleNamespace(dtype="BF16", shape=[4, 8], data_offsets=(0, 64))
    file = SimpleNamespace(tensors={"w": info})
    as_from_hub(monkeypatch, tmp_path)
    answer_headers(monkeypatch, SimpleNamespace(files_metadata={"model.safetensors": file}))
    found = inspect("org/model@main")
    assert (found.kind, found.source, found.revision) == ("base", "org/model@main", "c" * 40)
    assert (found.parameters, found.bytes) == (32, 64)
    assert found.files == (FileFacts("model.safetensors", 64, 1),)
    assert found.model is not None


def test_a_base_in_the_hubs_cache_needs_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_from_hub(monkeypatch, tiny.make_sharded_base(tmp_path / "base"))
    answer_headers(monkeypatch, AssertionError("asked the Hub"))
    assert inspect("org/model").parameters > 0


def test_headers_that_cannot_be_fetched_are_an_environment_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.make_sharded_base(tmp_path / "base")
    (base / "model-00002-of-00002.safetensors").unlink()
    as_from_hub(monkeypatch, base)
    answer_headers(monkeypatch, ConnectionError("no route\nmore"))
    with pytest.raises(EnvironmentShortfall, match=r"ConnectionError: no route[.]"):
        inspect("org/model")


def test_a_hub_model_without_safetensors_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import NotASafetensorsRepoError

    as_from_hub(monkeypatch, tmp_path)
    answer_headers(monkeypatch, NotASafetensorsRepoError("none"))
    with pytest.raises(InputError, match="neither an adapter nor a model in safetensors"):
        inspect("org/model")


# ---- the promise: headers only


def make_70b(folder: Path, shards: int = 30, layers: int = 80) -> Path:
    """Write the headers of a 70B model over sparse files: no disk, but the right sizes."""
    from regraft.formats.safetensors import build_header

    shapes = {"q": (8192, 8192), "o": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192)}
    shapes |= {"gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672)}
    shapes |= {"norm1": (8192,), "norm2": (8192,)}
    weight_map = {}
    folder.mkdir()
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = range(shard, layers, shards)
        tensors = [(f"layers.{n}.{key}", "BF16", s) for n in mine for key, s in shapes.items()]
        header = build_header(tensors, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * sum(math.prod(s) for _, _, s in tensors))
        weight_map |= dict.fromkeys((n for n, _, _ in tensors), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_sharded_70b_takes_under_a_second(tmp_path: Path) -> None:
    folder = make_70b(tmp_path / "70b")
    found = inspect(folder)
    assert len(found.files) == 30
    assert found.parameters > 65e9
    taken = seconds_of_cpu(lambda: inspect(folder))
    assert taken < 0.5 * seconds_of_cpu(work_to_compare)  # it is a tenth


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.formats.files.reading.FilePool.read_into", pytest.fail)
    assert inspect(tiny.make_base(tmp_path / "base")).kind == "base"
    assert inspect(tiny.make_adapter(tmp_path / "adapter")).kind == "adapter"


def test_bfloat16_is_counted_as_two_bytes(tmp_path: Path) -> None:
    folder = make_70b(tmp_path / "b", shards=1, layers=1)
    found = inspect(folder)
    assert [share.dtype for share in found.dtypes] == ["BF16"]
    assert found.bytes == 2 * found.parameters


def test_the_answer_is_json(tmp_path: Path) -> None:
    answer = json.loads(json.dumps(inspect(tiny.make_adapter(tmp_path / "a")).to_json()))
    assert answer["kind"] == "adapter"
    assert answer["adapter"]["scale"] == 2.0
    assert answer["model"] is None


def test_it_is_part_of_the_public_api() -> None:
    assert regraft.inspect is inspect
