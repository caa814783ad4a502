"""What a shrink says of itself: deltas that became others, other programs' scales, the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import regraft
from shrinking.small import MODULES, config_of, lowrank, write_adapter
from shrinking.test_shrink import _fitting_base

# -- errors


def test_a_rank_that_changes_the_deltas_is_warned_of_with_the_way_on(tmp_path: Path) -> None:
    report = regraft.shrink(write_adapter(tmp_path / "a"), tmp_path / "s", rank=2)
    assert report.error > 0.05
    (warning,) = report.warnings
    worst = max(report.modules, key=lambda module: module.error)
    assert f"{worst.name} by {worst.error:.1%}, rank 8 -> 2" in warning
    assert f"all deltas together by {report.error:.1%}" in warning
    assert "higher --rank" in warning
    assert json.loads(json.dumps(report.to_json()))["warnings"] == [warning]


def test_the_energy_that_is_named_ends_the_warning(tmp_path: Path) -> None:
    report = regraft.shrink(write_adapter(tmp_path / "a"), tmp_path / "s", energy=0.9)
    (warning,) = report.warnings
    energy = float(warning.partition("--energy ")[2].split()[0])
    report = regraft.shrink(tmp_path / "a", tmp_path / "t", energy=energy)
    assert report.warnings == ()
    assert max(module.error for module in report.modules) <= 0.05


def test_a_dtype_that_loses_a_factor_is_warned_of_as_a_dtype(tmp_path: Path) -> None:
    tensors = {name: values * 1e-7 for name, values in lowrank().items()}
    report = regraft.shrink(
        write_adapter(tmp_path / "a", tensors), tmp_path / "s", dtype="float16"
    )  # fmt: skip
    (warning,) = report.warnings
    assert "than float16, such as float32" in warning
    assert "--rank" not in warning


def test_rounding_alone_is_no_warning_and_is_within_the_rounding_of_verify(tmp_path: Path) -> None:
    adapter, base = write_adapter(tmp_path / "a"), _fitting_base(tmp_path / "base")
    assert regraft.shrink(adapter, tmp_path / "s").warnings == ()
    regraft.merge(base, tmp_path / "s", tmp_path / "m")
    assert regraft.verify(tmp_path / "m", base=base, adapters=[adapter]).ok
    regraft.shrink(adapter, tmp_path / "t", rank=4)
    regraft.merge(base, tmp_path / "t", tmp_path / "n")
    assert not regraft.verify(tmp_path / "n", base=base, adapters=[adapter]).ok


# -- scales


@pytest.mark.parametrize(
    ("config", "alone", "by_tensor"),
    [
        ({"alpha_pattern": {"v_proj": 3}}, 2, 2),
        ({"use_rslora": True}, 0, 4),
        ({}, 0, 0),
    ],
)
def test_modules_that_other_programs_scale_otherwise_are_counted(
    tmp_path: Path, config: dict[str, object], alone: int, by_tensor: int
) -> None:
    adapter = write_adapter(tmp_path / "a", **config)
    report = regraft.shrink(adapter, tmp_path / "s", rank=4, uniform=False)
    told = " ".join(report.notes)
    assert (f"{alone} of 4 modules in programs that read lora_alpha and r alone" in told) == bool(
        alone
    )
    assert (f"{by_tensor} of 4 modules in programs that read lora_alpha and the rank" in told) == (
        bool(by_tensor)
    )


def test_patterns_that_stay_are_told_too(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", alpha_pattern={"q_proj": 3})
    report = regraft.shrink(adapter, tmp_path / "s")
    assert config_of(tmp_path / "s") == config_of(adapter)
    assert any("2 of 4 modules" in note and "vLLM" in note for note in report.notes)


# -- the card


def test_a_card_that_a_program_made_gets_the_new_rank_and_size(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base_model_name_or_path="org/base")
    front = "---\nlicense: mit\nbase_model: /home/me/base\n---\n"
    (adapter / "README.md").write_text(f"{front}# Model Card for Model ID\n| rank | 8 |")
    report = regraft.shrink(adapter, tmp_path / "s", rank=3)
    card = (tmp_path / "s" / "README.md").read_text()
    assert "base_model: org/base" in card
    assert "license: mit" in card
    assert "| rank | 3 |" in card
    assert f"| size | {(report.bytes_after) / 1e6:.2f} MB" in card
    assert f"off by {report.error:.2%} of their norm" in card
    assert not {"8 |", "/home/me"} & {part for part in ("8 |", "/home/me") if part in card}


def test_a_card_that_somebody_wrote_stays_and_gets_one_section(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    (adapter / "README.md").write_bytes(b"# Mine\xff\n\ntext\n")
    regraft.shrink(adapter, tmp_path / "s", rank=6)
    report = regraft.shrink(tmp_path / "s", tmp_path / "t", rank=3)
    card = (tmp_path / "t" / "README.md").read_bytes()
    assert card.startswith(b"# Mine\xff\n\ntext\n\n## Shrunk by regraft\n")
    assert card.count(b"## Shrunk") == 1
    assert b"6 -> 3" in card
    assert f"`{max(report.modules, key=lambda m: m.error).name}`".encode() in card


def test_an_adapter_without_a_card_gets_one(tmp_path: Path) -> None:
    regraft.shrink(write_adapter(tmp_path / "a"), tmp_path / "s")
    card = (tmp_path / "s" / "README.md").read_text()
    assert "# s\n" in card
    assert MODULES[0].rpartition(".")[2] in card
