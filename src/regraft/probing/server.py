"""A server that speaks OpenAI's API, asked for the answers of a base and of an adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.errors import InputError, UsageError
from regraft.formats.problems import quoted
from regraft.probing.client import Client, Reply
from regraft.probing.kinds import KINDS, TOP, Asked, Kind, Model, Side, Sides, kind_of
from regraft.verifying.prompting.file import Prompt

LOADING = 503
"""The status of a server that is not ready."""

Token = int | str
"""A token by its number where a server gives it, else by its text."""


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    Attributes:
        text: what it wrote.
        logprobs: log-probabilities of the likeliest first tokens; None where it hides them.
        prompt_tokens: into how many tokens it cut the prompt; None where it does not say.
    """

    text: str
    logprobs: Mapping[Token, float] | None
    prompt_tokens: int | None = None


class Server:
    """A server at an address.

    Args:
        client: what asks it.
        engine: its kind, a key of :data:`KINDS`; by default what it says itself.

    Raises:
        UsageError: there is no such kind.
        InputError: no server answers there, it lists no models, or it is of another kind.
    """

    def __init__(self, client: Client, engine: str | None = None) -> None:
        if engine is not None and engine not in KINDS:
            raise UsageError("there is no server of that name", where="--for",
                             expected=", ".join(KINDS), found=quoted(engine))  # fmt: skip
        self.client = client
        reply = _once_loaded(client)
        # Without a cache of the Hub on its machine mlx_lm.server fails at its list, after the
        # headers: the reply is empty.
        is_empty = not reply.refused and not reply.raw
        told = kind_of([], reply.software)
        lists_none = is_empty and "mlx" in (engine, told.name)
        self.models = () if lists_none else _models(reply)
        told = kind_of(self.models, reply.software)
        if engine is not None and told.owner is not None and told.name != engine:
            raise InputError("the server says that it is another one", where=client.root,
                             expected=engine, found=told.name, hint="Leave --for out")  # fmt: skip
        self.kind = KINDS[engine] if engine is not None else told

    def sides(self, adapter: str, base: str | None) -> Sides:
        """Return how to ask for the base and for the adapter.

        Raises:
            InputError: it has no such model or adapter.
        """
        return self.kind.sides(Asked(self.client, self.models, adapter, base))

    def answer(self, side: Side, prompt: Prompt, tokens: int) -> Answer:
        """Return what one side answers, greedily.

        Raises:
            InputError: the server does not answer, or in another form.
        """
        asked = {**side.fields, **self.kind.fields,
                 "max_tokens": tokens, "temperature": 0, "seed": 0}  # fmt: skip
        logprobs: Mapping[str, Any]
        if prompt.messages:
            path, logprobs = "/v1/chat/completions", {"logprobs": True, "top_logprobs": TOP}
            asked["messages"] = list(prompt.messages)
        else:
            path, logprobs = "/v1/completions", self.kind.logprobs
            asked["prompt"] = prompt.text
        reply = self.client.ask(path, {**asked, **logprobs})
        if reply.refused and "logprobs" in reply.said:  # it gives none: its text is left
            reply = self.client.ask(path, asked)
        return _answer(reply, self.kind)


def _once_loaded(client: Client) -> Reply:
    """Return a server's list of models; one that is still loading (503) is waited for."""
    end = time.monotonic() + client.timeout
    while (reply := client.ask("/v1/models")).status == LOADING and time.monotonic() < end:
        time.sleep(min(1.0, client.timeout / 10))
    return reply


def _models(reply: Reply) -> tuple[Model, ...]:
    listed = reply.value()
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list):
        raise reply.strange("a list of models")
    return tuple(
        Model(str(each["id"]), str(each.get("owned_by") or ""), _text(each.get("parent")))
        for each in entries if isinstance(each, dict) and "id" in each
    )  # fmt: skip


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _answer(reply: Reply, kind: Kind) -> Answer:
    told = reply.value(kind.hint)
    try:
        choice, usage = told["choices"][0], told.get("usage") or {}
        text = (choice["message"]["content"] if "message" in choice else choice["text"]) or ""
        if not isinstance(text, str):
            raise TypeError(text)
        logprobs = choice.get("logprobs")
        if logprobs and _first_is_left_out(logprobs, text, usage):
            logprobs = None
        return Answer(text, _first(logprobs), usage.get("prompt_tokens"))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
        raise reply.strange("a choice with a text") from None


def _first_is_left_out(told: Any, text: str, usage: Mapping[str, Any]) -> bool:
    """Whether the first of the tokens told is not the first of the answer.

    llama.cpp's server leaves tokens out that are a part of a character.
    """
    content = told.get("content")
    if not content or len(content) >= usage.get("completion_tokens", 0):
        return False
    token = str(content[0]["token"])
    return "\ufffd" in token or not text.startswith(token)


def _first(told: Any) -> dict[Token, float] | None:
    """Return the log-probabilities of the first token, in either of the API's forms."""
    if not told:
        return None
    pairs: list[tuple[Token, Any]]
    if content := told.get("content"):
        pairs = [
            (each["id"] if isinstance(each.get("id"), int) else str(each["token"]), each["logprob"])
            for each in content[0].get("top_logprobs", ())
        ]
    elif top := told.get("top_logprobs"):
        pairs = list((top[0] or {}).items())
    else:
        return None
    numbers = ((token, float(value)) for token, value in pairs)
    # NaN tells nothing, and a probability of 0 cannot be held against another.
    return {token: value for token, value in numbers if math.isfinite(value)} or None
