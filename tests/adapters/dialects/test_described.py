"""``inspect`` of adapters that cannot be read without their base: what their files say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import regraft
from cli.conftest import run
from cli.kinds import Run
from merging import toys
from regraft.errors import InputError, UsageError
from regraft.inspection import AdapterFacts

__all__ = ["run"]

LAYERS = 2
Shapes = dict[str, tuple[int, ...]]


def drawn(shapes: Shapes) -> dict[str, np.ndarray]:
    return {name: toys.draw(*shape) for name, shape in shapes.items()}


def torchtune(folder: Path, file: str = "adapter_model.pt") -> Path:
    torch = pytest.importorskip("torch")
    shapes: Shapes = {}
    for layer in range(LAYERS):
        for leaf, out in (("q_proj", 12), ("k_proj", 6)):
            name = f"layers.{layer}.attn.{leaf}"
            shapes |= {f"{name}.lora_a.weight": (3, 16), f"{name}.lora_b.weight": (out, 3),
                       f"{name}.magnitude": (out,)}  # fmt: skip
    torch.save({n: torch.from_numpy(t) for n, t in drawn(shapes).items()}, folder / file)
    said = {"r": 3, "lora_alpha": 6, "base_model_name_or_path": "org/llama", "peft_type": "LORA"}
    toys.write_json(folder / "adapter_config.json", said)
    return folder


def litgpt(folder: Path) -> Path:
    """Its q, k and v are one module, whose A has three times the rank; out is as wide as in."""
    torch = pytest.importorskip("torch")
    shapes = {f"transformer.h.{layer}.attn.qkv.lora_{n}": shape for layer in range(LAYERS)
              for n, shape in (("A", (9, 24)), ("B", (24, 3)))}  # fmt: skip
    tensors = {name: torch.from_numpy(tensor) for name, tensor in drawn(shapes).items()}
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(
        "lora_r: 3\nlora_alpha: 6\nlora_query: true\nlora_key: true\nlora_value: true\n"
    )
    return folder


def mistral(folder: Path) -> Path:
    shapes = {f"layers.{layer}.attention.{leaf}.lora_{n}.weight": shape for layer in range(LAYERS)
              for leaf in ("wq", "wk") for n, shape in (("A", (3, 16)), ("B", (12, 3)))
              }  # fmt: skip
    save_file(drawn(shapes), folder / "lora.safetensors")
    toys.write_json(folder / "params.json", {"lora": {"scaling": 2.0}})
    return folder


def tinker(folder: Path) -> Path:
    stack, head = "model.layers.0.mlp.experts.w1", "model.unembed_tokens"
    shapes: Shapes = {f"{stack}.lora_A.weight": (4, 3, 16), f"{stack}.lora_B.weight": (4, 20, 3),
                      f"{head}.lora_A.weight": (3, 16), f"{head}.lora_B.weight": (61, 3),
                      }  # fmt: skip
    tensors = {f"base_model.model.{name}": tensor for name, tensor in drawn(shapes).items()}
    return toys.write_adapter(folder, tensors, target_modules=["experts"])


def mlx(folder: Path) -> Path:
    stack, q = "model.layers.0.mlp.experts.gate_proj", "model.layers.0.self_attn.q_proj"
    shapes: Shapes = {f"{stack}.lora_a": (4, 3, 16), f"{stack}.lora_b": (4, 20, 3),
                      f"{q}.lora_a": (16, 3), f"{q}.lora_b": (12, 3)[::-1]}  # fmt: skip
    save_file(drawn(shapes), folder / "adapters.safetensors")
    said = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.0}}
    toys.write_json(folder / "adapter_config.json", said)
    return folder


ADAPTERS: dict[str, tuple[Callable[[Path], Path], dict[str, int], str]] = {
    "torchtune": (torchtune, {"q_proj": 2, "k_proj": 2}, "in which order"),
    "litgpt": (litgpt, {"qkv": 2}, "how many heads"),
    "mistral": (mistral, {"wq": 2, "wk": 2}, "how many heads"),
    "tinker": (tinker, {"w1": 1, "unembed_tokens": 1}, "the embedding too"),
    "mlx": (mlx, {"gate_proj": 1, "q_proj": 1}, "lies"),
}
"""What writes each, how many modules it has by the last part of their names, and why the base is
needed."""


def facts_of(path: Path) -> AdapterFacts:
    found = regraft.inspect(path).adapter
    assert found is not None
    return found


@pytest.mark.parametrize("dialect", ADAPTERS)
def test_the_file_is_described_and_the_base_is_asked_for(tmp_path: Path, dialect: str) -> None:
    make, adapted, why = ADAPTERS[dialect]
    adapter = make(tmp_path)
    found, facts = regraft.inspect(adapter), facts_of(adapter)
    assert (facts.dialect, facts.ranks) == (dialect, {3: sum(adapted.values())})
    assert facts.adapted == adapted
    assert why in facts.needs_base
    assert not facts.unknown_settings
    assert [(share.dtype, share.bytes) for share in found.dtypes] == [("F32", found.bytes)]
    stored = sum(p.stat().st_size for p in tmp_path.iterdir() if p.name == found.files[0].name)
    assert 0 < found.bytes < stored
    with pytest.raises(UsageError, match="base is needed"):
        regraft.convert(adapter, tmp_path / "out", to="peft")


def test_what_a_config_in_pefts_words_says_is_said(tmp_path: Path) -> None:
    facts = facts_of(torchtune(tmp_path))
    assert (facts.r, facts.alpha, facts.scale, facts.base) == (3, 6, 2.0, "org/llama")
    assert facts.dora


def test_one_of_several_epochs_is_described_and_several_are_not(tmp_path: Path) -> None:
    torchtune(tmp_path, "adapter_0.pt")
    assert facts_of(tmp_path).adapted == {"q_proj": 2, "k_proj": 2}
    torchtune(tmp_path, "adapter_1.pt")
    assert facts_of(tmp_path / "adapter_1.pt").needs_base
    with pytest.raises(InputError, match="several adapters"):
        regraft.inspect(tmp_path)


def test_an_adapter_that_is_read_without_its_base_does_not_need_it(tmp_path: Path) -> None:
    assert facts_of(toys.write_adapter(tmp_path)).needs_base == ""


def test_a_reader_that_describes_without_the_base_says_so_too(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"lora_unet_a_b.lora_down.weight": toys.draw(3, 8),
                               "lora_unet_a_b.lora_up.weight": toys.draw(8, 3)}  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors")
    assert "underscores" in facts_of(tmp_path / "style.safetensors").needs_base


def test_the_command_says_it(run: Run, tmp_path: Path) -> None:
    told = run("inspect", litgpt(tmp_path))
    assert told.exit_code == 0
    lines = dict(
        line.strip().split("  ", 1) for line in told.output.splitlines() if "  " in line[2:]
    )
    assert lines["rank"].strip() == "3 in 2 modules"
    assert "how many heads" in lines["needs its base"]
    assert "claims base" not in lines
