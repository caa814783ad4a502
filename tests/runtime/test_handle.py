"""The handle: names, choices, scopes, merges; what is refused leaves everything as it was."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regraft
from faithful.cases import lora
from faithful.harness import Workshop
from regraft.testing import zoo
from runtime.live import distance, losses_of, no_trace

ROWS = 3


@pytest.fixture
def model(workshop: Workshop) -> Any:
    return zoo.load_base(workshop.base("llama"))


@pytest.fixture
def paths(workshop: Workshop) -> list[Path]:
    base = workshop.base("llama")
    return [
        workshop.adapter(base, lora(), 1),
        workshop.adapter(base, lora(["q_proj", "down_proj"], r=7, use_dora=True), 2),
        workshop.adapter(base, lora(["v_proj"], modules_to_save=["lm_head"]), 3),
    ]


@pytest.fixture
def adapters(model: Any, paths: list[Path]) -> regraft.Adapters:
    handle = regraft.attach(model, paths[0], "a")
    handle.load_adapter(paths[1], "b")
    handle.load_adapter(paths[2], "c")
    return handle


def answer(model: Any) -> np.ndarray:
    ids = torch.arange(ROWS * 7).reshape(ROWS, 7) % zoo.VOCAB
    return zoo.logits(model, {"input_ids": ids})


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[n], before[n]) for n in before)


# names


def test_the_first_adapter_answers_and_others_wait(model: Any, paths: list[Path]) -> None:
    base = answer(model)
    handle = regraft.attach(model, paths[0], "a")
    first = answer(model)
    handle.load_adapter(paths[1], "b")
    assert handle.names == ("a", "b")
    assert handle.active_adapters == ["a"]
    assert not np.array_equal(first, base)
    assert np.array_equal(answer(model), first)
    assert repr(handle) == "Adapters(a, b; active: 'a')"


def test_a_model_has_one_handle_which_can_be_found(model: Any, paths: list[Path]) -> None:
    assert regraft.handle_of(model) is None
    handle = regraft.attach(model)
    assert regraft.handle_of(model) is handle
    with pytest.raises(regraft.UsageError, match="attached already"):
        regraft.attach(model, paths[0])
    assert handle.detach() is model
    assert regraft.handle_of(model) is None
    regraft.attach(model, paths[0]).detach()


def test_a_handle_that_was_detached_says_so(adapters: regraft.Adapters) -> None:
    adapters.detach()
    with pytest.raises(regraft.UsageError, match=r"taken off this model.*regraft\.attach"):
        adapters.set_adapter("a")


def test_a_name_is_taken_once(adapters: regraft.Adapters, paths: list[Path]) -> None:
    before = answer(adapters.model)
    with pytest.raises(regraft.UsageError, match="of this name already"):
        adapters.load_adapter(paths[1], "a")
    assert adapters.names == ("a", "b", "c")
    assert np.array_equal(answer(adapters.model), before)


UNKNOWN: dict[str, Any] = {
    "set_adapter": lambda a: a.set_adapter("d"),
    "mix": lambda a: a.set_adapter({"a": 1.0, "d": 0.5}),
    "using": lambda a: a.using("d").__enter__(),
    "rows": lambda a: a.rows(["a", "d", None]).__enter__(),
    "delete": lambda a: a.delete_adapter("d"),
    "merge": lambda a: a.merge_adapter("d"),
    "adapter": lambda a: a.adapter("d"),
}


@pytest.mark.parametrize("call", UNKNOWN)
def test_an_unknown_name_is_refused_with_those_there_are(
    call: str, adapters: regraft.Adapters
) -> None:
    before = answer(adapters.model)
    with pytest.raises(regraft.UsageError, match=r"'d'.*no adapter of this name.*'a', 'b', 'c'"):
        UNKNOWN[call](adapters)
    assert np.array_equal(answer(adapters.model), before)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", True])
def test_a_weight_has_to_be_a_number(weight: Any, adapters: regraft.Adapters) -> None:
    with pytest.raises(regraft.UsageError, match="weight has to be a number"):
        adapters.set_adapter({"a": weight})
    with pytest.raises(regraft.UsageError, match="named twice"):
        adapters.set_adapter(["a", "a"])


def test_what_answers_is_not_deleted(adapters: regraft.Adapters) -> None:
    with pytest.raises(regraft.UsageError, match="answers now"):
        adapters.delete_adapter("a")
    with adapters.using("b"), pytest.raises(regraft.UsageError, match="answers now"):
        adapters.delete_adapter("b")
    with adapters.using("b"), pytest.raises(regraft.UsageError, match="answers now"):
        adapters.delete_adapter("a")  # what answers for all others
    adapters.delete_adapter("b")
    assert adapters.names == ("a", "c")
    adapters.set_adapter(None)
    adapters.delete_adapter("a")


def test_a_failing_load_changes_nothing(
    adapters: regraft.Adapters, paths: list[Path], tmp_path: Path
) -> None:
    before = answer(adapters.model)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((paths[0] / name).read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with no_trace(adapters.model), pytest.raises(regraft.FormatError):
        adapters.load_adapter(tmp_path, "d")
    weights.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")  # a NaN
    with no_trace(adapters.model), pytest.raises(regraft.AdapterError, match="NaN"):
        adapters.load_adapter(tmp_path, "d")
    assert adapters.names == ("a", "b", "c")
    assert np.array_equal(answer(adapters.model), before)


def test_adapters_that_replace_the_same_layer_do_not_mix(
    adapters: regraft.Adapters, workshop: Workshop
) -> None:
    base = workshop.base("llama")
    adapters.load_adapter(
        workshop.adapter(base, lora(["q_proj"], modules_to_save=["lm_head"])), "d"
    )
    with pytest.raises(regraft.MismatchError, match="lm_head"):
        adapters.set_adapter(["c", "d"])
    assert adapters.active_adapters == ["a"]


# choices


def test_a_scope_wins_over_the_default_and_ends(adapters: regraft.Adapters) -> None:
    model = adapters.model
    default = answer(model)
    with adapters.using("b"):
        inner = answer(model)
        with adapters.disable_adapter():
            assert adapters.active_adapters == []
            base = answer(model)
        assert np.array_equal(answer(model), inner)
    assert np.array_equal(answer(model), default)
    adapters.set_adapter("b")
    assert np.array_equal(answer(model), inner)
    adapters.set_adapter(None)
    assert np.array_equal(answer(model), base)


def test_a_scope_is_of_its_thread_alone(adapters: regraft.Adapters) -> None:
    default = answer(adapters.model)
    seen: list[np.ndarray] = []
    with adapters.using("b"):
        thread = threading.Thread(target=lambda: seen.append(answer(adapters.model)))
        thread.start()
        thread.join()
        assert not np.array_equal(answer(adapters.model), seen[0])
    assert np.array_equal(seen[0], default)


def test_a_batch_of_another_length_than_the_rows_is_refused(adapters: regraft.Adapters) -> None:
    with adapters.rows(["a", None]), pytest.raises(regraft.UsageError, match=r"2 rows.*batch of 3"):
        answer(adapters.model)
    with pytest.raises(regraft.UsageError, match="no rows"), adapters.rows([]):
        pass
    answer(adapters.model)


# merges


@pytest.mark.parametrize("choice", ["a", "b", "c", {"a": 0.5, "b": -1.5}])
def test_merged_it_answers_as_live_and_unmerged_every_bit_is_back(
    choice: Any, adapters: regraft.Adapters
) -> None:
    model = adapters.model
    before = bits(model)
    with adapters.using(choice):
        live = answer(model)
    report = adapters.merge_adapter(choice)
    assert report.undo_bytes > 0
    assert adapters.merged_adapters == list(choice)
    assert distance(answer(model), live) <= 1e-5
    adapters.unmerge_adapter()
    assert same_bits(model, before)
    with adapters.using(choice):
        assert np.array_equal(answer(model), live)


def test_merged_bits_are_those_of_the_merge_on_files(
    adapters: regraft.Adapters, paths: list[Path], workshop: Workshop, tmp_path: Path
) -> None:
    regraft.merge(workshop.base("llama"), paths[0], tmp_path / "merged", dtype="float32")
    adapters.merge_adapter("a")
    merged = zoo.load_base(tmp_path / "merged")
    ours = adapters.model.state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, ours[name]), name


def test_what_is_merged_has_to_be_taken_out_first(adapters: regraft.Adapters) -> None:
    adapters.merge_adapter("a")
    merged = answer(adapters.model)
    for call in (
        lambda: adapters.merge_adapter("b"),
        lambda: adapters.set_adapter("b"),
        lambda: adapters.using("b").__enter__(),
        lambda: adapters.rows(["a", "b", "c"]).__enter__(),
    ):
        with pytest.raises(regraft.UsageError, match="merged into the weights"):
            call()
    with pytest.raises(regraft.UsageError, match="answers now"):
        adapters.delete_adapter("a")
    assert np.array_equal(answer(adapters.model), merged)
    adapters.unmerge_adapter()
    with pytest.raises(regraft.UsageError, match="no adapter is merged"):
        adapters.unmerge_adapter()


def test_disabled_while_merged_the_base_answers_and_the_merge_is_back(
    adapters: regraft.Adapters,
) -> None:
    model = adapters.model
    with adapters.disable_adapter():
        base = answer(model)
    adapters.merge_adapter("a")
    merged = bits(model)
    with adapters.disable_adapter():
        assert np.array_equal(answer(model), base)
    assert same_bits(model, merged)


def test_swapping_gives_the_bits_of_the_other_merge(adapters: regraft.Adapters) -> None:
    model = adapters.model
    before = bits(model)
    adapters.merge_adapter("b")
    wanted = bits(model)
    adapters.unmerge_adapter()
    adapters.merge_adapter("a")
    with pytest.raises(regraft.UsageError, match="not what is merged"):
        adapters.swap_adapter("c", "b")
    adapters.swap_adapter("a", "b")
    assert same_bits(model, wanted)
    assert adapters.merged_adapters == ["b"]
    adapters.unmerge_adapter()
    assert same_bits(model, before)


def test_nothing_that_answers_cannot_be_merged(adapters: regraft.Adapters) -> None:
    adapters.set_adapter(None)
    with pytest.raises(regraft.UsageError, match="none can be merged"):
        adapters.merge_adapter()


def test_unloaded_after_a_merge_it_is_a_plain_model(adapters: regraft.Adapters) -> None:
    model = adapters.model
    with adapters.using(["a", "b"]):
        live = answer(model)
    plain = adapters.merge_and_unload(["a", "b"])
    assert plain is model
    assert distance(answer(model), live) <= 1e-5
    assert regraft.handle_of(model) is None
    assert not any(len(m._forward_hooks) for m in model.modules())


def test_detached_while_merged_the_base_is_back(adapters: regraft.Adapters) -> None:
    model = adapters.model
    with adapters.disable_adapter():
        base = answer(model)
    adapters.merge_adapter("a")
    adapters.detach()
    assert np.array_equal(answer(model), base)


# the cache


def test_with_a_cache_answers_are_the_same_and_the_cap_holds(model: Any, paths: list[Path]) -> None:
    handle = regraft.attach(model)
    expected = []
    for number, path in enumerate(paths):
        handle.load_adapter(path, f"x{number}")
        with handle.using(f"x{number}"):
            expected.append(answer(model))
    sizes = [handle.adapter(f"x{n}").nbytes for n in range(len(paths))]
    handle.detach()
    cache = regraft.AdapterCache(max(sizes) + min(sizes))
    cached = regraft.attach(model, cache=cache)
    for number, path in enumerate(paths):
        cached.load_adapter(path, f"x{number}")
    assert cache.loaded() == ()
    for number in (0, 1, 2, 1, 0, 0, 2):
        with cached.using(f"x{number}"):
            assert np.array_equal(answer(model), expected[number])
    stats = cache.stats()
    assert stats.peak_bytes <= cache.max_bytes
    assert stats.evictions > 0
    assert stats.hits > 0
    cached.detach()
    assert cache.stats().nbytes == 0


def test_an_adapter_that_answers_stays_and_one_that_does_not_fit_is_refused(
    model: Any, paths: list[Path]
) -> None:
    size = (paths[0] / "adapter_model.safetensors").stat().st_size
    cached = regraft.attach(model, cache=regraft.AdapterCache(size, timeout=0.1))
    cached.load_adapter(paths[0], "a")
    cached.load_adapter(paths[1], "b")
    cached.set_adapter("a")
    default = answer(model)
    with pytest.raises(regraft.MemoryCapError), cached.using("b"):
        pass
    with pytest.raises(regraft.MemoryCapError), cached.rows(["a", "b", None]):
        pass
    assert np.array_equal(answer(model), default)
    cached.set_adapter(None)
    with cached.using("b"):
        assert not np.array_equal(answer(model), default)


def test_with_a_cache_misfits_are_found_when_an_adapter_is_loaded(
    model: Any, workshop: Workshop
) -> None:
    foreign = workshop.adapter(workshop.base("gpt2"), lora(["c_attn"]))
    cached = regraft.attach(model, cache=regraft.AdapterCache("1MB"))
    with pytest.raises(regraft.MismatchError, match="c_attn"):
        cached.load_adapter(foreign, "foreign")
    assert cached.names == ()


# what an adapter remembers of its base


def test_another_base_is_noticed(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    model = zoo.load_base(base)
    regraft.save(regraft.attach(model, workshop.adapter(base, lora())), tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regraft.attach(zoo.load_base(base), tmp_path / "saved")
    other = zoo.load_base(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())
    with pytest.warns(regraft.BaseMismatchWarning, match="other weights"):
        regraft.attach(other, tmp_path / "saved")


# training


def test_what_is_attached_from_a_config_is_trained_and_nothing_else(model: Any) -> None:
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = regraft.attach(model, regraft.LoraConfig(r=4, target_modules="all-linear"))
    base = bits(model)
    losses = losses_of(model, handle, steps=5)
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())
    assert same_bits(model, base)
    handle.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required


def test_trained_with_regraft_it_answers_the_same_in_peft(
    workshop: Workshop, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = workshop.base("llama")
    model = zoo.load_base(base)
    config = regraft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True,
        modules_to_save=["lm_head"], rank_pattern={"down_proj": 3},
    )  # fmt: skip
    handle = regraft.attach(model, config, "new")
    losses_of(model, handle, steps=4, rate=3e-2)
    live = answer(model)
    regraft.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["use_dora"]
    theirs = PeftModel.from_pretrained(zoo.load_base(base), tmp_path / "saved")
    assert distance(answer(theirs), live) <= 1e-5
    handle.detach()
    regraft.attach(model, tmp_path / "saved")
    assert np.array_equal(answer(model), live)
