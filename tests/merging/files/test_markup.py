"""Words of strangers stay words in Markdown."""

from __future__ import annotations

import pytest

from regraft.merging.files.markup import block, cell, code, prose

FENCE = "```"


def test_prose_escapes_marks_and_leaves_usual_names() -> None:
    assert prose("my_model-7B.v1") == "my_model-7B.v1"
    assert prose("<b>[x](y)_z_`") == "\\<b\\>\\[x\\](y)\\_z\\_\\`"
    assert prose("a\n# b") == r"a\\n\# b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a", "`a`"), ("", ""), ("a`b", "``a`b``"), ("`a", "`` `a ``"), ("a\nb", r"`a\nb`")],
)
def test_code_is_closed_by_its_own_marks_alone(text: str, shown: str) -> None:
    assert code(text) == shown


def test_a_bar_ends_no_cell() -> None:
    assert cell("a|b") == r"`a\|b`"
    assert cell("a\\|b") == r"`a\\x7cb`"


def test_a_block_is_longer_than_any_fence_in_it() -> None:
    assert block("a\nb", "python") == f"{FENCE}python\na\nb\n{FENCE}"
    assert block(f"{FENCE}\nb") == f"````\n{FENCE}\nb\n````"
    assert block("a\x1b[2J") == f"{FENCE}\na\\x1b[2J\n{FENCE}"
