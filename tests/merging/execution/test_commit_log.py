"""What threads finish out of order waits for its turn, and whoever waits goes on."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from regraft.merging.execution import commit_log
from regraft.merging.execution.commit_log import Closing, Ledger


class Patch:
    """Takes what an undo patch would."""

    def __init__(self) -> None:
        self.content = b""

    def append(self, data: Any) -> None:
        """Take bytes."""
        self.content += bytes(data)

    def end(self, name: str) -> None:
        """End a section."""
        self.content += f"|{name}|".encode()


def test_what_waits_for_room_goes_on_once_what_comes_before_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commit_log, "WAITING_BYTES", 4)
    monkeypatch.setattr(commit_log, "SECONDS_BETWEEN_NOTES", 1e9)
    patch: Any = Patch()
    place: Any = None
    ledger = Ledger(0, place, patch, lambda: None)
    ledger.deposit(0, 1, np.frombuffer(b"bbbb", np.uint8))
    late = threading.Thread(
        target=ledger.deposit, args=(0, 2, np.frombuffer(b"cc", np.uint8)), daemon=True
    )
    late.start()
    late.join(0.05)
    assert late.is_alive()  # there is room for four bytes
    ledger.deposit(0, 0, np.frombuffer(b"a", np.uint8))
    late.join(10)
    assert not late.is_alive()
    ledger.close_job(0, Closing(3, {"name": "first"}, [("tensor", b"end")]))
    assert patch.content == b"abbbbccend|tensor|"
