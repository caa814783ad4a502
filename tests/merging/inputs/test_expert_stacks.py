"""Stacks of experts whose sizes do not tell how their factors lie, or that say how B is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.merging.inputs.expert_stacks import by_version

EXPERTS, RANK, SIZE = 3, 2, 8
ALPHA = 2  # a scale of one
MOE = "model.layers.0.mlp.experts"
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": EXPERTS,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def write_base(folder: Path, down: tuple[int, int] = (SIZE, SIZE), *, single: bool = False) -> Path:
    """Write a base with square gate_up_proj (experts, 8, 8) and a down_proj of other sizes."""
    stacks = {
        "gate_up_proj": toys.draw(EXPERTS, SIZE, SIZE),
        "down_proj": toys.draw(EXPERTS, *down),
    }
    tensors = {f"{MOE}.{name}": value for name, value in stacks.items()}
    if single:
        old = "model.layers.0.block_sparse_moe.experts"
        half = SIZE // 2
        tensors = {}
        for e in range(EXPERTS):
            tensors[f"{old}.{e}.w1.weight"] = stacks["gate_up_proj"][e, :half]
            tensors[f"{old}.{e}.w3.weight"] = stacks["gate_up_proj"][e, half:]
            tensors[f"{old}.{e}.w2.weight"] = stacks["down_proj"][e]
    return toys.write_base(folder, tensors, CONFIG)


def factors(key: str, first: int, second: int) -> dict[str, Any]:
    """Return A (experts * r, first) and B (second, r * experts)."""
    return {
        f"{toys.PREFIX}{key}.lora_A.weight": toys.draw(EXPERTS * RANK, first, seed=len(key)),
        f"{toys.PREFIX}{key}.lora_B.weight": toys.draw(second, RANK * EXPERTS, seed=len(key)),
    }


def write_adapter(folder: Path, *pairs: dict[str, Any], **config: Any) -> Path:
    names = [f"{MOE}.gate_up_proj", f"{MOE}.down_proj"][: len(pairs)]
    chosen = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [], "target_parameters": names}
    tensors = {key: value for pair in pairs for key, value in pair.items()}
    return toys.write_adapter(folder, tensors, **chosen | config)


def delta(pair: dict[str, Any], *, flipped: bool, by_expert: bool = False) -> np.ndarray:
    """Return the deltas (experts, rows, columns) by the two formulas of PEFT's releases."""
    a, b = pair.values()
    a = a.reshape(EXPERTS, RANK, -1)
    b = b.reshape(-1, EXPERTS, RANK).swapaxes(1, 2) if by_expert else b.reshape(-1, RANK, EXPERTS)
    return np.einsum("ore,eri->eio" if flipped else "ore,eri->eoi", b, a)


def merged_delta(base: Path, adapter: Path, out: Path, name: str = "gate_up_proj") -> np.ndarray:
    regraft.merge(base, adapter, out)
    return toys.load(out)[f"{MOE}.{name}"] - toys.load(base)[f"{MOE}.{name}"]


GATE = factors(MOE, SIZE, SIZE)


@pytest.mark.parametrize(
    ("version", "flipped"),
    [("0.17.0", True), ("0.18.1", True), ("0.19.1", False), ("0.21.2", False), ("1.0.0", False)],
)
def test_a_square_stack_lies_as_in_the_release_that_wrote_it(
    tmp_path: Path, version: str, flipped: bool
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", GATE, peft_version=version)
    found = merged_delta(base, adapter, tmp_path / "out")
    np.testing.assert_allclose(found, delta(GATE, flipped=flipped), atol=1e-5)


def test_a_square_stack_lies_as_in_that_release_where_experts_are_apart(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", single=True)
    adapter = write_adapter(tmp_path / "a", GATE, peft_version="0.18.0")
    regraft.merge(base, adapter, tmp_path / "out")
    expected = delta(GATE, flipped=True)
    for name, rows in (("w1", slice(0, 4)), ("w3", slice(4, 8))):
        key = f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"
        found = toys.load(tmp_path / "out")[key] - toys.load(base)[key]
        np.testing.assert_allclose(found, expected[1, rows], atol=1e-5)


@pytest.mark.parametrize("flipped", [True, False])
def test_a_stack_of_other_sizes_tells_for_the_square_one(tmp_path: Path, flipped: bool) -> None:
    base = write_base(tmp_path / "base", (SIZE, 6))
    inner = {k.replace(MOE, f"{MOE}.base_layer"): v for k, v in GATE.items()}
    outer = factors(MOE, *((SIZE, 6) if flipped else (6, SIZE)))
    adapter = write_adapter(tmp_path / "a", inner, outer)  # no peft_version
    found = merged_delta(base, adapter, tmp_path / "out")
    np.testing.assert_allclose(found, delta(inner, flipped=flipped), atol=1e-5)


@pytest.mark.parametrize("version", [None, "0.19.0", "0.18.2.dev0@1a2b3c", "nightly"])
def test_a_square_stack_of_an_unknown_release_is_refused(
    tmp_path: Path, version: str | None
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", GATE, peft_version=version)
    report = regraft.check(base, adapter)
    assert [problem.what.partition(":")[0] for problem in report.problems] == [
        "it cannot be told which way these factors of square experts lie"
    ]
    assert "--peft-version 0.18.0" in report.problems[0].hint
    assert regraft.check(base, adapter, peft_version="0.18.0").ok


@pytest.mark.parametrize(("version", "flipped"), [("0.18", True), ("0.21.2", False)])
def test_a_square_stack_lies_as_in_the_release_that_is_told(
    tmp_path: Path, version: str, flipped: bool
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", GATE)
    receipt = regraft.merge(base, adapter, tmp_path / "out", peft_version=version)
    found = toys.load(tmp_path / "out")[f"{MOE}.gate_up_proj"]
    added = found - toys.load(base)[f"{MOE}.gate_up_proj"]
    np.testing.assert_allclose(added, delta(GATE, flipped=flipped), atol=1e-5)
    assert receipt.options["peft_version"] == version
    assert regraft.plan(base, adapter, peft_version=version).options["peft_version"] == version


def test_the_config_is_believed_before_what_is_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", GATE, peft_version="0.18.0")
    regraft.merge(base, adapter, tmp_path / "out", peft_version="0.19.1")
    found = toys.load(tmp_path / "out")[f"{MOE}.gate_up_proj"]
    added = found - toys.load(base)[f"{MOE}.gate_up_proj"]
    np.testing.assert_allclose(added, delta(GATE, flipped=True), atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_what_was_told_is_remembered_to_take_the_merge_back(tmp_path: Path, keep: bool) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", GATE)
    other = write_adapter(tmp_path / "b", factors(MOE, SIZE, SIZE), lora_alpha=5)
    merged = tmp_path / "out"
    regraft.merge(base, adapter, merged, peft_version="0.18.0", keep_adapter=keep)
    given = None if keep else adapter
    regraft.unmerge(merged, tmp_path / "back", adapters=given)
    assert toys.tree(tmp_path / "back") == toys.tree(base)
    swapped = {"merged_adapters": given, "peft_version": "0.19.1"}
    regraft.swap(merged, other, tmp_path / "swapped", **swapped)
    regraft.merge(base, other, tmp_path / "direct", peft_version="0.19.1")
    name = "model.safetensors"
    assert (tmp_path / "swapped" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


@pytest.mark.parametrize("version", ["0.19.0", "banana", ""])
def test_a_release_that_tells_nothing_is_refused(tmp_path: Path, version: str) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "a", GATE)
    with pytest.raises(regraft.UsageError, match=r"0\.18\.0, or 0\.19\.1"):
        regraft.merge(base, adapter, tmp_path / "out", peft_version=version)


@pytest.mark.parametrize(("version", "flipped"), [("0.18.0", True), ("0.19.1", False)])
def test_a_square_stack_lies_as_told_in_memory(tmp_path: Path, version: str, flipped: bool) -> None:
    torch = pytest.importorskip("torch")

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(EXPERTS, SIZE, SIZE))

    model = torch.nn.Module()
    model.experts = Experts()
    pair = {key.replace(MOE, "experts"): value for key, value in GATE.items()}
    adapter = toys.write_adapter(
        tmp_path / "a", pair, r=RANK, lora_alpha=ALPHA, target_modules=[],
        target_parameters=["experts.gate_up_proj"],
    )  # fmt: skip
    with pytest.raises(regraft.MismatchError, match="cannot be told which way"):
        regraft.attach(model, adapter)
    regraft.attach(model, adapter, peft_version=version).merge_adapter()
    found = model.experts.gate_up_proj.detach().numpy()
    np.testing.assert_allclose(found, delta(GATE, flipped=flipped), atol=1e-5)


def test_modules_that_store_input_first_have_one_layout_in_all_releases_but_one() -> None:
    assert (
        by_version(None, True) is by_version("0.18.0", True) is by_version("0.19.1", True) is True
    )
    assert by_version("0.19.0", True) is None


@pytest.mark.parametrize("where", ["flat", "by parameter", "auto_mapping"])
def test_b_packed_expert_by_expert_is_read_as_declared(tmp_path: Path, where: str) -> None:
    said: dict[str, Any] = {"lora_B_layout": "grouped_by_expert"}
    detail = {"parameters": {"gate_up_proj": said}, "lora_A_layout": "grouped_by_expert"}
    config = {
        "flat": said,
        "by parameter": {"unsloth_fused_expert_lora": detail},
        "auto_mapping": {"auto_mapping": {"unsloth_fixed": True, **said}},
    }[where]
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", GATE, peft_version="0.21.0", **config)
    found = merged_delta(base, adapter, tmp_path / "out")
    np.testing.assert_allclose(found, delta(GATE, flipped=False, by_expert=True), atol=1e-5)


def test_a_smaller_rank_keeps_the_packing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "a", GATE, peft_version="0.21.0", lora_B_layout="grouped_by_expert"
    )
    before = merged_delta(base, adapter, tmp_path / "out")
    report = regraft.shrink(adapter, tmp_path / "small", rank=1, dtype="float32")
    after = merged_delta(base, tmp_path / "small", tmp_path / "small-out")
    error = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert error == pytest.approx(report.modules[0].error_norm / report.modules[0].delta_norm, 1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_B_layout": "interleaved"},
        {"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": {"lora_B_layout": "mixed"}}}},
        {"unsloth_fused_expert_lora": {"lora_A_layout": "rank_major"}},
        {"unsloth_fused_expert_lora": True},
        {
            "lora_B_layout": "rank_major",
            "unsloth_fused_expert_lora": {"lora_B_layout": "grouped_by_expert"},
        },
    ],
)
def test_an_unknown_or_contradictory_packing_is_refused(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", GATE, peft_version="0.21.0", **config)
    with pytest.raises(regraft.AdapterError, match=r"lora_B_layout|unsloth_fused_expert_lora"):
        regraft.merge(base, adapter, tmp_path / "out")


def test_unsloths_adapters_that_do_not_say_how_b_is_packed_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    unmarked = {"peft_version": "0.18.1", "auto_mapping": {"unsloth_fixed": True}}
    adapter = write_adapter(tmp_path / "a", GATE, **unmarked)
    report = regraft.check(base, adapter)
    assert "how B packs its experts" in report.problems[0].what
    assert "lora_B_layout" in report.problems[0].hint
    told = write_adapter(tmp_path / "b", GATE, **unmarked, lora_B_layout="rank_major")
    assert regraft.check(base, told).ok


def test_settings_that_are_on_and_not_known_are_named(tmp_path: Path, base: Path) -> None:
    config = {"use_scaled_delta": True, "delta_gain": 4.0, "another": False, "note": None}
    adapter = toys.write_adapter(tmp_path / "a", **config)
    named = "'delta_gain', 'use_scaled_delta'"
    assert [named in w for w in regraft.check(base, adapter).warnings] == [True]
    assert [named in w for w in regraft.merge(base, adapter, tmp_path / "out").warnings] == [True]
    facts = regraft.inspect(adapter).adapter
    assert facts is not None
    assert facts.unknown_settings == ("delta_gain", "use_scaled_delta")


def test_every_setting_of_the_installed_peft_is_known() -> None:
    peft = pytest.importorskip("peft")
    from regraft.adapters.known_settings import unknown_settings

    fields = dict.fromkeys(peft.LoraConfig(r=4).to_dict(), "on")
    assert unknown_settings(fields) == ()


GPT_OSS = CONFIG | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}


@pytest.mark.parametrize("version", [None, "0.18.0", "0.21.2"])
def test_a_square_stack_of_a_model_that_stores_input_first_lies_so(
    tmp_path: Path, version: str | None
) -> None:
    stack = {f"{MOE}.gate_up_proj": toys.draw(EXPERTS, SIZE, SIZE)}
    base = toys.write_base(tmp_path / "base", stack, GPT_OSS)
    said = {"peft_version": version} if version else {}
    adapter = write_adapter(tmp_path / "a", GATE, **said)
    found = merged_delta(base, adapter, tmp_path / "out")
    np.testing.assert_allclose(found, delta(GATE, flipped=True), atol=1e-5)


@pytest.mark.parametrize(("config", "flipped"), [(CONFIG, False), (GPT_OSS, True)])
def test_a_single_square_expert_lies_in_its_stack_as_the_model_stores_it(
    tmp_path: Path, config: dict[str, Any], flipped: bool
) -> None:
    stack = {f"{MOE}.down_proj": toys.draw(EXPERTS, SIZE, SIZE)}
    base = toys.write_base(tmp_path / "base", stack, config)
    pair = toys.lora(f"{MOE}.1.down_proj", SIZE, SIZE, RANK)
    adapter = toys.write_adapter(
        tmp_path / "a", pair, r=RANK, lora_alpha=ALPHA, target_modules=["down_proj"]
    )
    found = merged_delta(base, adapter, tmp_path / "out", "down_proj")
    a, b = pair.values()
    np.testing.assert_allclose(found[1], (b @ a).T if flipped else b @ a, atol=1e-5)
    assert not found[[0, 2]].any()
