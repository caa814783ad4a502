"""What the factors of a step take in memory is counted: as they are, and packed for the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

import regraft
from merging import toys

MODULE = "model.layers.0.self_attn.q_proj"
FLOAT32 = 4


@pytest.mark.parametrize(("rows", "columns", "rank"), [(300, 7, 5), (7, 300, 5), (40, 40, 1)])
def test_rows_and_columns_both_count(tmp_path: Path, rows: int, columns: int, rank: int) -> None:
    """As they are, factors have ``rank`` numbers for each row and column, and packed one more."""
    base = toys.write_base(tmp_path / "base", {f"{MODULE}.weight": toys.draw(rows, columns)}, None)
    factors = toys.lora(MODULE, rows, columns, rank)
    adapter = toys.write_adapter(tmp_path / "a", factors, r=rank, target_modules=["q_proj"])
    (step,) = regraft.plan(base, adapter).steps
    assert step.factor_bytes == FLOAT32 * (rows + columns) * (2 * rank + 1)


def test_of_several_adapters_all_count(tmp_path: Path) -> None:
    rows, columns, ranks = 50, 20, (3, 8)
    base = toys.write_base(tmp_path / "base", {f"{MODULE}.weight": toys.draw(rows, columns)}, None)
    adapters = [
        toys.write_adapter(
            tmp_path / f"a{rank}", toys.lora(MODULE, rows, columns, rank), r=rank,
            target_modules=["q_proj"],
        )
        for rank in ranks
    ]  # fmt: skip
    (step,) = regraft.plan(base, adapters).steps
    assert step.factor_bytes == FLOAT32 * (rows + columns) * sum(2 * rank + 1 for rank in ranks)
