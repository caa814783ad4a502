"""Bases on the Hub, known from headers alone. The Hub is stood in for: there is no network here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import regraft
from cli import tiny
from regraft.formats import remote
from regraft.formats.hub import Located
from regraft.formats.safetensors import read_header


def headers_of(base: Path) -> Any:
    """Return what the Hub would answer for a folder's weights."""
    files = {}
    for path in base.glob("*.safetensors"):
        header = read_header(path)
        files[path.name] = SimpleNamespace(
            tensors={
                name: SimpleNamespace(
                    dtype=spec.dtype,
                    shape=list(spec.shape),
                    data_offsets=(
                        spec.start - header.data_start,
                        spec.start - header.data_start + spec.nbytes,
                    ),
                )
                for name, spec in header.tensors.items()
            }
        )
    return SimpleNamespace(files_metadata=files)


@pytest.fixture
def hub_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base that only the Hub has: here are its config, and its headers on request."""
    whole = tiny.make_sharded_base(tmp_path / "whole")
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps(tiny.CONFIG))
    answer = headers_of(whole)
    monkeypatch.setattr(
        remote, "locate", lambda source, **_: Located(small, str(source), "org/model", "c" * 40)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", lambda *_, **__: answer)
    return whole


def test_check_and_plan_need_no_weights(hub_base: Path, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "adapter")
    assert regraft.check("org/model", adapter).ok
    planned = regraft.plan("org/model", adapter).to_json()
    local = regraft.plan(hub_base, adapter).to_json()
    assert planned["steps"] == local["steps"]
    assert [shard["bytes"] for shard in planned["shards"]] == [
        shard["bytes"] for shard in local["shards"]
    ]


def test_a_misfit_is_found_without_weights(hub_base: Path, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    assert hub_base.exists()
    report = regraft.check("org/model", adapter)
    assert not report.ok
    assert "rank" in str(report.problems[0])
