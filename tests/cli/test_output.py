"""What goes where: stdout, stderr, terminals, closed pipes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import regraft
from cli.kinds import Launch
from regraft.cli import output as module
from regraft.cli.output import Output
from regraft.numerics.listeners import tell_compiling
from regraft.progress import ProgressEvent


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of stderr."""
    stream = Terminal()
    monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=sys.stdout, stderr=stream))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_data_is_json_or_text_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).data({"a": 1}, "text")
    Output().data({"a": 1}, "text")
    captured = capsys.readouterr()
    assert captured.out == '{\n  "a": 1\n}\ntext\n'
    assert captured.err == ""


def test_quiet_silences_text_but_not_json_or_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output(quiet=True).data({}, "text")
    Output(quiet=True).warn(["careful"])
    Output(quiet=True, as_json=True).data({}, "text")
    captured = capsys.readouterr()
    assert captured.out == "{}\n"
    assert captured.err == "warning: careful\n"


def test_json_never_holds_nan_or_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    payload = {"nan": float("nan"), "deep": [(float("inf"), 1.5)], "path": Path("x"), "no": None}
    Output(as_json=True).data(payload, "")
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": None,
        "deep": [[None, 1.5]],
        "path": "x",
        "no": None,
    }


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output().data({}, "name\x1b[2J\x07\r\u202e\nnext")
    assert capsys.readouterr().out == "name\\x1b[2J\\x07\\r\\u202e\nnext\n"


def test_half_a_surrogate_pair_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Output().data({}, "name\ud800")
    assert capsys.readouterr().out == "name\\ud800\n"


def test_labels_are_coloured_on_a_terminal_only(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    Output().warn(["one"])
    monkeypatch.setenv("NO_COLOR", "1")
    Output().warn(["two"])
    coloured, plain = terminal.getvalue().splitlines()
    assert coloured.startswith("\x1b[")
    assert plain == "warning: two"


def test_a_bar_is_drawn_on_a_terminal_in_bytes_with_speed(terminal: Terminal) -> None:
    with Output().progress() as progress:
        assert progress is not None
        progress(ProgressEvent("read", 0, 0))
        progress(ProgressEvent("merge", 500_000_000, 2_000_000_000, "w"))
        progress(ProgressEvent("finish", 2_000_000_000, 2_000_000_000))
        drawn = str(progress._bar)  # type: ignore[attr-defined]
    assert "2.00G/2.00G" in drawn
    assert "B/s" in drawn
    assert drawn.startswith("writing to disk")
    assert terminal.getvalue()


@pytest.mark.parametrize(
    ("stage", "label"),
    [("resume", "checking earlier work"), ("unmerge", "un-merging"), ("verify", "verifying")],
)
def test_a_bar_says_what_is_going_on(terminal: Terminal, stage: str, label: str) -> None:
    with Output().progress() as progress:
        assert progress is not None
        progress(ProgressEvent(stage, 1, 2))
        assert str(progress._bar).startswith(f"{label}: ")  # type: ignore[attr-defined]
    assert terminal.getvalue()


def test_no_bar_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress() as progress:
        assert progress is None
    assert capsys.readouterr().err == ""


def test_no_bar_when_quiet(terminal: Terminal) -> None:
    with Output(quiet=True).progress() as progress:
        assert progress is None
    assert terminal.getvalue() == ""


def test_a_reader_that_closes_the_pipe_ends_the_command_in_silence(tmp_path: Path) -> None:
    source = str(Path(regraft.__file__).parents[1])
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "regraft", "completion", "bash"],
        env=os.environ | {"PYTHONPATH": source},
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert process.stderr == ""
    assert process.returncode == 141


def test_only_output_prints() -> None:
    folder = Path(module.__file__).parent
    others = [path for path in folder.glob("*.py") if path.name != "output.py"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in others}
    for word in ("print(", "click.echo", "click.secho", "sys.stdout", "sys.stderr"):
        assert [name for name, text in texts.items() if word in text] == []


def test_module_and_script_are_the_same_command(launch: Launch) -> None:
    result = launch("-m", "regraft", "--version")
    assert result.returncode == 0
    assert result.stdout.startswith("regraft ")


CLOSED = """
import os, sys
for number in map(int, sys.argv[1]):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", "regraft", *sys.argv[2:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "12", "012"])
def test_a_closed_stdout_is_no_error_and_no_file_takes_its_place(
    launch: Launch, base: Path, adapter: Path, tmp_path: Path, closed: str
) -> None:
    done = launch("-c", CLOSED, closed, "merge", base, adapter, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "")
    assert regraft.verify(tmp_path / "out").ok


@pytest.mark.slow
def test_a_stdout_that_cannot_be_written_is_said_and_the_output_is_in_place(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    source = str(Path(regraft.__file__).parents[1])
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "regraft", "merge", base, adapter, "-o", tmp_path / "out"],
            env=os.environ | {"PYTHONPATH": source}, stdout=full, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 4
    assert "standard output: what was found cannot be printed" in done.stderr
    assert "whole, and in place" in done.stderr
    assert (tmp_path / "out" / "regraft" / "receipt.json").is_file()


def test_secrets_are_hidden_on_stderr_and_in_answers_but_not_in_a_models_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    token = "hf_" + "a1" * 17
    Output().warn([f"got {token}"])
    Output().note(token)
    Output().data({}, token)
    Output(as_json=True).data({"claims": f"https://a:b@c/{token}"}, "")
    captured = capsys.readouterr()
    assert token not in captured.out + captured.err
    Output(as_json=True).data({"text": token}, "", secrets=True)
    Output().stream(token)
    assert capsys.readouterr().out.count(token) == 2


def test_names_that_are_not_utf8_are_spelled_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).data({"path": Path(os.fsdecode(b"x\xff"))}, "")
    assert json.loads(capsys.readouterr().out) == {"path": "x\\xff"}


def test_the_bar_says_that_kernels_are_compiled_until_work_begins(terminal: Terminal) -> None:
    with Output().progress() as progress:
        assert progress is not None
        progress(ProgressEvent("merge", 0, 100))
        tell_compiling()
        assert "compiling for this processor, once" in terminal.getvalue()
        progress(ProgressEvent("merge", 50, 100))
    written = terminal.getvalue()
    tell_compiling()
    assert terminal.getvalue() == written


def test_what_an_encoding_does_not_have_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    ascii_only = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=ascii_only, stderr=sys.stderr))
    Output().tell("merged into é")
    assert raw.getvalue() == b"merged into \\xe9\n"
