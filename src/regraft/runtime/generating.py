"""Answers of a model to a prompt: a base, a merged model, or a base with adapters attached."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import AdapterError, InputError, RegraftError, UnsupportedError, UsageError
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.parsed import check_parsed
from regraft.formats.files.reading import is_there
from regraft.formats.hub import locate
from regraft.formats.layout import looks_like
from regraft.libraries import from_pretrained, from_template, quieted, require
from regraft.merging.files.card import auto_class_of
from regraft.merging.options import parse_dtype
from regraft.tensors import DTYPES

if TYPE_CHECKING:
    from regraft.runtime.handle import Adapters

Messages = Sequence[Mapping[str, str]]
"""A conversation as transformers has it: ``role`` and ``content`` of each message."""

OnText = Callable[[str], None]
"""Takes a piece of an answer as soon as it is there."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that have this probability together; None for what
            the model's generation config says.
        seed: of sampling; None for another one each time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``generate``; None switches off what a config asks for."""
        if not self.temperature:
            off = dict.fromkeys(("temperature", "top_p", "top_k"))
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, **off}
        chosen: dict[str, Any] = {"temperature": self.temperature}
        if self.top_p is not None:
            chosen["top_p"] = self.top_p
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, **chosen}


@dataclass
class Answer:
    """What a model said.

    Attributes:
        text: the answer.
        tokens: how many tokens it is.
        seconds: how long it took.
        stopped: whether it was interrupted.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """The tokens of a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Speaker:
    """A model with its tokenizer, and the adapters that it can answer with.

    Attributes:
        model: transformers' model.
        tokenizer: its tokenizer.
        adapters: the handle on its adapters.
        active: weight by name of those that answer.
        sources: where each adapter is from, by name.
    """

    model: Any
    tokenizer: Any
    adapters: Adapters
    active: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def load(self, source: str, name: str | None = None, token: str | None = None) -> str:
        """Load an adapter beside the others and return its name.

        Args:
            source: a folder or Hub id.
            name: what it is called; by default the last part of ``source``.
            token: Hub token.

        Raises:
            RegraftError: it cannot be read, does not fit, or its name is taken.
        """
        chosen = name or _free(name_of(source), self.sources)
        self.adapters.load_adapter(source, chosen, token=token)
        self.sources[chosen] = source
        return chosen

    def choose(self, weights: Mapping[str, float]) -> None:
        """Let these adapters answer from now on, each with its weight; none for the base alone.

        Raises:
            RegraftError: one is not there, or they cannot go together.
        """
        self.adapters.set_adapter(dict(weights) or None)
        self.active = dict(weights)

    def answer(
        self, messages: Messages, sampling: Sampling, on_text: OnText, *, template: bool = True
    ) -> Answer:
        """Return the model's answer, and hand it out piece by piece while it is made.

        A ``KeyboardInterrupt`` ends the answer; what there is of it is returned.

        Args:
            messages: the conversation; the last message is the one to answer.
            sampling: how tokens are chosen.
            on_text: takes pieces.
            template: use the tokenizer's chat template, where it has one.

        Raises:
            InputError: the chat template refuses these messages.
        """
        import torch

        inputs = self._inputs(messages, template=template)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        answer = Answer()
        streamer = _streamer(self.tokenizer, answer, on_text)
        begun = time.perf_counter()
        try:
            with torch.inference_mode(), quiet():
                self.model.generate(
                    **inputs, **sampling.arguments(), **self._ends(), streamer=streamer
                )
        except KeyboardInterrupt:
            streamer.end()
            answer.stopped = True
        answer.seconds = time.perf_counter() - begun
        return answer

    def _inputs(self, messages: Messages, *, template: bool) -> dict[str, Any]:
        """Return the tokens of a conversation, where the model is."""
        if template and getattr(self.tokenizer, "chat_template", None):
            text, special = self._templated(messages), False  # the template has them
        else:
            text, special = as_text(messages), True
        made = self.tokenizer(text, return_tensors="pt", add_special_tokens=special)
        if not made["input_ids"].numel():
            raise InputError("there is nothing to answer", hint="Give a prompt that is not empty")
        names = ("input_ids", "attention_mask")
        return {name: made[name].to(self.model.device) for name in names}

    def _templated(self, messages: Messages) -> str:
        return from_template(
            self.tokenizer, messages, hint="Leave the system prompt out, or give --no-chat-template"
        )

    def _ends(self) -> dict[str, Any]:
        """Return what ends an answer where the model's generation config does not say."""
        config = self.model.generation_config
        ends = config.eos_token_id
        chosen: dict[str, Any] = {}
        if ends is None and self.tokenizer.eos_token_id is not None:
            ends = chosen["eos_token_id"] = self.tokenizer.eos_token_id
        if config.pad_token_id is None and ends is not None:
            chosen["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
        return chosen


def as_text(messages: Messages) -> str:
    """Return a conversation as plain text; of one message alone the text itself."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) <= 1:
        return "\n\n".join([*system, *(m["content"] for m in turns)])
    lines = [f"{m['role'].capitalize()}: {m['content']}" for m in turns]
    return "\n".join([*system, *lines, "Assistant:"])


def _streamer(tokenizer: Any, answer: Answer, on_text: OnText) -> Any:
    """Return what ``generate`` hands its tokens to: it fills in an answer and passes text on."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                answer.tokens += value.numel()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            answer.text += text
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


# -- loading ---------------------------------------------------------------------------------------


def open_speaker(
    base: str,
    adapters: Sequence[tuple[str, float]] = (),
    *,
    load_in_4bit: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    token: str | None = None,
    together: bool = True,
) -> Speaker:
    """Load a model, its tokenizer and adapters, which answer by their weights.

    Args:
        base: a folder, a ``.gguf`` file or a Hub id. Of an adapter's folder the base that it names
            is loaded, with the adapter before all others.
        adapters: source and weight of each.
        load_in_4bit: put linear layers into bitsandbytes' NF4.
        dtype: of the weights, such as ``"bfloat16"`` or ``"bf16"``; by default the model's own.
        device: such as ``"cuda:1"`` or ``"cpu"``; by default a GPU if there is one.
        token: Hub token.
        together: whether all adapters answer, or the first one alone.

    Raises:
        MissingExtraError: a package is not installed.
        RegraftError: the model, its tokenizer or an adapter cannot be read, or do not fit.
    """
    require("torch", "transformers", why="generating")
    if load_in_4bit:
        require("bitsandbytes", "accelerate", why="loading in 4 bits")
    chosen = parse_dtype(dtype)
    dtype = chosen and DTYPES[chosen].config_name
    folder, wanted = _base_and_adapters(base, adapters, token)
    with quiet():
        model = _model(folder, load_in_4bit=load_in_4bit, dtype=dtype, device=device)
        tokenizer = _tokenizer([*_folders(wanted, token), folder])
    from regraft.runtime.attaching import attach

    speaker = Speaker(model, tokenizer, attach(model))
    weights = {speaker.load(source, token=token): weight for source, weight in wanted}
    speaker.choose(weights if together else dict(list(weights.items())[:1]))
    return speaker


def _base_and_adapters(
    base: str, adapters: Sequence[tuple[str, float]], token: str | None
) -> tuple[Path, list[tuple[str, float]]]:
    """Return where the base is, and all adapters: that of ``base`` first, if it is one itself.

    Raises:
        AdapterError: it is one that names no base.
    """
    path = locate(base, kind="base", token=token).path
    if looks_like(path) != "adapter":
        return path, list(adapters)
    named = read_json_object(path / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise AdapterError(
            "the adapter does not name its base", where=base,
            expected="base_model_name_or_path in adapter_config.json",
            hint="Name the base first, and the adapter with --adapter",
        )  # fmt: skip
    try:
        return locate(named, kind="base", token=token).path, [(base, 1.0), *adapters]
    except InputError as error:
        error.add_note(f"{base} is an adapter of {named}; name its base, and it with --adapter")
        raise


def _folders(adapters: Sequence[tuple[str, float]], token: str | None) -> list[Path]:
    return [locate(source, kind="adapter", token=token).path for source, _ in adapters]


def _model(folder: Path, *, load_in_4bit: bool, dtype: str | None, device: str | None) -> Any:
    import torch
    import transformers

    place, arguments = _gguf(folder)
    if not arguments and not (place / "config.json").is_file():
        raise InputError(
            "no model to generate with", where=str(folder), expected="config.json and weights",
            hint="Name a model's folder, an adapter's folder or a Hub id",
        )  # fmt: skip
    check_parsed(place)
    raw = {} if arguments else read_json_object(place / "config.json")
    _check_quantized(raw, load_in_4bit=load_in_4bit, gguf=bool(arguments))
    cls = getattr(transformers, auto_class_of(raw) if raw else "AutoModelForCausalLM")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments["dtype"] = dtype or "auto"
    if load_in_4bit:
        arguments["quantization_config"] = _nf4(raw, dtype)
    if load_in_4bit or (where != "cpu" and find_spec("accelerate")):
        arguments["device_map"] = {"": where}  # weights go there one by one
    try:
        model = from_pretrained(cls, str(place), **arguments)
    except (RegraftError, MemoryError):
        raise
    except Exception as error:  # the libraries' errors are of many kinds
        raise InputError(
            "transformers cannot load this model", where=str(place),
            found=f"{type(error).__name__}: {error}".strip().partition("\n")[0],
        ) from error  # fmt: skip
    if "device_map" not in arguments and where != "cpu":
        model = model.to(where)
    if not model.can_generate():
        raise UnsupportedError(
            "this model does not generate text", where=str(folder), found=type(model).__name__
        )
    return model


def _gguf(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder to load from, and what transformers has to know of a ``.gguf`` file."""
    if path.suffix != ".gguf":
        return path, {}
    require("gguf", "accelerate", why="loading a .gguf file")
    return path.parent, {"gguf_file": path.name}


def _check_quantized(raw: Mapping[str, Any], *, load_in_4bit: bool, gguf: bool) -> None:
    settings = raw.get("quantization_config")
    named = settings.get("quant_method") if isinstance(settings, Mapping) else None
    method = "gguf" if gguf else named
    if method == "bitsandbytes":
        require("bitsandbytes", why="a model in bitsandbytes' format")
    if method and load_in_4bit:
        raise UsageError(
            "this model is quantized already", where="--load-in-4bit", found=str(method),
            hint="Leave --load-in-4bit out",
        )  # fmt: skip


def _nf4(raw: Mapping[str, Any], dtype: str | None) -> Any:
    """Return bitsandbytes' NF4 with plain scales, computing in the model's dtype."""
    from transformers import BitsAndBytesConfig

    own = raw.get("dtype") or raw.get("torch_dtype")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=dtype or own or "float32",
    )  # fmt: skip


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def _tokenizer(folders: Sequence[Path]) -> Any:
    """Return the tokenizer of the first folder that has one, as a merge chooses it.

    Raises:
        InputError: none has one that can be loaded.
    """
    from transformers import AutoTokenizer

    having = [f for f in folders if any((f / n).is_file() for n in _TOKENIZER_FILES)]
    place, arguments = _gguf(having[0] if having else folders[-1])
    check_parsed(place)
    try:
        return from_pretrained(AutoTokenizer, str(place), **arguments)
    except RegraftError:
        raise
    except Exception as error:  # the tokenizers library raises this very class
        raise InputError(
            "no tokenizer could be loaded", where=str(place),
            found=str(error).strip().partition("\n")[0],
            hint="Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) there",
        ) from error  # fmt: skip


def name_of(source: str) -> str:
    """Return what an adapter is called: the last part of its path or Hub id."""
    path = Path(source.rstrip("/"))
    return path.name if is_there(path) else path.name.partition("@")[0]


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return a name that is not taken, numbered if need be."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what transformers says and draws; errors are exceptions and pass."""
    from transformers.utils import logging

    with quieted(logging), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
