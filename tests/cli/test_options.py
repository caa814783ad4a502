"""What the receipt records of a command, and the lines that people paste."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from cli.kinds import Run


def test_the_command_in_a_receipt_is_one_line_that_a_shell_reads_back(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a\nb $(id)"
    assert run("merge", base, adapter, "-o", out).exit_code == 0
    command = json.loads((out / "regraft" / "receipt.json").read_text())["command"]
    assert command.isprintable()
    told = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    )
    words = told.stdout.split(b"\0")
    assert os.fsencode(out) in words
    assert os.fsencode(base) in words


def test_a_token_in_a_web_address_is_in_no_receipt_and_no_card(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    from regraft import merge

    secret = "hf_" + "a1" * 17
    command = f"regraft merge https://u:pw@h/o/n?token={secret} {adapter}"
    merge(base, adapter, tmp_path / "out", command=command)
    for name in ("README.md", "regraft/receipt.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "https://***@h/o/n?token=***" in text
        assert secret not in text
    assert secret not in run("inspect", f"https://u:pw@h/o/n?token={secret}").output


@pytest.mark.parametrize("name", ["-rf", "a b; id", "plain"])
def test_the_line_that_takes_a_merge_back_can_be_pasted(
    run: Run, base: Path, adapter: Path, tmp_path: Path, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = run("merge", base, adapter, f"--out={name}").output
    line = said.partition("`regraft unmerge")[2].partition("`")[0]
    assert shlex.split(line)[0] in (name, f"./{name}")
    assert not shlex.split(line)[0].startswith("-")


def test_a_class_that_is_none_is_not_in_the_line_that_loads_the_model(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = ["X; import os; os.system('id')"]
    (base / "config.json").write_text(json.dumps(config))
    result = run("merge", base, adapter, "-o", tmp_path / "out")
    assert "import os" not in result.stdout.partition("load it with")[2]
