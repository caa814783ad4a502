"""What the benchmark of GGUF files makes of its measurements, and the roundings it tries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def layer(delta_share: float) -> Any:
    """Return a layer in 16 codes whose delta, of rank 4, is a share of a step."""
    from benchmarks.gguf.roundings import Layer

    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(96, 4)))[0].astype(np.float32)
    delta = (rng.normal(size=(32, 4)) @ basis.T).astype(np.float32)
    delta *= np.float32(delta_share) / np.abs(delta).mean()
    codes = rng.integers(0, 16, delta.shape).astype(np.int32)
    return Layer(codes, np.ones_like(delta), delta, basis, 0, 15)


def seen_by_the_adapter(layer: Any, moves: Any) -> float:
    return float(np.linalg.norm((moves * layer.steps - layer.delta) @ layer.basis))


def test_feedback_leaves_little_error_where_the_adapter_looks() -> None:
    from benchmarks.gguf.roundings import RULES, stochastic

    given = layer(0.03)
    chance = seen_by_the_adapter(given, stochastic(given, np.random.default_rng(0)))
    for name in ("error feedback", "stochastic, then error feedback"):
        moves = RULES[name](given, np.random.default_rng(0))
        assert seen_by_the_adapter(given, moves) < chance / 3


def test_no_delta_moves_no_code() -> None:
    from benchmarks.gguf.roundings import RULES

    for rule in RULES.values():
        assert not rule(layer(0.0), np.random.default_rng(0)).any()


def test_a_share_is_compared_seed_by_seed() -> None:
    from benchmarks.gguf import figures, models
    from benchmarks.qlora.figures import Measured
    from regraft.demo.telling.result import Training

    base = models.base_in("Q4_0", Path("work"))
    training = Training(40, 1.0, 2.0, 0.1, 1, 1)
    family = models.Family(base, Path("adapter"), training, 0.004, ())
    rows = [Measured(models.AGAIN, 1.0, 2.0, 0.1, 0.5)]
    rows += [Measured(models.KEPT, 0.1, kl, 0.1, 0.9) for kl in (0.05, 0.09)]
    assert figures.divergence_figure(family, rows).passed
    rows.append(Measured(models.KEPT, 0.1, 0.11, 0.1, 0.9))
    assert not figures.divergence_figure(family, rows).passed


def test_speed_is_the_median_of_the_ratios_of_pairs() -> None:
    from benchmarks.gguf.figures import speed_figures

    def run(seconds: float, peak: int) -> dict[str, float]:
        return {"seconds": seconds, "cpu_seconds": seconds, "peak_bytes": peak * 2**20}

    found = {
        "model": "a model", "type": "Q4_0", "regraft": [run(1, 200), run(2, 300), run(1, 200)],
        "llama.cpp": [[run(6, 7), run(6, 4)], [run(9, 7), run(9, 4)], [run(4, 1), run(4, 1)]],
    }  # fmt: skip
    speed, peak = speed_figures(found)
    assert (speed.value, speed.passed) == (9.0, False)
    assert (peak.shown, peak.passed) == ("300 MiB", True)
