"""A client of servers that speak OpenAI's API: vLLM, SGLang, llama.cpp's, mlx_lm.server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from regraft.errors import InputError, UsageError
from regraft.formats.files.reading import expanded, is_there
from regraft.formats.problems import quoted
from regraft.verifying.prompting.file import Prompt

TOP = 5
"""Log-probabilities that are asked for: no server refuses so few."""

MOST_BYTES = 2**24
"""Of an answer no more is read than this."""


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    Attributes:
        text: what it wrote.
        logprobs: log-probabilities of the likeliest first tokens, by their text; None where it
            hides them.
    """

    text: str
    logprobs: Mapping[str, float] | None


@dataclass(frozen=True)
class Side:
    """How to ask for the base, or for the adapter.

    Attributes:
        shown: its name.
        fields: what a request has in it for that.
    """

    shown: str
    fields: Mapping[str, Any]


class Server:
    """A server at an address.

    Args:
        url: its address, with or without ``/v1``.
        timeout: seconds to wait for each answer.
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

    # -- what it has -----------------------------------------------------------------------------

    def sides(self, adapter: str, base: str | None) -> tuple[Side, Side]:
        """Return how to ask for the base and for the adapter.

        vLLM and SGLang list an adapter as a model; llama.cpp's server has a list of its own, and a
        scale for each; mlx_lm.server is given its folder.

        Raises:
            InputError: it has no such model or adapter.
        """
        models = self._models()
        if adapter in models:
            named = base or next((name for name in models if name != adapter), None)
            if named is None or named not in models:
                raise self._no_model(named or "of the base", models)
            return Side(named, {"model": named}), Side(adapter, {"model": adapter})
        named = base or next(iter(models), "")
        if base is not None and base not in models:
            raise self._no_model(base, models)
        found = self._adapters()
        number = next((i for i, names in found.items() if adapter in names), None)
        if number is not None:
            off = [{"id": i, "scale": 0.0} for i in found]
            on = [{"id": i, "scale": float(i == number)} for i in found]
            return (Side(named, {"model": named, "lora": off}),
                    Side(adapter, {"model": named, "lora": on}))  # fmt: skip
        if not found and is_there(expanded(adapter)):
            return (Side(named, {"model": named}),
                    Side(adapter, {"model": named, "adapters": adapter}))  # fmt: skip
        raise self._no_model(adapter, [*models, *(max(n, key=len) for n in found.values())])

    def _models(self) -> list[str]:
        listed = self._ask("/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list):
            raise self._strange("/v1/models", "a list of models")
        return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]

    def _adapters(self) -> dict[int, set[str]]:
        """Return the names of each adapter of a llama.cpp server; none where it is another one."""
        try:
            listed = self._ask("/lora-adapters")
        except InputError:
            return {}
        entries = listed if isinstance(listed, list) else []
        return {
            int(entry["id"]): {str(entry["id"]), str(entry.get("path", "")),
                               PurePath(str(entry.get("path", ""))).stem}
            for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), int)
        }  # fmt: skip

    def _no_model(self, name: str, there: list[str]) -> InputError:
        return InputError(
            "the server has no such model or adapter", where=self.root,
            expected=", ".join(map(quoted, there[:10])) or "some", found=quoted(name),
            hint="Start it with the adapter, or name it as the server does",
        )  # fmt: skip

    # -- asking ----------------------------------------------------------------------------------

    def answer(self, side: Side, prompt: Prompt, tokens: int) -> Answer:
        """Return what one side answers, greedily.

        Raises:
            InputError: the server does not answer, or in another form.
        """
        asked: dict[str, Any] = {**side.fields, "max_tokens": tokens, "temperature": 0, "seed": 0}
        if prompt.messages:
            path = "/v1/chat/completions"
            asked |= {"messages": list(prompt.messages), "logprobs": True, "top_logprobs": TOP}
        else:
            path = "/v1/completions"
            asked |= {"prompt": prompt.text, "logprobs": TOP}
        told = self._ask(path, asked)
        try:
            choice = told["choices"][0]
            text = choice["message"]["content"] if prompt.messages else choice["text"]
            return Answer(text or "", _first(choice.get("logprobs")))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise self._strange(path, "a choice with a text") from None

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.root + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                raw = response.read(MOST_BYTES)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode("utf-8", "replace") if error.fp else ""
            raise InputError(f"the server refused ({error.code})", where=self.root + path,
                             found=quoted(said or str(error.reason)),
                             hint="Its log says why") from None  # fmt: skip
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError("the server does not answer", where=self.root + path,
                             found=quoted(str(reason) or type(error).__name__),
                             hint="Is it running, and is this its address? --timeout waits "
                             "longer") from None  # fmt: skip
        try:
            return json.loads(raw)
        except ValueError:
            raise self._strange(path, "JSON") from None

    def _strange(self, path: str, expected: str) -> InputError:
        return InputError(
            "the server answered in a form that is not OpenAI's", where=self.root + path,
            expected=expected, hint="Is this the address of its API?",
        )  # fmt: skip


def _first(told: Any) -> dict[str, float] | None:
    """Return the log-probabilities of the first token, in either of the API's forms."""
    if not told:
        return None
    if content := told.get("content"):
        pairs = [(each["token"], each["logprob"]) for each in content[0].get("top_logprobs", ())]
    elif top := told.get("top_logprobs"):
        pairs = list((top[0] or {}).items())
    else:
        return None
    return {str(token): float(value) for token, value in pairs} or None
