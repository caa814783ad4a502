"""What a plan says of the adapters that it was given."""

from __future__ import annotations

from pathlib import Path

import regraft
from merging import toys


def test_an_adapter_that_is_named_twice_is_said(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "adapter")
    (said,) = regraft.plan(base, [adapter, adapter]).warnings
    assert "is named 2 times" in said
    assert not regraft.plan(base, [adapter, (adapter, 0.5)]).warnings
