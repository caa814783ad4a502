"""Saving over an adapter where its folder cannot be swapped for another one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from regraft.formats.adapter_files import open_adapter
from regraft.formats.hub import locate
from regraft.runtime.saving.files import write_adapter
from runtime.saving.test_saving import CONFIG, WEIGHTS, content, small


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_where_no_file_can_be_linked_the_new_adapter_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """File systems without hard links: what lies beside the adapter cannot be in two folders."""
    config, tensors = small()
    folder = write_adapter(tmp_path / "a", config, tensors)
    (folder / "notes.txt").write_text("kept")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    _, other = small(seed=1)
    write_adapter(folder, config | {"lora_alpha": 9}, other)
    assert open_adapter(locate(folder, kind="adapter")).config["lora_alpha"] == 9
    fresh = write_adapter(tmp_path / "b", config | {"lora_alpha": 9}, other)
    assert content(folder) == content(fresh) | {"notes.txt": b"kept"}
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
