"""What an adapter asks for that cannot be done to a weight in codes is said of the weight."""

from __future__ import annotations

from pathlib import Path

import pytest

import regraft
from merging import toys
from regraft.errors import RegraftError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    regraft.quantize(toys.write_base(folder / "plain"), folder / "base", "int8")
    return folder / "base"


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("quantize", [None, "keep"])
def test_factors_that_began_from_another_base(
    base: Path, tmp_path: Path, init: str, quantize: str | None
) -> None:
    adapter = toys.write_adapter(tmp_path / "a", init_lora_weights=init)
    with pytest.raises(RegraftError) as caught:
        regraft.plan(base, adapter, quantize=quantize)
    problems = caught.value.problems
    assert len(problems) == 2 * toys.LAYERS
    for problem in problems:
        assert problem.what == "PiSSA and OLoRA began from another base than this quantized one"
        assert problem.where.endswith("_proj.weight")
        assert problem.hint


def test_a_weight_that_is_replaced_cannot_stay_in_codes(base: Path, tmp_path: Path) -> None:
    key = f"{toys.PREFIX}{toys.Q0}.weight"
    tensors = {**toys.attention(), key: toys.draw(toys.HIDDEN, toys.HIDDEN)}
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{toys.PREFIX}{toys.Q0}.lora")}
    adapter = toys.write_adapter(tmp_path / "a", tensors, modules_to_save=[toys.Q0])
    with pytest.raises(RegraftError) as caught:
        regraft.plan(base, adapter, quantize="keep")
    (problem,) = caught.value.problems
    assert "replaces a quantized weight" in problem.what
    assert problem.where == f"{toys.Q0}.weight"
    assert regraft.plan(base, adapter).steps
