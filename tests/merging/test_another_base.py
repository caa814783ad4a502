"""An adapter that carries its base's fingerprint, merged into files of another base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import regraft
from merging import toys
from merging.inputs.test_gguf_base import save
from merging.quantized_bases import write_quantized
from regraft.adapters.fingerprint import KEY, Fingerprint, places_of
from regraft.cli.app import app

WORDS = "was trained on other weights than this model has: on org/base, and this is"
NAMES = (f"{toys.Q0}.weight", "model.layers.1.mlp.down_proj.weight", f"{toys.EMBED}.weight")


def fingerprint(tensors: toys.Tensors, names: tuple[str, ...] = NAMES) -> str:
    """Return the fingerprint that an adapter trained on these weights carries."""
    values = [np.asarray(tensors[n], np.float32).ravel()[places_of(tensors[n].size)] for n in names]
    return Fingerprint({n: tensors[n].shape for n in names}, tuple(values), False).to_text()


def write_carrying(folder: Path, text: str) -> Path:
    """Write an adapter that carries a fingerprint."""
    toys.write_adapter(folder, base_model_name_or_path="org/base")
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", KEY: text})
    return folder


def other(tensors: toys.Tensors) -> dict[str, np.ndarray]:
    """Return other weights of the same shapes."""
    return {n: toys.draw(*t.shape, seed=9, dtype=t.dtype) for n, t in tensors.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base")


@pytest.fixture
def fitting(tmp_path: Path) -> Path:
    """Return an adapter that was trained on the base."""
    return write_carrying(tmp_path / "fitting", fingerprint(toys.llama_tensors()))


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Return an adapter that was trained on another base of the same shapes."""
    return write_carrying(tmp_path / "strange", fingerprint(other(toys.llama_tensors())))


@pytest.fixture
def silent() -> Iterator[None]:
    """Let a mismatch be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", regraft.BaseMismatchWarning)
        yield


def said(found: tuple[str, ...] | list[str]) -> list[str]:
    return [warning for warning in found if WORDS in warning]


def test_every_verb_says_so_in_the_words_of_attach(
    base: Path, fitting: Path, strange: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.warns(regraft.BaseMismatchWarning, match=WORDS) as caught:
        receipt = regraft.merge(base, strange, out)
    assert Path(caught[0].filename).name == Path(__file__).name  # the caller's own line
    assert said(receipt.warnings) == [
        f"adapter {str(strange)!r} {WORDS} {base}. It may answer nonsense here"
    ]
    with pytest.warns(regraft.BaseMismatchWarning, match=WORDS):
        assert said(regraft.check(base, strange).warnings)
    with pytest.warns(regraft.BaseMismatchWarning, match=WORDS):
        assert said(regraft.plan(base, strange).warnings)
    with pytest.warns(regraft.BaseMismatchWarning, match=WORDS):
        assert said(regraft.verify(out, base=base, adapters=[strange]).warnings)
    with pytest.warns(regraft.BaseMismatchWarning, match=WORDS):
        assert regraft.load_merged(base, strange) is not None
    regraft.merge(base, fitting, tmp_path / "first")
    with pytest.warns(regraft.BaseMismatchWarning, match=WORDS):
        assert said(regraft.swap(tmp_path / "first", strange, tmp_path / "swapped").warnings)


@pytest.mark.usefixtures("silent")
def test_the_right_base_passes_in_silence(base: Path, fitting: Path, tmp_path: Path) -> None:
    assert not said(regraft.merge(base, fitting, tmp_path / "out").warnings)
    assert not said(regraft.check(base, fitting).warnings)
    assert not said(regraft.verify(tmp_path / "out", base=base, adapters=[fitting]).warnings)
    assert not said(regraft.swap(tmp_path / "out", (fitting, 0.5), tmp_path / "s").warnings)


def test_of_several_adapters_the_one_is_named(base: Path, fitting: Path, strange: Path) -> None:
    with pytest.warns(regraft.BaseMismatchWarning):
        found = said(regraft.check(base, [fitting, strange]).warnings)
    assert [str(strange) in warning for warning in found] == [True]


@pytest.mark.parametrize("verb", ["check", "merge", "dry run"])
def test_the_command_line_says_it_once(
    base: Path, strange: Path, tmp_path: Path, verb: str
) -> None:
    more = {"check": [], "merge": ["-o", str(tmp_path / "out")], "dry run": ["--dry-run"]}[verb]
    command = "check" if verb == "check" else "merge"
    result = CliRunner().invoke(app, [command, str(base), str(strange), *more])
    assert result.exit_code == 0
    assert result.stderr.count(WORDS) == 1
    assert f"warning: adapter {str(strange)!r}" in result.stderr


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_another_precision_is_the_same_base(tmp_path: Path, dtype: Any) -> None:
    exact = {n: np.asarray(t, np.float32) * 1.0001 for n, t in toys.llama_tensors().items()}
    adapter = write_carrying(tmp_path / "adapter", fingerprint(exact))
    base = toys.write_base(tmp_path / "base", {n: t.astype(dtype) for n, t in exact.items()})
    assert not said(regraft.check(base, adapter).warnings)


@pytest.mark.parametrize("kind", ["nf4, double", "int8", "fp8", "gptq, any order", "awq",
                                  "compressed-tensors"])  # fmt: skip
def test_codes_are_compared_by_what_they_stand_for(
    tmp_path: Path, fitting: Path, strange: Path, kind: str
) -> None:
    base = write_quantized(tmp_path / "quantized", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", regraft.BaseMismatchWarning)
        assert not said(regraft.check(base, fitting).warnings)
    with pytest.warns(regraft.BaseMismatchWarning):
        assert said(regraft.check(base, strange).warnings)


@pytest.mark.usefixtures("silent")
def test_a_vocabulary_that_grew_or_was_cut_is_compared_by_the_rows_of_both(
    tmp_path: Path, fitting: Path
) -> None:
    tensors = toys.llama_tensors()
    for name in (f"{toys.EMBED}.weight", "lm_head.weight"):
        tensors[name] = np.concatenate([tensors[name], toys.draw(8, toys.HIDDEN).astype(toys.BF16)])
    base = toys.write_base(tmp_path / "grown", tensors)
    assert not said(regraft.check(base, fitting).warnings)
    carrying = write_carrying(tmp_path / "of-grown", fingerprint(tensors))
    assert not said(regraft.check(toys.write_base(tmp_path / "base"), carrying).warnings)


def test_names_that_the_base_does_not_have_are_left_out(base: Path, tmp_path: Path) -> None:
    weights = other(toys.llama_tensors())
    renamed = json.loads(fingerprint(weights))
    renamed["sampled"] = {n.replace("model.", "odd."): s for n, s in renamed["sampled"].items()}
    unknown = write_carrying(tmp_path / "unknown", json.dumps(renamed))
    with warnings.catch_warnings():
        warnings.simplefilter("error", regraft.BaseMismatchWarning)
        assert regraft.check(base, unknown).ok
        damaged = write_carrying(tmp_path / "damaged", "[" * 10_000)
        assert regraft.check(base, damaged).ok


def test_a_merged_model_is_another_base(base: Path, fitting: Path, tmp_path: Path) -> None:
    regraft.merge(base, [(fitting, 20.0)], tmp_path / "merged")
    with pytest.warns(regraft.BaseMismatchWarning):
        assert said(regraft.check(tmp_path / "merged", fitting).warnings)


def test_inspect_shows_the_fingerprint(fitting: Path, tmp_path: Path) -> None:
    facts = regraft.inspect(fitting).adapter
    assert facts is not None
    assert facts.fingerprint is not None
    assert (facts.fingerprint.parameters, facts.fingerprint.values) == (3, 96)
    assert not facts.fingerprint.quantized
    shown = CliRunner().invoke(app, ["inspect", str(fitting)])
    assert "96 values of 3 parameters of its base" in shown.stdout
    without = regraft.inspect(toys.write_adapter(tmp_path / "without")).adapter
    assert without is not None
    assert without.fingerprint is None


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_model_is_compared_too(tmp_path: Path, kind: str) -> None:
    (tmp_path / "gguf").mkdir()
    base = save(tmp_path / "gguf", "llama", kind)
    regraft.dequantize(base, tmp_path / "plain", dtype="float32")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    queries = "model.layers.0.self_attn.q_proj"
    for name, weights in (("fitting", tensors), ("strange", other(tensors))):
        adapter = write_carrying(tmp_path / name, fingerprint(weights, (f"{queries}.weight",)))
        path = adapter / "adapter_model.safetensors"
        text = {KEY: fingerprint(weights, (f"{queries}.weight",))}
        save_file(toys.lora(queries, 64, 64), path, text)
        with warnings.catch_warnings(record=True):
            found = said(regraft.check(base, adapter).warnings)
        assert len(found) == (name == "strange"), name


def test_an_adapter_that_is_in_the_base_already_is_told_of(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "a")
    other = toys.write_adapter(tmp_path / "b", toys.attention(seed=9))
    regraft.merge(base, adapter, tmp_path / "m")
    with pytest.warns(regraft.BaseMismatchWarning, match="is merged into .*m already.*once more"):
        receipt = regraft.merge(tmp_path / "m", adapter, tmp_path / "twice")
    assert any("already" in note for note in receipt.warnings)
    assert not any("already" in note for note in regraft.check(tmp_path / "m", other).warnings)
    assert not any("already" in note for note in regraft.check(base, adapter).warnings)


@pytest.mark.parametrize(("kind", "told"), [("qwen3", True), ("llama", False)])
def test_a_base_of_another_kind_than_the_config_names_is_told_of(
    tmp_path: Path, kind: str, told: bool
) -> None:
    base = toys.write_base(tmp_path / "base")
    toys.write_base(tmp_path / "named", config=toys.CONFIG | {"model_type": kind})
    adapter = toys.write_adapter(tmp_path / "a", base_model_name_or_path=str(tmp_path / "named"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", regraft.BaseMismatchWarning)
        notes = regraft.check(base, adapter).warnings
    assert any(f"a {kind}, and {base} is a llama" in note for note in notes) == told
