"""A shrunk adapter in PEFT: it loads, and answers as its deltas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from faithful import cases, embedding_cases
from faithful.cases import lora, one
from faithful.harness import Case, Workshop, assert_close, merge_and_load
from merging.toys import load
from regraft.testing import zoo

ALL = {
    case.id: case
    for case in (
        *cases.everywhere(),
        *cases.TARGETS,
        *cases.INITS,
        *cases.LORA_BIASES,
        *cases.EXPERTS,
        *cases.CONVS,
        *embedding_cases.EMBEDDINGS,
        *embedding_cases.TIED,
        *embedding_cases.WHOLE_MODULES,
        *embedding_cases.TOKEN_ROWS,
        *embedding_cases.GROWN_VOCABULARIES,
    )
}

CHOSEN = [
    *("llama-lora", "llama-rslora-patterns", "gpt2-dora", "t5-rslora-patterns", "opt-lora-bias"),
    *("llama-patterns-by-full-name", "llama-rank-above-width", "llama-parameter-of-a-linear"),
    *("llama-eva", "llama-mica", "llama-embed-rslora", "llama-embed-and-lm-head"),
    *("mixtral-experts-patterns", "mixtral-experts-by-leaf", "mixtral-all-linear"),
    *("gpt_oss-experts", "gpt_oss-experts-biases", "qwen3_moe-experts-and-linear"),
    *("toynet-conv1d", "toynet-conv2d", "toynet-conv3d-dora", "toynet-embed", "vit_conv-patches"),
    *("llama_tied-tied-ensured", "qwen2_tied-tied-both", "llama_tied-tied-ensured-both"),
    *("bert_seqcls-classifier", "llama-tokens-list", "toynet-attention-whole"),
    *("llama_tied-grown-ensured-whole", "llama-grown-embed-and-lm-head"),
]

SMALLER: list[dict[str, Any]] = [{"energy": 0.7}, {"rank": 3}]


def shrunk(case: Case, workshop: Workshop, **options: Any) -> tuple[Path, Path, Path, Any]:
    """Return base, adapter and shrunk adapter of a case, and the report."""
    base = workshop.base(case.architecture, case.dtype, case.sharded)
    (adapter,) = workshop.adapters(case)
    out = workshop.fresh("shrunk")
    return base, adapter, out, regraft.shrink(adapter, out, base=base, **options)


def answers(case: Case, workshop: Workshop, base: Path, adapter: Path) -> np.ndarray[Any, Any]:
    """Return the logits of PEFT's live model."""
    return workshop.live_logits(base, [adapter], case.example_inputs(), None, case.prepare)


@pytest.mark.parametrize("case", [ALL[name] for name in CHOSEN], ids=CHOSEN)
def test_at_full_rank_in_float32_it_answers_as_before(case: Case, workshop: Workshop) -> None:
    base, adapter, out, report = shrunk(case, workshop, dtype="float32")
    assert report.error == 0
    assert np.array_equal(
        answers(case, workshop, base, out), answers(case, workshop, base, adapter)
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", SMALLER, ids=str)
@pytest.mark.parametrize("case", [ALL[name] for name in CHOSEN], ids=CHOSEN)
def test_peft_and_a_merge_read_the_new_ranks_in_the_same_way(
    case: Case, options: dict[str, Any], workshop: Workshop
) -> None:
    base, _, out, report = shrunk(case, workshop, dtype="float32", **options)
    if "rank" in options:
        assert {m.rank_after for m in report.modules} <= {1, 2, 3}
    live = answers(case, workshop, base, out)
    merged = merge_and_load(base, out, workshop.fresh("merged"), case.architecture)
    assert_close(zoo.logits(merged, case.example_inputs()), live, case.tolerance)


def test_an_odd_rank_of_an_orthogonal_start_loads(workshop: Workshop) -> None:
    case = one("llama", "orthogonal", lora(init_lora_weights="orthogonal"))
    base, _, out, _ = shrunk(case, workshop, dtype="float32", rank=3)
    merged = merge_and_load(base, out, workshop.fresh("merged"), "llama")
    assert_close(zoo.logits(merged, case.example_inputs()), answers(case, workshop, base, out))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_of_these_starts_the_dtype_alone_changes(init: str, workshop: Workshop) -> None:
    case = one("llama", init, lora(init_lora_weights=init), dtype="float32")
    base, adapter, out, _ = shrunk(case, workshop, dtype="bfloat16")
    assert_close(answers(case, workshop, base, out), answers(case, workshop, base, adapter), 1e-2)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"energy": 0.999}, {"energy": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_are_off_by_about_what_the_deltas_are(
    architecture: str, options: dict[str, Any], workshop: Workshop
) -> None:
    case = one(architecture, "lora", lora(r=8, lora_alpha=12))
    base, adapter, out, report = shrunk(case, workshop, **options)
    inputs = case.example_inputs()
    before, alone = answers(case, workshop, base, adapter), workshop.plain_logits(base, inputs)
    effect = np.linalg.norm(before - alone)
    off = np.linalg.norm(answers(case, workshop, base, out) - before)
    assert 0 < off <= 4 * report.error * effect  # layers add up what each is off by


def test_a_merge_of_it_is_that_of_the_best_approximations(workshop: Workshop) -> None:
    case = one("llama", "lora-r12", lora(r=12, lora_alpha=18), dtype="float32")
    base, adapter, out, report = shrunk(case, workshop, dtype="float32", rank=5)
    regraft.merge(base, adapter, workshop.folder / "whole")
    regraft.merge(base, out, workshop.folder / "best")
    weights, whole, reduced = (
        load(f) for f in (base, workshop.folder / "whole", workshop.folder / "best")
    )
    for module in report.modules:
        name = f"{module.name}.weight"
        delta = whole[name].astype(np.float64) - weights[name]
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        best, left = (u[:, :5] * s[:5]) @ vt[:5], np.linalg.norm(s[5:])
        assert np.allclose(reduced[name] - weights[name].astype(np.float64), best, atol=1e-6)
        assert module.error_norm == pytest.approx(left, rel=1e-4)
        assert module.delta_norm == pytest.approx(np.linalg.norm(s), rel=1e-5)
