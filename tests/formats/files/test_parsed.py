"""Side files that other libraries read whole are looked at before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from regraft.errors import FormatError
from regraft.formats.files.parsed import check_parsed


def of_size(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, size)

    return make


def of(text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_text(text)

    return make


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("generation_config.json", of_size(2**31), "too large"),
        ("tokenizer_config.json", of("[" * 100_000), "nested too deep"),
        ("special_tokens_map.json", of('{"a": ' + "9" * 5000 + "}"), "limit"),
        ("processor_config.json", of("{"), "JSON"),
        ("tokenizer.json", of_size(2**31), "too large"),
        ("tokenizer.model", of_size(2**31), "too large"),
        ("chat_template.jinja", of_size(2**23), "too large"),
        ("additional_chat_templates/a.jinja", of_size(2**23), "too large"),
    ],
)
def test_what_would_take_too_much_is_refused_by_name(
    tmp_path: Path, name: str, make: Callable[[Path], None], said: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(FormatError, match=said) as caught:
        check_parsed(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_all_of_them_are_named_together_and_sound_ones_pass(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    os.mkfifo(tmp_path / "tokenizer.json")  # which is no file, and read by nobody
    check_parsed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "added_tokens.json").write_text("}")
    with pytest.raises(FormatError) as caught:
        check_parsed(tmp_path)
    assert len(caught.value.problems) == 2
