"""The script that shows engines adapters: what is told apart, written, and installed."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.dialects.test_images import write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what imports a module of scripts/engines."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: import_module(f"engines.{name}")


@pytest.mark.parametrize(
    ("did", "foretold", "right"),
    [
        ("as trained", None, True), ("otherwise", None, False), ("refused", None, False),
        ("refused", "refuses", True), ("as trained", "refuses", False),
        ("as the base", "leaves out", True), ("otherwise", "other scale", True),
        ("refused", "leaves out", False),
    ],
)  # fmt: skip
def test_what_was_foretold(script: Any, did: str, foretold: str | None, right: bool) -> None:
    assert script("shown").Shown("x", "diffusers", did, 0.1, "", foretold).is_right is right


def test_tables_have_a_place_on_the_page_and_fixtures_a_name_each(script: Any) -> None:
    page = (ROOT / "docs/engines.md").read_text("utf-8")
    for name in ("runs", "runs of diffusers", "runs of dialects"):
        assert page.count(f"<!-- {name}: begin -->") == page.count(f"<!-- {name}: end -->") == 1
    names = [fixture.name for fixture in script("pipelines").FIXTURES]
    assert len(set(names)) == len(names)
    assert all((ROOT / script("peers").TESTS / test).is_file()
               for peer in script("peers").PEERS for test in peer.tests)  # fmt: skip


def test_modules_of_one_matrix_are_joined_with_the_same_delta(script: Any, tmp_path: Path) -> None:
    modules = [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"]
    every = [*modules, "single_transformer_blocks.0.proj_mlp"]
    part = write_model(tmp_path / "transformer", dict.fromkeys(every, (4, 4)), {})
    (part / "model.safetensors").rename(part / "diffusion_pytorch_model.safetensors")
    tensors = {}
    for number, module in enumerate(modules):
        name = f"lora_transformer_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": np.full((2, 4), number + 1, np.float32),
                    f"{name}.lora_up.weight": np.full((4, 2), number + 5, np.float32),
                    f"{name}.alpha": np.array(6, np.float32)}  # fmt: skip
    found = script("pipelines").as_makers_names(tensors, part)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"]
    apart = [
        tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * 3
        for name in (f"lora_transformer_{module.replace('.', '_')}" for module in modules)
    ]
    assert np.array_equal(up @ down * float(found[f"{key}.alpha"]) / 6, np.concatenate(apart))


def test_tests_are_counted(script: Any, tmp_path: Path) -> None:
    peers = script("peers")
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite tests="9" skipped="2" failures="1" errors="1"/></testsuites>'
    )
    ran = peers._counted(peers.PEERS[0], tmp_path / "r.xml", "1.0")
    assert (ran.passed, ran.failed, ran.skipped) == (5, 2, 2)
    assert ran.text == "5 tests, **2 failed**, 2 not run"
    assert not ran.is_right
    assert not peers.Ran("x", "1", 0, 0, 3).is_right
    lines = peers.table([ran], tmp_path)
    assert peers.table([], tmp_path) == lines
    assert "| mlx-lm 1.0 |" in lines[-1]


def test_an_environment_is_made_once_and_gets_what_it_lacks(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, asked = script("running"), []
    monkeypatch.setattr(running.venv, "create", lambda folder, **_: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command[6:]))
    for packages in (["a"], ["a"], ["a", "b"], ["b"]):
        running.python_of("x", packages, tmp_path, {}, alone=["c"])
    assert asked == [["a"], ["--no-deps", "c"], ["a", "b"], ["--no-deps", "c"]]
    assert running.python_of("x", ["z"], tmp_path, {"x": "/p"}) == Path("/p")
