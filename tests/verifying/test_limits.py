"""What verify lets pass as rounding, and what it does not: just inside and just outside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regraft
from merging import toys
from merging.quantized_bases import write_quantized
from merging.toys import BF16
from verifying.test_judge import FREE, NAMES, Tool, verdicts


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Tool:
    """A base in bfloat16, an adapter with small deltas, and a merge of them by another tool."""
    return Tool(tmp_path_factory.mktemp("tool"), size=0.01)


def shifted(tensor: np.ndarray, units: int = 1, count: int | None = None) -> np.ndarray:
    """Return a tensor whose first elements (all by default) are some units in the last place up."""
    found = tensor.copy()
    bits = found.reshape(-1).view({2: np.int16, 4: np.int32}[tensor.itemsize])
    bits[:count] += units
    return found


@pytest.mark.parametrize("count", [1, None], ids=["one element", "every element"])
@pytest.mark.parametrize("name", FREE)
def test_what_no_adapter_touches_may_not_be_off_by_one_unit(
    tool: Tool, name: str, count: int | None
) -> None:
    tensors = tool.merged()
    tensors[name] = shifted(tensors[name], 1, count)
    report = tool.judge(tensors)
    assert not report.ok
    told = verdicts(report)[name]
    assert told == "changed"
    assert {verdicts(report)[other] for other in FREE if other != name} == {"exact"}


def test_nor_where_a_wider_dtype_holds_the_bases_values_as_they_are(tool: Tool) -> None:
    tensors = tool.merged(stored=np.float32)
    assert tool.judge(tensors).ok
    tensors[FREE[0]] = shifted(tensors[FREE[0]], 1)
    assert verdicts(tool.judge(tensors))[FREE[0]] == "changed"


def test_it_may_where_another_dtype_had_to_round_it(tmp_path: Path) -> None:
    tool = Tool(tmp_path, np.float32, size=0.01)
    tensors = tool.merged(stored=BF16)
    tensors[FREE[0]] = shifted(tensors[FREE[0]], 1)
    report = tool.judge(tensors)
    assert verdicts(report)[FREE[0]] == "rounding"
    tensors[FREE[0]] = shifted(tensors[FREE[0]], 8)
    assert verdicts(tool.judge(tensors))[FREE[0]] == "changed"


@pytest.mark.parametrize("size", [0.001, 0.01])
def test_noise_shows_though_the_scale_is_right_and_each_element_is_near(
    tmp_path: Path, size: float
) -> None:
    """Every element is one unit off, up or down: a rounding moves few of them."""
    tool, rng = Tool(tmp_path, size=size), np.random.default_rng(3)
    tensors = tool.merged(coarse=False)
    assert tool.judge(tensors).ok
    for name in NAMES:
        bits = tensors[name].view(np.int16)
        bits += rng.choice(np.array([-1, 1], np.int16), size=bits.shape)
    report = tool.judge(tensors)
    assert {verdicts(report)[name] for name in NAMES} == {"another-adapter"}
    assert max(t.ulps or 0 for t in report.tensors) <= 1
    if size == 0.01:  # enough of the delta is left to measure it
        assert all(abs(t.coefficient - 1) < 0.05 for t in report.tensors if t.coefficient)


@pytest.mark.parametrize("times", [1.03, 0.97])
def test_a_scale_that_is_three_hundredths_off_is_told(tmp_path: Path, times: float) -> None:
    tool = Tool(tmp_path, np.float32, size=0.3)
    report = tool.judge(tool.merged({NAMES[1]: times}, coarse=False))
    assert {n: v for n, v in verdicts(report).items() if n in NAMES} == {
        name: "scale" if name == NAMES[1] else verdicts(report)[name] for name in NAMES
    }
    assert verdicts(report)[NAMES[1]] == "scale"
    found = next(t for t in report.tensors if t.name == NAMES[1])
    assert found.coefficient == pytest.approx(times, abs=0.002)


def test_what_is_like_another_tensor_is_not_called_swapped(tool: Tool) -> None:
    tensors = tool.merged()
    first, second = NAMES[0], NAMES[2]
    mine, other = tensors[first].astype(np.float32), tensors[second].astype(np.float32)
    tensors[first], tensors[second] = (1.1 * other).astype(BF16), (0.9 * mine).astype(BF16)
    report = tool.judge(tensors)
    assert {verdicts(report)[name] for name in (first, second)} == {"other"}
    tensors[first], tensors[second] = (1.005 * other).astype(BF16), mine.astype(BF16)
    report = tool.judge(tensors)
    assert {verdicts(report)[name] for name in (first, second)} == {"swapped"}


def test_a_base_with_one_tensor_changed_is_not_called_the_base(tool: Tool) -> None:
    tensors = tool.merged(0.0)
    assert tool.judge(tensors).conclusions[0].startswith("this is the base")
    tensors[FREE[0]] = shifted(tensors[FREE[0]])
    report = tool.judge(tensors)
    assert verdicts(report)[FREE[0]] == "changed"
    assert not any("this is the base" in said for said in report.conclusions)


def test_a_base_whose_digits_were_cut_off_has_no_delta(tmp_path: Path) -> None:
    """It is off by up to a unit everywhere, and none of it is the delta's."""
    tool = Tool(tmp_path, np.float32, size=0.3)
    tensors = tool.merged(stored=BF16)
    words = tool.weights[NAMES[1]].view(np.uint32) >> 16
    tensors[NAMES[1]] = words.astype(np.uint16).view(BF16)
    report = tool.judge(tensors)
    told = {name: verdict for name, verdict in verdicts(report).items() if name in NAMES}
    assert told == {name: "missing" if name == NAMES[1] else "rounding" for name in NAMES}


def test_a_whole_module_is_measured_against_the_bases(tmp_path: Path) -> None:
    base, out = toys.write_base(tmp_path / "base"), tmp_path / "out"
    name, head = "lm_head.weight", toys.draw(toys.VOCAB, toys.HIDDEN, seed=5)
    head = (toys.load(base)[name].astype(np.float32) + 0.1 * head).astype(np.float32)
    trained = toys.attention() | {f"{toys.PREFIX}{name}": head}
    adapter = toys.write_adapter(tmp_path / "adapter", trained, modules_to_save=["lm_head"])
    regraft.merge(base, adapter, out, dtype="float32", undo=False)
    found = {}
    for what, values in {
        "rounding": head.astype(BF16), "missing": toys.load(base)[name],
        "scale": toys.load(base)[name] + np.float32(3) * (head - toys.load(base)[name]),
    }.items():  # fmt: skip
        tensors = toys.load(out) | {name: values.astype(np.float32)}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        report = regraft.verify(out, base=base, adapters=adapter)
        found[what] = verdicts(report)[name]
    assert found == {what: what for what in found}


def test_one_code_that_is_another_is_told(tmp_path: Path) -> None:
    base, out = write_quantized(tmp_path / "base", "nf4"), tmp_path / "out"
    adapter = toys.write_adapter(tmp_path / "adapter")
    regraft.merge(base, adapter, out, quantize="keep", undo=False)
    report = regraft.verify(out, base=base, adapters=adapter)
    assert report.verdict == "exact", report.conclusions
    touched, free = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qo")
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name in {touched, free} & tensors.keys():
            tensors[name].reshape(-1)[0] ^= 1
        save_file(tensors, path, {"format": "pt"})
    report = regraft.verify(out, base=base, adapters=adapter)
    told = {name: verdict for name, verdict in verdicts(report).items() if verdict != "exact"}
    assert told == {touched: "other", free: "changed"}


GROWN = toys.VOCAB + 6


def with_more_tokens(folder: Path) -> Path:
    """Write an adapter that brings both embeddings with more rows."""
    tables = {
        f"{toys.PREFIX}{name}.weight": toys.draw(GROWN, toys.HIDDEN, seed=seed)
        for seed, name in enumerate([toys.EMBED, "lm_head"])
    }
    saved = ["embed_tokens", "lm_head"]
    return toys.write_adapter(folder, toys.attention() | tables, modules_to_save=saved)


@pytest.mark.parametrize("said", [toys.VOCAB, None], ids=["the base's", "not there"])
def test_the_config_has_to_say_how_large_the_vocabulary_is(
    tmp_path: Path, said: int | None
) -> None:
    base, out = toys.write_base(tmp_path / "base"), tmp_path / "out"
    adapter = with_more_tokens(tmp_path / "adapter")
    regraft.merge(base, adapter, out)
    shutil.rmtree(out / "regraft")
    assert regraft.verify(out, base=base, adapters=adapter).ok
    config: dict[str, Any] = toys.read_json(out / "config.json")
    assert config.pop("vocab_size") == GROWN
    toys.write_json(out / "config.json", config | ({"vocab_size": said} if said else {}))
    report = regraft.verify(out, base=base, adapters=adapter)
    assert not report.ok
    assert [str(difference) for difference in report.differences] == [
        f"config.json: vocab_size is {said}, and the merge makes it {GROWN}"
    ]
