"""The number of threads of numpy's library, which is the process's, is as it was afterwards."""

from __future__ import annotations

import threading

import pytest

from regraft.deltas.ranks import blas_threads as threads


def test_it_is_one_inside_and_as_before_after_the_last_one_left() -> None:
    calls = threads._calls()
    if calls is None:
        pytest.skip("this numpy comes with another library")
    get, put = calls
    before = get()
    put(2)
    try:
        with threads.one_thread():
            assert get() == 1
            with pytest.raises(ValueError, match="inner"), threads.one_thread():
                raise ValueError("inner")
            assert get() == 1
        assert get() == 2
    finally:
        put(before)


def test_those_that_overlap_in_time_leave_what_there_was() -> None:
    calls = threads._calls()
    if calls is None:
        pytest.skip("this numpy comes with another library")
    get, put = calls
    before = get()
    put(2)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with threads.one_thread():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    try:
        with threads.one_thread():
            thread.start()
            assert entered.wait(10)
        assert get() == 1  # the other is inside still
        leave.set()
        thread.join()
        assert get() == 2
    finally:
        leave.set()
        put(before)


def test_without_that_library_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_calls", lambda: None)
    with threads.one_thread():
        assert not threads._inside
