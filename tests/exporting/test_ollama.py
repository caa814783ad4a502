"""A folder for Ollama: the GGUF file, and a Modelfile whose template does what the model's does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from exporting.models import SPECIAL, byte_level, save_model, save_tokenizer, split
from regraft.errors import OutputExistsError
from regraft.exporting.chat import Turns, UntoldError, turns_of
from regraft.exporting.ollama import go_template, modelfile_of
from regraft.exporting.tokens.pretokenizers import _QWEN2
from regraft.exporting.verb import export
from regraft.merging.inputs.gguf import open_gguf_base

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) }}"
    "{{ '\n' + m['content'] + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
ENDING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "no system": NO_SYSTEM, "ending": ENDING}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

TALKS = [
    [("user", "hi")],
    [("user", "hi"), ("assistant", "a {{ x }}"), ("user", "more")],
    [("system", "short"), ("user", "hi")],
    [("system", "short"), ("user", "hi"), ("assistant", "a\nb"), ("user", "more")],
]


def rendered(template: str, talk: list[tuple[str, str]]) -> str:
    """Return what transformers makes of a conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": role, "content": content} for role, content in talk]
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **SPECIALS
    )
    return str(texts[0])


def go(template: str, talk: list[tuple[str, str]]) -> str:
    """Return what Go's text/template makes of a conversation: the few actions that are written."""
    system = "".join(content for role, content in talk if role == "system")
    tokens = re.split(r"(\{\{.*?\}\})", template)
    out, _ = _run(tokens, 0, {"System": system, "Messages": talk, "role": "", "content": ""})
    return out


def _run(tokens: list[str], at: int, world: dict[str, Any], live: bool = True) -> tuple[str, int]:
    """Run up to the ``end`` or ``else`` that closes this block; return its place too."""
    out = ""
    while at < len(tokens):
        action = tokens[at].strip("{} ") if tokens[at].startswith("{{") else None
        if action is None:
            out, at = out + (tokens[at] if live else ""), at + 1
        elif action == "end" or action.startswith("else"):
            break
        elif action.startswith("range"):
            end = _run(tokens, at + 1, world, live=False)[1]
            talk = [each for each in world["Messages"] if live]
            for place, (role, content) in enumerate(talk):
                inner = world | {"role": role, "content": content, "last": place + 1 == len(talk)}
                out += _run(tokens, at + 1, inner)[0]
            at = end + 1
        elif action.startswith("if"):
            text, at = _branches(tokens, at, world, live)
            out += text
        else:
            out, at = out + (_value(action, world) if live else ""), at + 1
    return out, at


def _branches(tokens: list[str], at: int, world: dict[str, Any], live: bool) -> tuple[str, int]:
    out, done = "", False
    while True:
        words = tokens[at].strip("{} ").removeprefix("else").strip()
        if words == "end" or (not words and tokens[at].strip("{} ") == "end"):
            return out, at + 1
        holds = live and not done and (not words or _holds(words.removeprefix("if "), world))
        text, at = _run(tokens, at + 1, world, live=holds)
        out, done = out + text, done or holds


def _holds(words: str, world: dict[str, Any]) -> bool:
    known = {
        ".System": bool(world["System"]), "not $last": not world.get("last"),
        'eq .Role "user"': world["role"] == "user",
        'eq .Role "assistant"': world["role"] == "assistant",
        'and $last (ne .Role "assistant")': world.get("last") and world["role"] != "assistant",
    }  # fmt: skip
    return bool(known[words])


def _value(action: str, world: dict[str, Any]) -> str:
    if action.startswith("$last :="):
        return ""
    if action == '"':  # what is left of a literal {{ "{{" }}
        return "{{"
    return str({".System": world["System"], ".Content": world["content"]}[action])


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_what_the_template_writes(name: str) -> None:
    template = TEMPLATES[name]
    turns = turns_of(template, SPECIALS)
    for talk in TALKS:
        if talk[0][0] == "system" and turns.system is None:
            continue
        messages = [{"role": role, "content": content} for role, content in talk]
        assert turns.text(messages) == rendered(template, talk)
    assert (turns.system is None) == (name == "no system")
    assert turns.trims == (name == "headers")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_of_the_modelfile_writes_the_same(name: str) -> None:
    template = TEMPLATES[name]
    turns = turns_of(template, SPECIALS)
    text, _ = go_template(turns, bos="<s>")
    for talk in TALKS:
        if talk[0][0] == "system" and turns.system is None:
            continue
        assert go(text, talk) == rendered(template, talk).removeprefix("<s>")


UNTOLD = {
    "today's date": "{{ strftime_now('%d') }}" + CHATML,
    "refuses a conversation": "{{ raise_exception('no') }}",
    "leaves a message out": "{{ messages[-1]['content'] }}",
    "changes what is written": "{% for m in messages %}{% if loop.last %}{{ 'LAST ' }}{% endif %}"
    "{{ m['role'] + m['content'] }}{% endfor %}",
    "role alone": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + ("
    "'!' if m['content'] == 'a' else '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
}


@pytest.mark.parametrize("why", UNTOLD)
def test_other_templates_are_told_by_what_they_do(why: str) -> None:
    with pytest.raises(UntoldError, match=why):
        turns_of(UNTOLD[why], SPECIALS)


def test_what_would_end_a_go_template_is_written_as_text() -> None:
    turns = Turns(("{{u ", "}}"), ("a ", "."), None, "", "A", trims=False)
    text, _ = go_template(turns, bos="")
    assert '{{ "{{" }}u ' in text
    with pytest.raises(UntoldError, match='"""'):
        go_template(Turns(('"""', ""), ("", ""), None, "", "", trims=False), bos="")


def save(folder: Path, template: str | None, generation: dict[str, Any]) -> Path:
    model = save_model(folder / "model", "qwen2")
    save_tokenizer(model, byte_level(split(_QWEN2)))
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    (model / "generation_config.json").write_text(json.dumps(generation))
    return model


def test_a_folder_has_the_file_and_a_modelfile(tmp_path: Path) -> None:
    model = save(tmp_path, CHATML, {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
        "repetition_penalty": 1.05, "eos_token_id": [632, 0],
    })  # fmt: skip
    report = export(model, tmp_path / "out", engine="ollama")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        "PARAMETER temperature 0.7", "PARAMETER top_p 0.8", "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.05", f'PARAMETER stop "{SPECIAL[2]}"',
        f'PARAMETER stop "{SPECIAL[0]}"',
    ]  # fmt: skip
    text = "\n".join(lines)
    told = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert told is not None
    assert go(told[1], TALKS[3]) == rendered(CHATML, TALKS[3])
    assert "ADAPTER" not in text
    assert open_gguf_base(tmp_path / "out" / "model.gguf").architecture == "qwen2"
    assert (report.files, report.engine) == (("Modelfile", "model.gguf"), "ollama")
    with pytest.raises(OutputExistsError):
        export(model, tmp_path / "out", engine="ollama")
    again = export(model, tmp_path / "out", engine="ollama", overwrite=True)
    assert again.blake3 == report.blake3


def test_what_cannot_be_said_stands_in_a_comment_and_in_the_summary(tmp_path: Path) -> None:
    model = save(tmp_path, UNTOLD["today's date"], {"do_sample": False})
    report = export(model, tmp_path / "out", engine="ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert 'TEMPLATE "' not in text
    note = next(each for each in report.notes if "today's date" in each)
    assert f"# {note}" in text.splitlines()
    assert "PARAMETER temperature 0\n" in text


def test_a_model_without_a_template_gets_none() -> None:
    made = modelfile_of({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 0}, {})
    assert "TEMPLATE" not in made.text
    assert 'PARAMETER stop "a"' in made.text
    assert len(made.notes) == 2
