"""Merges in memory have the bits of merges on files, and taking them back gives the base's bits."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from faithful import cases
from faithful.cases import ATTENTION, MIXTRAL_EXPERTS, TOY_CONVS, lora, one
from faithful.harness import Case, Workshop
from regraft.errors import (
    AdapterError,
    MismatchError,
    NumericError,
    UnsupportedError,
    UsageError,
)
from regraft.merging.compute.step_math import StepMath
from regraft.runtime.in_place.merge import Merged
from regraft.runtime.in_place.pool import run_all
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter, adapter_of
from runtime.in_memory import (
    adapters_of,
    assert_same,
    bits,
    identities,
    live_base,
    load,
    merge,
    merged_files,
    state_bits,
    swap,
)

CASES = [
    one("llama", "lora", lora()),
    one("llama", "float32", lora(), dtype="float32"),
    one("llama", "float16", lora(use_dora=True), dtype="float16"),
    one("llama", "rslora-dora", lora(use_dora=True, use_rslora=True, **cases.PATTERNS)),
    one("phi3", "fused", lora()),
    one("gpt2", "conv1d-dora-bias", lora(["c_attn", "c_fc"], use_dora=True, bias="all")),
    one("gpt2", "pissa", lora(init_lora_weights="pissa")),
    one("llama", "olora", lora(init_lora_weights="olora")),
    one("qwen2_tied", "lora-bias", lora(["q_proj", "v_proj"], lora_bias=True)),
    one("llama", "embedding-dora", lora(["embed_tokens", "lm_head", "q_proj"], use_dora=True)),
    one("llama", "token-rows", lora(["q_proj"], trainable_token_indices=[5, 33])),
    one("llama", "saved", lora(["q_proj"], modules_to_save=["lm_head", "norm"])),
    one("llama_tied", "one-side", lora(["q_proj", "lm_head"])),
    one("llama_tied", "embedding", lora(["embed_tokens"])),
    one("llama_tied", "token-rows", lora(["q_proj"], trainable_token_indices=[5, 33])),
    one("llama_tied", "saved-head", lora(["q_proj"], modules_to_save=["lm_head"])),
    one("bert_seqcls", "task", lora(["query"], task_type="SEQ_CLS")),
    one("mixtral", "experts", lora(ATTENTION, target_parameters=MIXTRAL_EXPERTS)),
    one("gpt_oss", "experts", lora([], target_parameters=MIXTRAL_EXPERTS)),
    one("toynet", "convolutions", lora([*TOY_CONVS, "head"], use_dora=True)),
    one("toynet", "attention", lora(["attention"])),
    one("t5", "lora", lora()),
    one("llava", "lora", lora(), sharded=True),
    Case("llama", "weighted", (lora(), lora(["q_proj", "up_proj"], r=3)), (0.25, -1.5)),
    Case("toynet", "weighted", (lora(TOY_CONVS), lora(["conv2d", "embed"], r=2)), (0.5, 2.0)),
    Case("llama", "dora-then-dora", (lora(use_dora=True), lora(["q_proj"], r=3, use_dora=True))),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_merge_has_the_bits_of_files_and_unmerging_those_of_the_base(
    case: Case, workshop: Workshop
) -> None:
    model, base = live_base(case, workshop)
    before, objects, keys = bits(model), identities(model), list(model.state_dict())
    merged = merge(base, adapters_of(workshop.adapters(case), case.weights))
    changed = bits(model)
    assert_same(changed, bits(merged_files(case, workshop)))
    moved = {name for name in before if not np.array_equal(changed[name], before[name])}
    assert moved <= {*merged.names, *base.tied}
    assert merged.nbytes > 0
    merged.unmerge()
    assert_same(bits(model), before)
    assert identities(model) == objects
    assert list(model.state_dict()) == keys


LLAMA = one("llama", "lora", lora())
HALF = one("llama", "float16", lora(), dtype="float16")
TIED = one("llama_tied", "one-side", lora(["q_proj", "lm_head"]))


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Let interrupts be heard also where the tests run in the background, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def llama(workshop: Workshop) -> tuple[Any, LiveBase, list[tuple[LiveAdapter, float]]]:
    """Return a live model, as a base, and an adapter for it."""
    return (*live_base(LLAMA, workshop), adapters_of(workshop.adapters(LLAMA)))


# -- back again ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_cycles_change_no_bit() -> None:
    model, base, adapter = toy(torch.bfloat16, 24, 40, seed=1)
    before = bits(model)
    merged = merge(base, [(adapter, 1.0)])
    changed = bits(model)
    for number in range(1000):
        merged.unmerge()
        merged.carry_out()
        if number % 250 == 0:
            assert_same(bits(model), changed)
    merged.unmerge()
    assert_same(bits(model), before)


def test_what_becomes_of_the_adapter_after_a_merge_does_not_matter(llama: Any) -> None:
    model, base, adapters = llama
    before = bits(model)
    merged = merge(base, adapters)
    for tensor in adapters[0][0].tensors.values():
        tensor.mul_(3)
    merged.unmerge()
    assert_same(bits(model), before)


def test_the_undo_is_small() -> None:
    model, base, adapter = toy(torch.bfloat16, 512, 512, seed=2)
    merged = merge(base, [(adapter, 1.0)])
    assert merged.nbytes - adapter.nbytes < 0.1 * sum(b.size for b in bits(model).values())


def test_a_merge_that_is_not_to_be_undone_keeps_nothing(llama: Any) -> None:
    model, base, adapters = llama
    merged = merge(base, adapters, undo=False)
    merged_bits = bits(model)
    assert merged.nbytes == 0
    with pytest.raises(UsageError, match="not kept"):
        merged.unmerge()
    assert_same(bits(model), merged_bits)


def test_unmerging_twice_is_refused(llama: Any) -> None:
    _, base, adapters = llama
    merged = merge(base, adapters)
    merged.unmerge()
    with pytest.raises(UsageError, match="no adapter is merged"):
        merged.unmerge()


def test_a_model_converted_meanwhile_is_not_unmerged(llama: Any) -> None:
    model, base, adapters = llama
    merged = merge(base, adapters)
    model.float()
    converted = bits(model)
    with pytest.raises(MismatchError, match="another size"):
        merged.unmerge()
    assert_same(bits(model), converted)
    assert merged.is_merged


# -- other memory ----------------------------------------------------------------------------------


def test_a_weight_that_does_not_lie_row_by_row_is_merged_all_the_same(llama: Any) -> None:
    model, base, adapters = llama
    plain = merge(base, adapters)
    expected = bits(model)
    plain.unmerge()
    before = bits(model)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()
    merged = merge(base, adapters)
    assert_same(bits(model), expected)
    merged.unmerge()
    assert_same(bits(model), before)


def test_an_offloaded_weight_is_refused_before_anything_is_done(llama: Any) -> None:
    model, base, adapters = llama
    layer = model.model.layers[1].mlp.down_proj
    before = bits(model)
    weight, layer.weight = layer.weight, nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.down_proj.*offloaded"):
        merge(base, adapters)
    layer.weight = weight
    assert_same(bits(model), before)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_decide_no_bit(workshop: Workshop, threads: int) -> None:
    model, base = live_base(LLAMA, workshop)
    merge(base, adapters_of(workshop.adapters(LLAMA)), threads=threads)
    assert_same(bits(model), bits(merged_files(LLAMA, workshop)))


# -- failures --------------------------------------------------------------------------------------


def test_an_overflow_is_an_error_that_names_the_tensor(workshop: Workshop) -> None:
    model, base = live_base(HALF, workshop)
    before = bits(model)
    with pytest.raises(NumericError, match=r"model\.layers\.0\.") as caught:
        merge(base, adapters_of(workshop.adapters(HALF), [1e6]))
    assert "F16" in str(caught.value)
    assert_same(bits(model), before)


def test_nan_of_the_base_stays_and_nan_of_an_adapter_is_refused(llama: Any) -> None:
    model, base, adapters = llama
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data[0, 0], weight.data[1, 1] = torch.nan, torch.inf
    before = bits(model)
    merged = merge(base, adapters)
    assert torch.isnan(weight[0, 0])
    assert torch.isinf(weight[1, 1])
    merged.unmerge()
    assert_same(bits(model), before)
    next(iter(adapters[0][0].tensors.values()))[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="NaN"):
        merge(base, adapters)
    assert_same(bits(model), before)


def failing(error: Callable[[], BaseException | None], after: int, monkeypatch: Any) -> None:
    """Make the arithmetic fail once, after some tiles, when part of the result is written."""
    whole, lock, count = StepMath.run, threading.Lock(), iter(range(10**9))

    def run(self: StepMath, *arguments: Any) -> None:
        whole(self, *arguments)
        with lock:
            number = next(count)
        problem = error() if number == after else None
        if problem is not None:
            raise problem

    monkeypatch.setattr(StepMath, "run", run)


@pytest.mark.parametrize("after", [0, 3, 13])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    llama: Any, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, adapters = llama
    before = bits(model)
    failing(lambda: MemoryError("no more"), after, monkeypatch)
    with pytest.raises(MemoryError):
        merge(base, adapters)
    assert_same(bits(model), before)


def test_an_interrupt_leaves_the_model_as_it_was(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, adapters = llama
    before = bits(model)
    failing(_thread.interrupt_main, 2, monkeypatch)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapters, threads=1)
    assert_same(bits(model), before)


def test_a_failure_while_unmerging_leaves_the_model_merged(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.merging.compute.step_inverse import Backwards

    model, base, adapters = llama
    before = bits(model)
    merged = merge(base, adapters)
    changed = bits(model)
    restore, count = Backwards.restore, iter(range(10**9))

    def fail(self: Backwards, *arguments: Any) -> bool:
        if next(count) == 5:
            raise MemoryError("no more")
        return restore(self, *arguments)

    monkeypatch.setattr(Backwards, "restore", fail)
    with pytest.raises(MemoryError):
        merged.unmerge()
    assert_same(bits(model), changed)
    merged.unmerge()
    assert_same(bits(model), before)


def test_all_is_done_to_the_end_however_often_it_is_interrupted() -> None:
    done = []

    def piece(number: int) -> Callable[[object], None]:
        def do(_: object) -> None:
            if number % 10 == 0:
                _thread.interrupt_main()
            done.append(number)

        return do

    with pytest.raises(KeyboardInterrupt):
        run_all(map(piece, range(50)), 2, to_the_end=True)
    assert sorted(done) == list(range(50))


# -- swaps -----------------------------------------------------------------------------------------


def test_a_swap_merges_others_in_the_place_of_what_is_merged(workshop: Workshop) -> None:
    other = one("llama", "other", lora(["q_proj", "up_proj"], use_dora=True, r=3))
    model, base = live_base(LLAMA, workshop)
    before = bits(model)
    merged = merge(base, adapters_of(workshop.adapters(LLAMA)))
    swapped = swap(merged, adapters_of(workshop.adapters(other)))
    assert not merged.is_merged
    assert_same(bits(model), bits(merged_files(other, workshop)))
    swapped.unmerge()
    assert_same(bits(model), before)


def test_a_swap_that_fails_goes_back_to_what_was_merged(workshop: Workshop) -> None:
    model, base = live_base(HALF, workshop)
    adapters = adapters_of(workshop.adapters(HALF))
    before = bits(model)
    merged = merge(base, adapters)
    changed = bits(model)
    with pytest.raises(NumericError):
        swap(merged, [(adapters[0][0], 1e6)])
    assert_same(bits(model), changed)
    assert merged.is_merged
    merged.unmerge()
    assert_same(bits(model), before)


def test_adapters_that_do_not_fit_are_refused_before_a_swap_begins(llama: Any) -> None:
    model, base, adapters = llama
    merged = merge(base, adapters)
    changed = bits(model)
    tensors = {k.replace("layers.1.", "layers.7."): t for k, t in adapters[0][0].tensors.items()}
    config = adapters[0][0].config
    with pytest.raises(MismatchError):
        swap(merged, [(LiveAdapter("b", config, adapter_of("b", config, tensors), tensors), 1.0)])
    assert_same(bits(model), changed)


# -- ties ------------------------------------------------------------------------------------------


def test_a_tie_is_parted_where_its_sides_differ_and_tied_again(
    workshop: Workshop, tmp_path: Path
) -> None:
    model, base = live_base(TIED, workshop)
    before = state_bits(model)
    merged = merge(base, adapters_of(workshop.adapters(TIED)))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    assert_same(bits(load(tmp_path)), bits(model))
    merged.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert_same(state_bits(model), before)


def test_a_tie_stays_where_both_sides_get_the_same(workshop: Workshop) -> None:
    case = one("llama_tied", "token-rows", lora(["q_proj"], trainable_token_indices=[5, 33]))
    model, base = live_base(case, workshop)
    merge(base, adapters_of(workshop.adapters(case)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_a_tie_that_the_model_reads_in_its_forward_pass_is_not_parted(workshop: Workshop) -> None:
    case = one("t5", "head", lora(["q", "lm_head"]))
    model, base = live_base(case, workshop)
    before = bits(model)
    with pytest.raises(MismatchError, match="tie"):
        merge(base, adapters_of(workshop.adapters(case)))
    assert_same(bits(model), before)


# -- any values ------------------------------------------------------------------------------------


def toy(
    dtype: torch.dtype, rows: int, columns: int, seed: int
) -> tuple[Any, LiveBase, LiveAdapter]:
    """Return a model of two layers, as a base too, and an adapter for them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    model = nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(rows, 5, bias=False))
    for layer in model:
        layer.weight.data = (0.02 * noise(*layer.weight.shape)).to(dtype)
    tensors = {}
    for name, layer in model.named_children():
        height, width = layer.weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.05 * noise(3, width)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.02 * noise(height, 3)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["0", "1"]}
    return (
        model,
        LiveBase(model),
        LiveAdapter("a", config, adapter_of("a", config, tensors), tensors),
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rows=st.integers(1, 40), columns=st.integers(1, 700), seed=st.integers(0, 10**6),
    weight=st.floats(-4, 4),
)  # fmt: skip
def test_weights_of_any_bits_come_back(
    dtype: torch.dtype, rows: int, columns: int, seed: int, weight: float
) -> None:
    model, base, adapter = toy(dtype, rows, columns, seed)
    chance = np.random.default_rng(seed)
    for layer in model:
        raw = layer.weight.data.view(-1).view(torch.uint8).numpy()
        some = chance.random(raw.size) < 0.1
        raw[some] = chance.integers(0, 256, int(some.sum()), dtype=np.uint8)
    before = bits(model)
    try:
        merged: Merged = merge(base, [(adapter, weight)])
    except NumericError:
        assert_same(bits(model), before)
        return
    merged.unmerge()
    assert_same(bits(model), before)


def test_the_choices_are_checked(llama: Any) -> None:
    _, base, adapters = llama
    with pytest.raises(UsageError, match="rounding"):
        merge(base, adapters, rounding="up")
    with pytest.raises(UsageError, match="threads"):
        merge(base, adapters, threads=0)


def test_a_weight_multiplies_the_one_an_adapter_has(llama: Any) -> None:
    model, base, adapters = llama
    merged = merge(base, [(adapters[0][0], 0.5)])
    expected = bits(model)
    merged.unmerge()
    adapter = adapters[0][0]
    quartered = replace(adapter, adapter=replace(adapter.adapter, weight=0.25))
    merge(base, [(quartered, 2.0)])
    assert_same(bits(model), expected)
