"""JSON files a stranger made are read within limits, and refused with a typed error otherwise."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from regraft.errors import AccessError, FormatError, InputError
from regraft.formats.files.json_file import read_json, read_json_object


def write(folder: Path, content: bytes) -> Path:
    path = folder / "config.json"
    path.write_bytes(content)
    return path


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": [1, 2.5, null, "é"], "b": {"c": "\\ud83d\\ude00"}}'.encode())
    assert read_json_object(path) == {"a": [1, 2.5, None, "é"], "b": {"c": "😀"}}


def test_infinity_is_read_because_published_configs_hold_it(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, b'{"limit": [0.0, Infinity]}')) == {"limit": [0.0, math.inf]}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "Expecting value at line 1"),
        (b'{"a": 1', "at line 1, column 8"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"x": {"b": 1, "c": 1, "b": 1}}', "the key 'b' occurs twice"),
        (b'{"a": "\xff"}', "not UTF-8 at 7"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b"[" * 65 + b"]" * 65, "more than 64 levels"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b"1" * 5000, "digits"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(FormatError, match="cannot be read as JSON") as caught:
        read_json(path)
    (problem,) = caught.value.problems
    assert found in problem.found
    assert problem.where == str(path)
    assert problem.expected
    assert problem.hint


def test_depth_is_counted_in_levels(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"a": [[]]}')
    assert read_json(path, max_depth=3) == {"a": [[]]}
    with pytest.raises(FormatError, match="more than 2 levels"):
        read_json(path, max_depth=2)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: reading it whole would take a terabyte
    with pytest.raises(FormatError, match=r"too large.*at most 67108864 bytes"):
        read_json(path)
    exact = write(tmp_path, b"[1]")
    assert read_json(exact, max_bytes=3) == [1]
    with pytest.raises(FormatError, match="found 3 bytes"):
        read_json(exact, max_bytes=2)


def test_another_value_than_an_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found a list"):
        read_json_object(write(tmp_path, b"[]"))


def test_a_missing_file_a_folder_and_a_pipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FormatError, match="found a folder"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FormatError, match="found a pipe"):
        read_json(tmp_path / "pipe.json")


def test_what_the_system_refuses_is_an_access_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(AccessError, match="refused to read it"):
        read_json(loop)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}
