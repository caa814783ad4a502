"""Bases and adapters are those of the faithfulness tests, made once per session."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from faithful.conftest import _quiet_and_single_threaded, workshop

__all__ = ["_quiet_and_single_threaded", "workshop"]
