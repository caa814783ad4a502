"""A base and an adapter that fit each other, each in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from merging import toys


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An untied llama of two layers in bfloat16."""
    return toys.write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA on every q_proj and v_proj of :func:`base`."""
    return toys.write_adapter(tmp_path / "adapter")
