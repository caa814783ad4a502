"""Bases and adapters are made once per session; the tiny models run on one thread each."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from faithful.harness import Workshop


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)  # waking a second thread costs more than these models do
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return the maker and keeper of this session's bases and adapters."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "workshop"
    shared.mkdir(exist_ok=True)
    return Workshop(tmp_path_factory.mktemp("faithful"), shared)
