"""A base and an adapter that fit each other, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from merging import toys
from mounting import mounted


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An untied llama of two layers in bfloat16."""
    return toys.write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA on every q_proj and v_proj of :func:`base`."""
    return toys.write_adapter(tmp_path / "adapter")


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that shares blocks. It asks for 300 MiB; the file that it lies in has holes."""
    with mounted(["mkfs.xfs", "-q"], tmp_path_factory.mktemp("xfs"), 400 * 2**20) as place:
        yield place
