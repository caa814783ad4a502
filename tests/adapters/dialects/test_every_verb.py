"""Every verb reads an adapter of another program without being told what it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import regraft
from adapters.dialects.test_mlx import mlx_adapter
from merging import toys
from regraft.cli.app import app


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base")


@pytest.fixture
def mlx(tmp_path: Path) -> Path:
    return mlx_adapter(tmp_path / "mlx")


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """The same adapter in PEFT's format."""
    return toys.write_adapter(tmp_path / "peft")


def same(one: Path, other: Path) -> bool:
    x, y = toys.load(one), toys.load(other)
    return x.keys() == y.keys() and all(np.array_equal(x[n], y[n]) for n in x)


def test_check(base: Path, mlx: Path) -> None:
    report = regraft.check(base, mlx)
    assert report.ok
    assert any("an MLX adapter" in warning for warning in report.warnings)


def test_inspect_says_the_dialect(mlx: Path) -> None:
    found = regraft.inspect(mlx).adapter
    assert found is not None
    assert (found.dialect, found.modules, found.scale) == ("mlx", 4, 2.0)
    said = CliRunner().invoke(app, ["inspect", str(mlx)]).stdout
    assert "mlx" in said
    assert "adapters.safetensors" in said


def test_the_summary_of_a_merge_says_the_dialect(base: Path, mlx: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["merge", str(base), str(mlx), "-o", str(tmp_path / "out")])
    assert "an MLX adapter" in said.stderr


def test_swap(base: Path, mlx: Path, peft: Path, tmp_path: Path) -> None:
    other = toys.write_adapter(tmp_path / "other", toys.attention(seed=9))
    regraft.merge(base, other, tmp_path / "first")
    regraft.swap(tmp_path / "first", mlx, tmp_path / "out")
    regraft.merge(base, peft, tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")


def test_unmerge_with_the_adapter_named(base: Path, mlx: Path, tmp_path: Path) -> None:
    regraft.merge(base, mlx, tmp_path / "out", keep_adapter=False)
    regraft.unmerge(tmp_path / "out", tmp_path / "back", adapters=mlx)
    assert same(tmp_path / "back", base)


def test_verify_does_the_merge_again(base: Path, mlx: Path, tmp_path: Path) -> None:
    regraft.merge(base, mlx, tmp_path / "out", undo=False)
    report = regraft.verify(tmp_path / "out")
    assert report.ok
    assert report.tensors


def test_diff_compares_deltas(mlx: Path, peft: Path) -> None:
    report = regraft.diff(mlx, peft)
    assert (report.same_deltas, report.deltas) == (4, ())


def test_shrink(mlx: Path, peft: Path, tmp_path: Path) -> None:
    regraft.shrink(mlx, tmp_path / "small", rank=2)
    regraft.shrink(peft, tmp_path / "expected", rank=2)
    report = regraft.diff(tmp_path / "small", tmp_path / "expected")
    assert (report.same_deltas, report.deltas) == (4, ())


def test_attach(base: Path, mlx: Path, peft: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 5, 7, 9]])
    answers = []
    for adapter in (mlx, peft):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = model(ids).logits
        handle = regraft.attach(model, adapter)
        answers.append(model(ids).logits)
        assert not torch.equal(answers[-1], plain)
        handle.detach()
    assert torch.equal(*answers)


def test_load_merged(base: Path, mlx: Path, peft: Path) -> None:
    torch = pytest.importorskip("torch")
    one, other = (regraft.load_merged(base, adapter).state_dict() for adapter in (mlx, peft))
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- convert ---------------------------------------------------------------------------------------


def convert(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["convert", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_convert_tells_an_adapter_from_a_model(base: Path, mlx: Path, tmp_path: Path) -> None:
    code, said, _ = convert(mlx, "-o", tmp_path / "peft")
    assert code == 0
    assert "mlx -> peft" in said
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    code, said, _ = convert(base, "-o", tmp_path / "model", "--dtype", "fp32")
    assert code == 0
    assert (tmp_path / "model" / "config.json").is_file()


def test_convert_as_json(mlx: Path, tmp_path: Path) -> None:
    code, said, _ = convert(mlx, "-o", tmp_path / "peft", "--json")
    told = json.loads(said)
    assert (code, told["dialect"], told["to"], told["error"]) == (0, "mlx", "peft", 0.0)


@pytest.mark.parametrize(
    "option",
    [("--dtype", "bf16"), ("--shard-size", "1GB"), ("--threads", "2"), ("--digest-cache",),
     ("--reflink", "never"), ("--max-memory", "1GiB")],
    ids=str,
)  # fmt: skip
def test_options_of_models_are_refused_for_adapters(
    mlx: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    for more in ((), ("--to", "peft")):
        code, _, said = convert(mlx, "-o", tmp_path / "out", *more, *option)
        assert code == 2
        assert option[0].removeprefix("--") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--to", "esperanto"), "mlx"), (("--from", "esperanto"), "mlx")],
    ids=str,
)  # fmt: skip
def test_a_dialect_that_nobody_knows_is_refused_with_those_there_are(
    mlx: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    code, _, error = convert(mlx, "-o", tmp_path / "out", *words)
    assert code == 2
    assert said in error


def test_a_conversion_that_changes_nothing_is_refused(peft: Path, tmp_path: Path) -> None:
    with pytest.raises(regraft.UnsupportedError, match="nothing to convert"):
        regraft.convert(peft, tmp_path / "out")
    regraft.convert(peft, tmp_path / "out", to="peft")
    assert same_weights(peft, tmp_path / "out")


def test_a_file_name_for_out_is_refused(peft: Path, tmp_path: Path) -> None:
    with pytest.raises(regraft.UsageError, match="OUT is a folder"):
        regraft.convert(peft, tmp_path / "x.gguf", to="mlx")


def test_a_model_is_no_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(regraft.InputError, match="is not an adapter"):
        regraft.convert(base, tmp_path / "out", to="mlx")


def test_uniform_is_written_in_pefts_format(tmp_path: Path) -> None:
    peft = toys.write_adapter(tmp_path / "peft", alpha_pattern={"q_proj": 5}, use_rslora=True)
    done = regraft.convert(peft, tmp_path / "out", uniform=True)
    config = toys.read_json(tmp_path / "out" / "adapter_config.json")
    assert config["r"] == config["lora_alpha"]
    assert config["alpha_pattern"] == config["rank_pattern"] == {}
    assert config["use_rslora"] is False
    assert done.uniform


def test_factors_that_the_config_does_not_target_do_not_begin_to_act(tmp_path: Path) -> None:
    peft = toys.write_adapter(tmp_path / "peft", target_modules=["v_proj"])
    with pytest.raises(regraft.AdapterError, match="does not target"):
        regraft.convert(peft, tmp_path / "out", to="mlx")


def test_stacks_in_one_pair_of_factors_take_the_base(tmp_path: Path) -> None:
    experts, rank = 4, 2
    stem = f"{toys.PREFIX}model.layers.0.mlp.experts"
    tensors = {
        f"{stem}.lora_A.weight": toys.draw(experts * rank, 16),
        f"{stem}.lora_B.weight": toys.draw(8, experts * rank),
    }
    peft = toys.write_adapter(
        tmp_path / "peft", tensors, target_modules=[], r=rank, peft_version="0.19.1",
        target_parameters=["mlp.experts.down_proj"],
    )  # fmt: skip
    for to in ("peft", "mlx"):
        with pytest.raises(regraft.UsageError, match="experts"):
            regraft.convert(peft, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def same_weights(one: Path, other: Path) -> bool:
    name = "adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()
