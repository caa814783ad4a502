"""The servers that are known: how each is told, and how it is asked for a base and an adapter.

vLLM lists adapters as models and takes their names. SGLang lists them so, too, but takes a name as
``lora_path``: with the adapter's name as the model it answers as the base. llama.cpp's server has a
list of its own, and takes a scale for each. mlx_lm.server lists no adapters and takes a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from regraft.errors import InputError
from regraft.formats.files.reading import expanded, is_there
from regraft.formats.problems import quoted
from regraft.probing.client import Client

TOP = 5
"""Log-probabilities that are asked for: no server refuses so few."""


@dataclass(frozen=True)
class Model:
    """A model that a server lists.

    Attributes:
        name: what requests call it.
        owner: what the server says of itself.
        parent: of an adapter, the model that it is for.
    """

    name: str
    owner: str
    parent: str | None


@dataclass(frozen=True)
class Side:
    """How to ask for the base, or for the adapter.

    Attributes:
        shown: its name.
        fields: what a request has in it for that.
    """

    shown: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Sides:
    """How to ask for both, and what the user should know of it."""

    base: Side
    adapter: Side
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What sides are looked for: where, among which models, under which names."""

    client: Client
    models: tuple[Model, ...]
    adapter: str
    base: str | None

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return [model.name for model in self.models]

    def missing(self, name: str, there: Sequence[str], hint: str) -> InputError:
        """Return the error of a name that the server does not know."""
        return InputError(
            "the server has no such model or adapter", where=self.client.root,
            expected=", ".join(map(quoted, there[:10])) or "some", found=quoted(name), hint=hint,
        )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of server.

    Attributes:
        name: as ``--for`` calls it.
        owner: whose models it says it lists.
        software: how its ``Server`` header begins, where it is told by that.
        sides: how it is asked for base and adapter.
        logprobs: what asks it for log-probabilities of a text's continuation.
        fields: what every request has in it.
        hint: what to do where it refuses.
    """

    name: str
    owner: str | None
    software: str | None
    sides: Callable[[Asked], Sides]
    logprobs: Mapping[str, Any] = field(default_factory=lambda: {"logprobs": TOP})
    fields: Mapping[str, Any] = field(default_factory=dict)
    hint: str = "Its log says why"


# -- how each is asked for base and adapter --------------------------------------------------------


def _base_and_adapter(asked: Asked, hint: str) -> tuple[str, str]:
    """Return the names of both, where an adapter is listed as a model."""
    found = {model.name: model for model in asked.models}
    if asked.adapter not in found:
        raise asked.missing(asked.adapter, asked.names, hint)
    others = [name for name in asked.names if name != asked.adapter]
    base = asked.base or found[asked.adapter].parent or next(iter(others), None)
    if base is None or base not in found:
        raise asked.missing(base or "of the base", asked.names, "Name it with --base")
    return base, asked.adapter


def _by_model(asked: Asked, hint: str = "") -> Sides:
    hint = hint or "Name it as the server does; where it is one of another kind, say which (--for)"
    base, adapter = _base_and_adapter(asked, hint)
    return Sides(Side(base, {"model": base}), Side(adapter, {"model": adapter}))


def _vllm(asked: Asked) -> Sides:
    return _by_model(asked, "Start it with --enable-lora --lora-modules NAME=FOLDER")


def _sglang(asked: Asked) -> Sides:
    base, adapter = _base_and_adapter(asked, "Start it with --lora-paths NAME=FOLDER")
    return Sides(Side(base, {"model": base}), Side(adapter, {"model": base, "lora_path": adapter}))


def _llama_cpp(asked: Asked) -> Sides:
    base = asked.base or next(iter(asked.names), "")
    if asked.base is not None and asked.base not in asked.names:
        raise asked.missing(asked.base, asked.names, "Leave --base out: it serves one model")
    adapters = _adapters(asked.client)
    number = _number(asked, adapters)
    scale = adapters[number][1] or 1.0  # as it is served, if it is
    off = dict.fromkeys(adapters, 0.0)
    on = off | {number: scale}
    usual_ones = {each: scale for each, (_, scale) in adapters.items()}
    return Sides(
        Side(base, {"model": base, "lora": _listed(off)}),
        Side(asked.adapter, {"model": base, "lora": _listed(on)}),
        () if usual_ones == on else (UNASKED.format(_scales(usual_ones), _scales(on)),),
    )  # fmt: skip


UNASKED = 'a request without "lora" is answered with {}; the adapter was asked for with {}'


def _listed(scales: Mapping[int, float]) -> list[dict[str, float]]:
    return [{"id": number, "scale": scale} for number, scale in scales.items()]


def _scales(scales: Mapping[int, float]) -> str:
    return ", ".join(f"adapter {number} at {scale:g}" for number, scale in scales.items())


def _adapters(client: Client) -> dict[int, tuple[str, float]]:
    """Return path and usual scale of each adapter of a llama.cpp server, by its number."""
    reply = client.ask("/lora-adapters")
    listed = reply.value()
    try:
        return {
            int(each["id"]): (str(each.get("path", "")), float(each.get("scale", 1.0)))
            for each in listed
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise reply.strange("a list of adapters") from None


def _number(asked: Asked, adapters: Mapping[int, tuple[str, float]]) -> int:
    """Return the number of the adapter that is meant, by its number, path, file or its stem."""
    exact = {n: {str(n), path} for n, (path, _) in adapters.items()}
    short = {n: {PurePosixPath(path.replace("\\", "/")).name,
                 PurePosixPath(path.replace("\\", "/")).stem}
             for n, (path, _) in adapters.items()}  # fmt: skip
    there = [f"{n}: {path}" for n, (path, _) in adapters.items()]
    for names in (exact, short):
        fits = [n for n, each in names.items() if asked.adapter in each]
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise asked.missing(asked.adapter, there, "Several have that name: give its number")
    raise asked.missing(
        asked.adapter, there, "Start it with --lora FILE; an adapter is named by its number or file"
    )


DEFAULT_MODEL = "default_model"
"""How mlx_lm.server calls what it was started with, adapter included."""


def _mlx(asked: Asked) -> Sides:
    if asked.adapter in asked.names:  # such as a merged model
        return _by_model(asked)
    base = asked.base or _started_with(asked)
    given = expanded(asked.adapter)
    fields = {"model": base, "adapters": str(given.resolve()) if is_there(given) else asked.adapter}
    if asked.adapter == DEFAULT_MODEL:
        fields = {"model": DEFAULT_MODEL}
    return Sides(Side(base, {"model": base}), Side(asked.adapter, fields))


def _started_with(asked: Asked) -> str:
    """Return the model that mlx_lm.server was started with: listed last, after those of a cache.

    With the model's own name an adapter is taken from the request, and there is none without; with
    "default_model" what the server was started with would be taken, whatever the request says.
    """
    names = asked.names
    if names and (len(names) == 1 or _is_absolute(names[-1])):
        return names[-1]
    raise InputError(
        "mlx_lm.server does not say which model it serves", where=asked.client.root,
        expected="one model", found=f"{len(names)} in its list",
        hint="Name it with --base, as it was given to --model",
    )  # fmt: skip


def _is_absolute(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()


# -- the table -------------------------------------------------------------------------------------

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("vllm", "vllm", None, _vllm),
        Kind("sglang", "sglang", None, _sglang),
        # Its cache of prompts would give one adapter's keys and values to another's request.
        Kind("llama.cpp", "llamacpp", "llama.cpp", _llama_cpp, fields={"cache_prompt": False}),
        Kind("mlx", None, "BaseHTTP/", _mlx, {"logprobs": True, "top_logprobs": TOP},
             hint="It reads adapters of its own format: regraft convert ADAPTER -o OUT --to mlx"),
    )
}  # fmt: skip
"""Servers that are known, by name."""

OTHER = Kind("openai", None, None, _by_model)
"""Any other server that speaks OpenAI's API and lists adapters as models."""


def kind_of(models: Sequence[Model], software: str) -> Kind:
    """Return a server's kind, by what it says: owners of models first, then its header.

    mlx_lm.server names no owner, and has the header of Python's own server.
    """
    owners = {model.owner for model in models}
    for kind in KINDS.values():
        if kind.owner in owners or (
            kind.software is not None
            and software.startswith(kind.software)
            and (kind.owner is not None or owners <= {""})
        ):
            return kind
    return OTHER
