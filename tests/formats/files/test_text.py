"""Names and words of strangers, as text that can be stored, shown and pasted."""

from __future__ import annotations

import ast
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.formats.files.text import (
    path_word,
    plain_text,
    python_string,
    shell_word,
    spelled,
    unspelled,
)

NAMES = st.binary(min_size=1, max_size=8) | st.text(
    st.sampled_from("\\xfea0/é\n"), min_size=1, max_size=12
).map(str.encode)
ODD = ["plain", "two words", "it's", "a\nb", '`rm`$(rm)"|', "\x1b[2J", "é\u202e", "\\n", "x\udcff"]


@given(NAMES, NAMES)
def test_no_two_names_are_spelled_alike(one: bytes, other: bytes) -> None:
    a, b = os.fsdecode(one), os.fsdecode(other)
    assert (spelled(a) == spelled(b)) == (a == b)
    assert unspelled(spelled(a)) == a
    spelled(a).encode()


def test_a_usual_name_is_spelled_as_it_is() -> None:
    assert spelled("dir/a\\b é.txt") == "dir/a\\b é.txt"
    assert spelled(os.fsdecode(b"a\xff.txt")) == "a\\xff.txt"
    assert spelled("a\\xff.txt") == "a\\\\xff.txt"
    assert unspelled("no \\xff name of ours \\") == "no \\xff name of ours \\"


def test_a_text_with_half_a_surrogate_pair_can_be_encoded() -> None:
    assert plain_text("a\ud800b").encode() == b"a\\ud800b"
    assert plain_text("aéb") == "aéb"


@pytest.mark.parametrize("text", ODD)
def test_a_literal_of_python_is_that_text_on_one_line(text: str) -> None:
    literal = python_string(text)
    assert ast.literal_eval(literal) == text
    assert literal.isprintable()


@pytest.mark.parametrize("text", ODD)
def test_a_word_of_a_shell_is_that_text_on_one_line(text: str) -> None:
    word = shell_word(text)
    assert word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(text)


def test_a_path_is_no_option() -> None:
    assert path_word("-rf") == "./-rf"
    assert path_word("a b") == "'a b'"
    assert path_word("=ls") == "'=ls'"  # zsh would look for a program
