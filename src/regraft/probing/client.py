"""Requests to a server, and its replies, as plain values."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from regraft.errors import InputError, UsageError
from regraft.formats.problems import quoted

MOST_BYTES = 2**24
"""Of an answer no more is read than this."""

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
    """

    where: str
    status: int
    software: str
    raw: bytes

    @property
    def refused(self) -> bool:
        """Whether the server refused."""
        return self.status >= 400

    @property
    def said(self) -> str:
        """What the server says, as text."""
        return self.raw.decode("utf-8", "replace")

    def value(self, hint: str = "Its log says why") -> Any:
        """Return the body as plain values.

        Raises:
            InputError: the server refused, or the body is no JSON.
        """
        if self.refused:
            raise InputError(f"the server refused ({self.status})", where=self.where,
                             found=quoted(self.said), hint=hint)  # fmt: skip
        try:
            return json.loads(self.raw)
        except ValueError:
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
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("this is no address of a server", where="URL",
                             expected="http://HOST:PORT", found=quoted(url))  # fmt: skip
        self.root = parts._replace(query="", fragment="").geturl().rstrip("/").removesuffix("/v1")
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
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return _reply(where, response, response.status, MOST_BYTES)
        except urllib.error.HTTPError as error:
            return _reply(where, error, error.code, MOST_SAID)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError("the server does not answer", where=where,
                             found=quoted(str(reason) or type(error).__name__),
                             hint="Is it running, and is this its address? --timeout waits "
                             "longer") from None  # fmt: skip


def _reply(where: str, response: Any, status: int, most: int) -> Reply:
    said = response.read(most) or (b"" if status < 400 else str(response.reason).encode())
    return Reply(where, status, str(response.headers.get("Server", "")), said)
