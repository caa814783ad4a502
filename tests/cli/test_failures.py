"""Errors: which exit code, which stream, which words."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable

import pytest

from cli.kinds import FakeApi, Run
from regraft.cli.failures import explain
from regraft.errors import (
    AccessError,
    AdapterError,
    DiskSpaceError,
    MemoryCapError,
    MismatchError,
    MissingExtraError,
    Problem,
    RegraftError,
    UsageError,
)

MERGE = ("merge", "base", "adapter", "-o", "out")


def raising(error: BaseException) -> Callable[..., None]:
    """Return a function that raises ``error``."""

    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UsageError, 2),
        (AdapterError, 3),
        (MismatchError, 3),
        (MissingExtraError, 4),
        (DiskSpaceError, 4),
        (MemoryCapError, 4),
        (AccessError, 4),
    ],
)
def test_a_typed_error_decides_the_exit_code(
    run: Run, fake_api: FakeApi, kind: type[RegraftError], code: int
) -> None:
    error = kind("it broke", where="a file", expected="1", found="2", hint="Mend it")
    fake_api(merge=raising(error))
    result = run(*MERGE)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "error: a file: it broke; expected 1; found 2. Mend it\n"


def test_json_mode_puts_the_error_on_stdout_and_the_words_on_stderr(
    run: Run, fake_api: FakeApi
) -> None:
    problems = [Problem("first", where="x"), Problem("second", hint="Try again")]
    fake_api(merge=raising(MismatchError(problems)))
    result = run(*MERGE, "--json")
    assert json.loads(result.stdout) == {
        "error": {
            "type": "MismatchError",
            "exit_code": 3,
            "problems": [
                {"what": "first", "where": "x"},
                {"what": "second", "hint": "Try again"},
            ],
        }
    }
    assert result.stderr == "error: 2 problems\n  - x: first\n  - second. Try again\n"


def test_an_unforeseen_error_is_an_apology_without_a_traceback(
    run: Run, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REGRAFT_DEBUG", raising=False)
    fake_api(merge=raising(ZeroDivisionError("one\ntwo")))
    result = run(*MERGE)
    assert result.exit_code == 70
    assert result.stderr.count("\n") == 1
    assert "sorry" in result.stderr
    assert "ZeroDivisionError: one" in result.stderr
    assert "/issues" in result.stderr
    assert "Traceback" not in result.stderr


def test_debugging_shows_the_traceback(
    run: Run, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_DEBUG", "1")
    fake_api(merge=raising(ZeroDivisionError("one")))
    result = run(*MERGE, "--json")
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "ZeroDivisionError"


def test_an_interrupt_is_one_line_and_130(run: Run, fake_api: FakeApi) -> None:
    fake_api(merge=raising(KeyboardInterrupt()))
    result = run(*MERGE)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "regraft: interrupted\n"


def noted(error: BaseException, *notes: str) -> BaseException:
    """Return an error with notes."""
    for note in notes:
        error.add_note(note)
    return error


def test_an_interrupt_says_what_became_of_the_work(run: Run, fake_api: FakeApi) -> None:
    fake_api(merge=raising(noted(KeyboardInterrupt(), "the work is kept", "go on")))
    result = run(*MERGE, "--json")
    assert result.exit_code == 130
    assert result.stderr == "regraft: interrupted. The work is kept; go on\n"
    error = json.loads(result.stdout)["error"]
    assert error["problems"] == [{"what": "interrupted", "hint": "The work is kept; go on"}]


def test_the_notes_of_an_error_come_after_its_problems(run: Run, fake_api: FakeApi) -> None:
    problems = [Problem("first"), Problem("second", hint="Try again")]
    fake_api(merge=raising(noted(DiskSpaceError(problems), "the work is kept")))
    result = run(*MERGE, "--json")
    assert result.exit_code == 4
    assert result.stderr == (
        "error: 2 problems\n  - first\n  - second. Try again\nnote: the work is kept\n"
    )
    assert json.loads(result.stdout)["error"]["notes"] == ["the work is kept"]


def test_notes_are_found_along_the_chain_and_told_once() -> None:
    cause = noted(OSError(errno.EIO, "the words"), "kept", "first")
    error = noted(AccessError("cannot write"), "kept")
    error.__cause__ = cause
    assert isinstance(error, AccessError)
    assert explain(error).notes == ("kept", "first")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "x"), ZeroDivisionError()])
def test_every_kind_of_error_may_have_notes(error: Exception) -> None:
    noted(error, "the work is kept")
    assert explain(error).notes == ("the work is kept",)
    assert "notes" not in explain(type(error)()).to_json()["error"]


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, "DiskSpaceError", 4),
        (errno.EDQUOT, "DiskSpaceError", 4),
        (errno.EACCES, "AccessError", 4),
        (errno.EROFS, "AccessError", 4),
        (errno.ENOENT, "InputError", 3),
        (errno.EIO, "EnvironmentShortfall", 4),
    ],
)
def test_what_the_system_says_is_typed(number: int, kind: str, code: int) -> None:
    failure = explain(OSError(number, "the words", "/some/file"))
    assert (failure.kind, failure.exit_code) == (kind, code)
    assert str(failure.problems[0]) == "/some/file: the words"


def test_running_out_of_memory_names_the_option_that_helps() -> None:
    failure = explain(MemoryError())
    assert failure.exit_code == 4
    assert "--max-memory" in failure.problems[0].hint


def test_a_warning_has_no_source_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn("the base is another one", UserWarning, stacklevel=2)
        raise UsageError("stop")

    monkeypatch.setattr("regraft.undoing.clean", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        told = run("clean").stderr
        assert warnings.showwarning is before
    assert told.splitlines()[0] == "warning: the base is another one"
    assert ".py" not in told
