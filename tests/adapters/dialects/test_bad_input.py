"""What is damaged or doubtful is a typed error in every dialect, and nothing is written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import regraft
from merging import toys
from regraft.adapters.dialects.registry import DIALECTS
from regraft.errors import InputError, RegraftError, UnsupportedError, UsageError
from regraft.translating import convert_adapter

pytest.importorskip("torch")

SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}  # fmt: skip
READ = [
    name
    for name, dialect in DIALECTS.items()
    if dialect.reads and dialect.writes and not dialect.of_images
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_base(tmp_path_factory.mktemp("base"))


def peft(folder: Path) -> Path:
    tensors = {
        key: value
        for layer in range(toys.LAYERS) for name, shape in SHAPES.items()
        for key, value in toys.lora(f"model.layers.{layer}.{name}", *shape).items()
    }  # fmt: skip
    targets = [name.rpartition(".")[2] for name in SHAPES]
    return toys.write_adapter(folder, tensors, target_modules=targets)


def written(tmp_path: Path, name: str, base: Path) -> Path:
    try:
        convert_adapter(peft(tmp_path / "peft"), tmp_path / name, to=name, base=base)
    except UnsupportedError:
        pytest.skip(f"{name} has no modules of this kind")
    return tmp_path / name


def spoiled(content: bytes, chance: random.Random) -> bytes:
    """Return bytes that are cut short, or of which a few are others."""
    if chance.random() < 0.4:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        # Most of what can go wrong stands at one of the ends.
        room = min(len(changed), 600)
        at = chance.choice((chance.randrange(room), -1 - chance.randrange(room)))
        changed[at] = chance.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("name", READ)
def test_damaged_files_are_typed_errors(tmp_path: Path, base: Path, name: str) -> None:
    sound = written(tmp_path, name, base)
    chance, refused = random.Random(name), 0
    for number in range(40):
        folder = shutil.copytree(sound, tmp_path / f"bad-{number}")
        file = chance.choice(sorted(p for p in folder.iterdir() if p.is_file()))
        file.write_bytes(spoiled(file.read_bytes(), chance))
        try:
            convert_adapter(folder, tmp_path / f"out-{number}", base=base)
        except RegraftError:
            refused += 1
            assert not (tmp_path / f"out-{number}").exists()
    assert refused > 5


@pytest.mark.parametrize("name", READ)
def test_a_file_that_is_missing_is_a_typed_error(tmp_path: Path, base: Path, name: str) -> None:
    sound = written(tmp_path, name, base)
    names = sorted(path.name for path in sound.iterdir() if path.is_file())
    for missing in names if len(names) > 1 else ():
        folder = shutil.copytree(sound, tmp_path / f"without-{missing}")
        (folder / missing).unlink()
        for ask in (
            lambda folder=folder: convert_adapter(folder, tmp_path / "out", base=base),
            lambda folder=folder: regraft.merge(base, folder, tmp_path / "out"),
        ):
            with pytest.raises(RegraftError):
                ask()
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", READ)
def test_a_nan_is_no_merge(tmp_path: Path, base: Path, name: str) -> None:
    adapter = peft(tmp_path / "nan")
    tensors = toys.load(adapter)
    next(iter(tensors.values()))[0, 0] = np.nan
    toys.save_file(tensors, adapter / "adapter_model.safetensors")
    try:
        convert_adapter(adapter, tmp_path / name, to=name, base=base)
    except (InputError, UsageError):
        assert not (tmp_path / name).exists()
        return
    with pytest.raises(InputError):
        regraft.merge(base, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_files_of_two_programs_none_is_taken_unasked(tmp_path: Path, base: Path) -> None:
    folder = written(tmp_path, "torchtune", base)
    convert_adapter(tmp_path / "peft", tmp_path / "lit", to="litgpt", base=base)
    for path in (tmp_path / "lit").iterdir():
        shutil.copy(path, folder)
    for ask in (
        lambda: regraft.merge(base, folder, tmp_path / "out"),
        lambda: convert_adapter(folder, tmp_path / "out", base=base),
    ):
        with pytest.raises(InputError, match=r"several layouts.*adapter_model\.pt.*lit_model"):
            ask()
        assert not (tmp_path / "out").exists()
    for name in ("torchtune", "litgpt"):
        convert_adapter(folder, tmp_path / f"as-{name}", base=base, dialect=name)
        assert (tmp_path / f"as-{name}" / "adapter_model.safetensors").is_file()


def test_a_dialect_that_is_said_and_not_known_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UsageError, match="no such dialect"):
        convert_adapter(peft(tmp_path / "a"), tmp_path / "out", base=base, dialect="mlx2")
