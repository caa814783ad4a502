"""What a chat template makes of conversations, told by giving it some.

Many templates write each message between two texts that depend on its role alone. Such a template
is told by a few conversations, and then held against others. A template is a stranger's program: it
runs in jinja2's sandbox, for ten seconds at most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regraft.errors import InputError
from regraft.libraries import from_template, require

_USER, _ANSWER, _SYSTEM = "\ue001question\ue001", "\ue002answer\ue002", "\ue003system\ue003"
_NEXT, _DATE = "\ue004next\ue004", "\ue005date\ue005"

_GENERATION = re.compile(r"(\{%-?\s*)(generation|endgeneration)(\s*-?%\})")
_PLAIN = {"generation": "if true", "endgeneration": "endif"}
"""A tag of transformers' own, around what a model writes; it changes no text."""

Message = Mapping[str, str]


class UntoldError(ValueError):
    """A template that writes more than turns with fixed ends; the message says what."""


@dataclass(frozen=True)
class Turns:
    """A chat template as texts around messages.

    Attributes:
        user, assistant: what stands before and after a message of that role.
        system: the same for a system message, which comes first; None where the template refuses
            one.
        without_system: what a conversation without a system message begins with.
        prompt: what an answer follows.
        trims: whether the template takes spaces off the ends of messages.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    without_system: str
    prompt: str
    trims: bool

    def text(self, messages: Sequence[Message]) -> str:
        """Return what the template makes of messages that an answer is to follow."""
        ends = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}
        begin = "" if messages[0]["role"] == "system" else self.without_system
        turns = (
            f"{ends[each['role']][0]}{each['content']}{ends[each['role']][1]}" for each in messages
        )
        return begin + "".join(turns) + self.prompt


@dataclass(frozen=True)
class _Template:
    """A chat template with the method of a tokenizer that renders it, as transformers does."""

    text: str
    special: Mapping[str, str]
    ending: str = ""
    """What it writes at the end where no answer is to follow."""

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **said: Any) -> str:
        """Return messages as the template writes them."""
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(why: str) -> None:
            raise jinja2.TemplateError(why)

        del tokenize
        world = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        world.globals |= {"raise_exception": refuse, "strftime_now": lambda _form: _DATE}
        text = _GENERATION.sub(lambda tag: tag[1] + _PLAIN[tag[2]] + tag[3], self.text)
        return world.from_string(text).render(messages=messages, **self.special, **said)


def turns_of(template: str, special: Mapping[str, str]) -> Turns:
    """Return a chat template as turns.

    Args:
        template: of Jinja.
        special: texts of special tokens by transformers' names, such as ``bos_token``.

    Raises:
        UntoldError: it writes more than that.
        MissingExtraError: jinja2 is not installed.
    """
    require("jinja2", why="telling what a chat template does", where="--for")
    try:
        found = _told(_Template(template, special))
    except InputError as error:
        raise UntoldError(f"it refuses a conversation: {error.problems[0].found}") from None
    return found


def _render(template: _Template, *messages: tuple[str, str], answer: bool = True) -> str:
    plain = [{"role": role, "content": content} for role, content in messages]
    text = from_template(template, plain, add_generation_prompt=answer)
    if _DATE in text:
        raise UntoldError("it writes today's date")
    return text if answer else text.removesuffix(template.ending)


_QUESTION, _REPLY, _AGAIN = ("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)
_RULES = ("system", _SYSTEM)


def _told(template: _Template) -> Turns:
    template = _with_ending(template)
    one = _render(template, _QUESTION, answer=False)
    three = _render(template, _QUESTION, _REPLY, _AGAIN, answer=False)
    begin, after = _parted(one, _USER)
    before, between, next_one, end = _cut(three, _USER, _ANSWER, _NEXT)
    asked = _render(template, _QUESTION)
    if begin != before or after != end or not asked.startswith(one):
        raise UntoldError("a message changes what is written of those before it")
    prompt = asked.removeprefix(one)
    reply = (_without_start(between, after), _end_of_answer(template))
    user = (_without_start(next_one, reply[1]), after)
    turns = Turns(user, reply, None, _without_end(begin, user[0]), prompt, _trims(template))
    turns = _with_system(template, turns)
    _check(template, turns)
    return turns


def _with_ending(template: _Template) -> _Template:
    """Return a template that is known to write the end of a text where no answer is to follow."""
    one, end = _render(template, _QUESTION, answer=False), template.special.get("eos_token", "")
    if end and one.endswith(end) and not _render(template, _QUESTION).startswith(one):
        return replace(template, ending=end)
    return template


def _end_of_answer(template: _Template) -> str:
    return _parted(_render(template, _QUESTION, _REPLY, answer=False), _ANSWER)[1]


def _with_system(template: _Template, turns: Turns) -> Turns:
    try:
        text = _render(template, _RULES, _QUESTION, answer=False)
    except InputError:  # as Gemma's does
        return turns
    before, between, _ = _cut(text, _SYSTEM, _USER)
    system = (before, _without_end(between, turns.user[0]))
    return replace(turns, system=system)


def _trims(template: _Template) -> bool:
    return f" {_USER} " not in _render(template, ("user", f" {_USER} "))


def _check(template: _Template, turns: Turns) -> None:
    """Hold the turns against conversations that they were not told from."""
    talks: list[list[tuple[str, str]]] = [
        [("user", "a")], [_QUESTION, ("assistant", "{{ b }}\nc"), _AGAIN, _REPLY, ("user", "d")],
    ]  # fmt: skip
    if turns.system is not None:
        talks += [[("system", "be brief"), *talk] for talk in list(talks)]
    for talk in talks:
        messages = [{"role": role, "content": content} for role, content in talk]
        if _render(template, *talk) != turns.text(messages):
            raise UntoldError("what stands around a message does not depend on its role alone")


def _parted(text: str, content: str) -> tuple[str, str]:
    before, after = _cut(text, content)
    return before, after


def _cut(text: str, *contents: str) -> list[str]:
    """Return what stands before, between and after messages."""
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found:
            raise UntoldError("it leaves a message out, or changes the order")
        parts.append(before)
    return [*parts, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise UntoldError("what follows a message depends on the one after it")
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise UntoldError("what comes before a message depends on the one before it")
    return text[: len(text) - len(end)]
