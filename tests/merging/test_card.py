"""The card's metadata: only what can be a Hub id is named as one."""

from __future__ import annotations

from pathlib import Path

import pytest

import regraft
from merging import toys


@pytest.mark.parametrize(
    ("claimed", "named"), [("org/base-1.5B", True), (".demo/base", False), ("../x/y", False)]
)
def test_the_base_is_named_only_if_it_can_be_a_hub_id(
    tmp_path: Path, claimed: str, named: bool
) -> None:
    base = toys.write_base(tmp_path / "base")
    adapter = toys.write_adapter(tmp_path / "a", base_model_name_or_path=claimed)
    regraft.merge(base, adapter, tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert (f"- {claimed}\n" in front) == named
