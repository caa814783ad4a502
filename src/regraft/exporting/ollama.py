"""Ollama's Modelfile for a GGUF file: its template and parameters, where they can be said.

Ollama takes templates of Go's ``text/template``; see its docs/template.md and docs/modelfile.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.exporting.chat import Turns, UntoldError, turns_of

GGUF_NAME, MODELFILE = "model.gguf", "Modelfile"

_PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""Ollama's parameters by the names that transformers' ``generation_config.json`` has for them."""

_QUOTES = '"""'

_NO_TEMPLATE = (
    "the model has no chat template, so the Modelfile has none, and answers go on from plain text"
)
_UNTOLD = (
    "the chat template cannot be said in Go's templates: {}. Write TEMPLATE yourself; the model's "
    "own is in its folder"
)
_TOOLS = "the template of the Modelfile knows no tools"
_NO_SYSTEM = "the chat template takes no system message, and that of the Modelfile leaves one out"
_TRIMS = "the chat template takes spaces off the ends of messages, and Ollama does not"


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        text: its content.
        notes: what it could not say.
    """

    text: str
    notes: tuple[str, ...]


def modelfile_of(metadata: Mapping[str, Any], generation: Mapping[str, Any]) -> Modelfile:
    """Return the Modelfile for a GGUF file beside it.

    Args:
        metadata: keys and values of the file.
        generation: the content of the model's ``generation_config.json``.

    Raises:
        MissingExtraError: jinja2 is not installed, and there is a chat template.
    """
    template, notes = _template(metadata)
    parameters, more = _parameters(metadata, generation)
    notes += more
    lines = [f"FROM ./{GGUF_NAME}", *(f"# {note}" for note in notes)]
    if template is not None:
        lines += ["", f"TEMPLATE {_QUOTES}{template}{_QUOTES}"]
    lines += ["", *parameters] if parameters else []
    return Modelfile("\n".join(lines) + "\n", tuple(notes))


def _template(metadata: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    jinja = metadata.get("tokenizer.chat_template")
    if jinja is None:
        return None, [_NO_TEMPLATE]
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for name in ("bos", "eos") if f"tokenizer.ggml.{name}_token_id" in metadata
    }  # fmt: skip
    try:
        turns = turns_of(jinja, special)
        adds = bool(metadata.get("tokenizer.ggml.add_bos_token"))
        text, notes = go_template(turns, special.get("bos_token", "") if adds else "")
    except UntoldError as error:
        return None, [_UNTOLD.format(" ".join(str(error).split()))]
    return text, notes


def go_template(turns: Turns, bos: str) -> tuple[str, list[str]]:
    """Return turns as a template of Go's, and what a user should know of it.

    Args:
        turns: what stands around messages.
        bos: the token that Ollama itself puts before a text, which is left out; empty for none.

    Raises:
        UntoldError: a text in it would end the template.
    """
    notes = [_TOOLS]
    begin = turns.without_system
    system = turns.system
    if bos and not begin.startswith(bos):
        notes.append(f"Ollama puts {bos} before a text, which the chat template does not write")
    begin = begin.removeprefix(bos)
    user, answer, prompt = turns.user, turns.assistant, _literal(turns.prompt)
    if system is None:
        notes.append(_NO_SYSTEM)
        head = _literal(begin)
    else:
        before, after = system[0].removeprefix(bos), system[1]
        head = f"{{{{ if .System }}}}{_literal(before)}{{{{ .System }}}}{_literal(after)}"
        head += f"{{{{ else }}}}{_literal(begin)}{{{{ end }}}}"
    if turns.trims:
        notes.append(_TRIMS)
    text = (
        head + "{{ range $i, $_ := .Messages }}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{_literal(user[0])}{{{{ .Content }}}}{_literal(user[1])}'
        f'{{{{ else if eq .Role "assistant" }}}}{_literal(answer[0])}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{_literal(answer[1])}{{{{ end }}}}{{{{ end }}}}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{prompt}{{{{ end }}}}'
        "{{ end }}"
    )
    if _QUOTES in text or text.endswith('"'):
        raise UntoldError(f"it writes {_QUOTES}")
    return text, notes


def _literal(text: str) -> str:
    """Return a text that Go's templates write as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _parameters(
    metadata: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return lines with parameters, and notes."""
    samples = generation.get("do_sample")
    found = {} if samples is False else {
        name: generation[key] for key, name in _PARAMETERS.items()
        if isinstance(generation.get(key), int | float) and not isinstance(generation[key], bool)
    }  # fmt: skip
    notes = []
    if samples is False:
        found["temperature"] = 0
    elif not found:
        notes.append("the model says nothing of sampling, so Ollama's own defaults hold")
    stops, more = _stops(metadata, generation)
    lines = [f"PARAMETER {name} {value:g}" for name, value in found.items()]
    return lines + [f'PARAMETER stop "{stop}"' for stop in stops], notes + more


def _stops(
    metadata: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return the tokens that end an answer, and a note where one cannot be said."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    said = generation.get("eos_token_id", metadata.get("tokenizer.ggml.eos_token_id"))
    ids = said if isinstance(said, list) else [said]
    texts = [tokens[row] for row in ids if isinstance(row, int) and 0 <= row < len(tokens)]
    plain = [text for text in texts if not set(text) & set('"\\\n\r')]
    odd = len(texts) - len(plain)
    notes = [f"{odd} tokens that end an answer cannot be said"] if odd else []
    return list(dict.fromkeys(plain)), notes
