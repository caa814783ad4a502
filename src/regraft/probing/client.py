"""Requests to a server, and its replies, as plain values."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from regraft.errors import InputError, UsageError
from regraft.formats.problems import quoted

MOST_BYTES = 2**24
"""Of an answer no more is read than this."""

LONGEST = 86400.0
"""Seconds that an answer is waited for at most."""

MOST_SAID = 300
"""Of what a server says when it refuses, no more is read than this."""


@dataclass(frozen=True)
class Reply:
    """What a server replied, of whatever status.

    Attributes:
        where: the address that was asked.
        status: the HTTP status.
        software: its ``Server`` header, empty where it has none.
        raw: the body; its beginning if the server refused.
        elsewhere: where a reply points that is none.
    """

    where: str
    status: int
    software: str
    raw: bytes
    elsewhere: str = ""

    @property
    def refused(self) -> bool:
        """Whether the server refused; a reply that points elsewhere is not followed."""
        return self.status >= 300

    @property
    def said(self) -> str:
        """What the server says, as text."""
        return self.raw.decode("utf-8", "replace")

    def value(self, hint: str = "Its log says why") -> Any:
        """Return the body as plain values.

        Raises:
            InputError: the server refused, or the body is no JSON.
        """
        if self.status < 400 and self.refused:
            raise InputError("the server points to another address", where=self.where,
                             found=quoted(self.elsewhere or "none"),
                             hint="Give that one, if it is to be asked: a key goes nowhere else "
                             "than where it was meant to")  # fmt: skip
        if self.refused:
            raise InputError(f"the server refused ({self.status})", where=self.where,
                             found=quoted(self.said), hint=hint)  # fmt: skip
        try:
            return json.loads(self.raw)
        except (ValueError, RecursionError):  # nested so deep that nobody meant it
            raise self.strange("JSON") from None

    def strange(self, expected: str) -> InputError:
        """Return the error of a reply in another form."""
        return InputError(
            "the server answered in a form that is not OpenAI's", where=self.where,
            expected=expected, hint="Is this the address of its API?",
        )  # fmt: skip


class Client:
    """What asks a server at an address.

    Args:
        url: its address, with or without ``/v1``.
        timeout: seconds to wait for each reply.
        key: what it is asked with, if it wants a key.

    Raises:
        UsageError: that is no address of a web server.
    """

    def __init__(self, url: str, timeout: float, key: str | None = None) -> None:
        if not 0 < timeout <= LONGEST:
            raise UsageError("the time to wait is a number of seconds", where="--timeout",
                             expected=f"above 0, up to {LONGEST:g}",
                             found=f"{timeout:g}")  # fmt: skip
        if key and not (key.isascii() and key.isprintable()):
            raise UsageError("the key has characters that no request can carry",
                             where="OPENAI_API_KEY", expected="printable ASCII")  # fmt: skip
        self.root = _root_of(url)
        self.timeout, self.key = timeout, key

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """Return the reply to a request, which is a POST if it has a body.

        Raises:
            InputError: no server answers there.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        where = self.root + path
        request = urllib.request.Request(where, data, headers)
        try:
            return _within(self.timeout, lambda: _replied(request, self.timeout))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError("the server does not answer", where=where,
                             found=quoted(str(reason) or type(error).__name__),
                             hint="Is it running, and is this its address? --timeout waits "
                             "longer") from None  # fmt: skip


def _root_of(url: str) -> str:
    """Return a server's address without the path of its API.

    Raises:
        UsageError: it is none.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
        good = parts.scheme in ("http", "https") and host and parts.path.isascii()
    except ValueError:
        good = False
    if not good:
        raise UsageError("this is no address of a server", where="URL",
                         expected="http://HOST:PORT", found=quoted(url))  # fmt: skip
    return parts._replace(query="", fragment="").geturl().rstrip("/").removesuffix("/v1")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go to whoever the server names."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Return nothing, so that the reply is handed on as it is."""


def _replied(request: urllib.request.Request, timeout: float) -> Reply:
    """Return a server's reply; ``timeout`` is for each piece of it that arrives."""
    opener = urllib.request.build_opener(_Stay)
    try:
        with opener.open(request, timeout=timeout) as response:
            return _reply(request.full_url, response, response.status, MOST_BYTES)
    except urllib.error.HTTPError as error:
        return _reply(request.full_url, error, error.code, MOST_SAID)


def _reply(where: str, response: Any, status: int, most: int) -> Reply:
    said = response.read(most) or (b"" if status < 400 else str(response.reason).encode())
    headers = response.headers
    elsewhere = str(headers.get("Location", "")) if status >= 300 else ""
    return Reply(where, status, str(headers.get("Server", "")), said, elsewhere)


def _within(seconds: float, work: Callable[[], Reply]) -> Reply:
    """Return what work returns in a given time, however slowly a server sends.

    The thread of work that takes longer is left behind; it ends with the process.

    Raises:
        TimeoutError: it takes longer.
        OSError, HTTPException: what the work raises.
    """
    done: list[Reply] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # raised below, in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no whole answer in {seconds:g} s")
    return done[0]
