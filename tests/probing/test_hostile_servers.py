"""A probe of servers that answer in ways that nobody asked for: nothing is believed, or hangs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import regraft
from probing.test_probe import ADAPTER_TOP, BASE_TOP, completion, like_vllm, served
from regraft.errors import InputError, UsageError
from regraft.probing.judging import verdict_of
from regraft.probing.report import PromptProbe


@contextmanager
def sending(pieces: Iterator[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Run a server that sends pieces to whoever comes; yield its address and what it was sent."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            try:
                connection, _ = listening.accept()
                with connection:
                    seen.append(connection.recv(65536))
                    for piece in pieces:
                        connection.sendall(piece)
            except OSError:
                return  # the other side left

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen


def dripping(head: bytes) -> Iterator[bytes]:
    yield head
    while True:
        time.sleep(0.05)
        yield b" "


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX:", b""])
def test_an_answer_that_never_ends_is_waited_for_no_longer_than_asked(head: bytes) -> None:
    started = time.monotonic()
    with sending(dripping(head)) as (url, _), pytest.raises(InputError, match="does not answer"):
        regraft.probe(url, adapter="sql", timeout=0.4)
    assert time.monotonic() - started < 5


def test_a_key_goes_nowhere_but_where_it_was_meant_to() -> None:
    with sending(iter([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"])) as (other, seen):
        head = f"HTTP/1.1 302 Found\r\nLocation: {other}/v1/models\r\nContent-Length: 0\r\n\r\n"
        with sending(iter([head.encode()])) as (url, asked):
            with pytest.raises(InputError, match="points to another address"):
                regraft.probe(url, adapter="sql", key="secret-key", timeout=5)
            assert b"secret-key" in asked[0]
        assert seen == []


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"text": 5}]},
        {"choices": [{"text": ["a"]}]},
        {"choices": [{"text": "a", "logprobs": {"top_logprobs": [{"a": 10**400}]}}]},
        {"choices": [{"text": "a", "logprobs": {"top_logprobs": [[1, 2]]}}]},
    ],
)
def test_answers_in_other_forms_are_typed_errors(answer: Any) -> None:
    with served(lambda _: answer) as url, pytest.raises(InputError, match="a choice with a text"):
        regraft.probe(url, adapter="sql")


def test_json_nested_without_end_is_a_typed_error() -> None:
    with served(like_vllm, raw=b"[" * 200_000) as url, pytest.raises(InputError):
        regraft.probe(url, adapter="sql")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_probabilities_that_are_none_say_nothing(value: float) -> None:
    def answer(_: dict[str, Any]) -> Any:
        return completion("a", {" a": value})

    with served(answer) as url:
        assert regraft.probe(url, adapter="sql").verdict == "cannot be judged"


@pytest.mark.parametrize(
    ("off", "verdict"),
    [
        ([0.01, 0.02], "acts"),
        ([0.01, None], "cannot be judged"),
        ([None, 0.5], "otherwise than expected"),
        ([0.5, 0.01], "otherwise than expected"),
    ],
)
def test_a_prompt_without_anything_to_compare_is_none_that_is_right(
    off: list[float | None], verdict: str
) -> None:
    found = [PromptProbe("p", "a", "b", 1.0, each, None) for each in off]
    assert verdict_of(found, True, 0.1) == verdict


def test_a_server_that_is_still_loading_is_waited_for() -> None:
    ready = time.monotonic() + 0.6

    def answer(asked: dict[str, Any]) -> Any:
        acts = asked["model"] == "sql"
        return completion("b" if acts else "a", ADAPTER_TOP if acts else BASE_TOP)

    with served(answer, ready=lambda: time.monotonic() > ready) as url:
        assert regraft.probe(url, adapter="sql", timeout=10).verdict == "acts"


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://localhost:x", "http://localhost/\u00e4", "ftp://a",
     "http://" + "a" * 80]
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        regraft.probe(url, adapter="sql")


@pytest.mark.parametrize("timeout", [float("nan"), 0.0, -1.0, 1e300])
def test_a_time_to_wait_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(UsageError, match="--timeout"):
        regraft.probe("http://localhost:1", adapter="sql", timeout=timeout)


@pytest.mark.parametrize("key", ["a\nb", "\u043a\u043b\u044e\u0447"])
def test_a_key_that_no_request_can_carry_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="key"):
        regraft.probe("http://localhost:1", adapter="sql", key=key)
