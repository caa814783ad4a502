"""Regular expressions that come with an adapter, matched as PEFT does but within limits.

A stranger's expression can take longer than the universe has, and :mod:`re` cannot be stopped. The
``regex`` package can, and reads expressions as :mod:`re` does but for a few notations, which are
spelled out for it here. What :mod:`re`, and so PEFT, does not compile is refused.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from regraft.errors import AdapterError
from regraft.formats.problems import quoted

# The expressions PEFT makes of what a config holds.
WHOLE = "{}"
SUFFIX = r"(.*\.)?({})$"
BELOW = r"(^|.*\.){}($|\..*)"
LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

MAX_LENGTH = 10_000
"""Characters of one expression; :mod:`re` can take 3 seconds to compile the worst of these."""

MAX_EXPRESSIONS = 4096
"""Expressions in one config. Plain names do not count: they are looked up."""

SECONDS = 5.0
"""Processor time that the expressions of one config may take, beside what is usual."""

_USUAL = 200e-6
_USUAL_OF_MANY = 5e-6
_USUAL_COMPILING = 1e-3
_PLAIN = re.compile(r"[\w.-]*", re.ASCII)
_NOTATION = re.compile(
    r"\\."
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|\{(?:\d*,\d*|\d+)\}"
    r"|(?P<brace>\{)",
    re.DOTALL,
)
_IN_SET = re.compile(r"(\\.)|(\[)", re.DOTALL)


class _Matching(Protocol):
    def __call__(self, name: str, /, *, timeout: float) -> re.Match[str] | None: ...


class _Pattern(Protocol):
    """What is used here of a compiled expression of ``regex``."""

    @property
    def match(self) -> _Matching: ...

    @property
    def fullmatch(self) -> _Matching: ...


class BadExpressionError(ValueError):
    """PEFT could not compile this expression, or it is longer than any sound one."""


class Expressions:
    """The regular expressions of one config, with what is left of their time.

    One of a few expressions may take longer than one of thousands, as of every name it is asked
    once. Time is the processor's, so that a busy machine does not make a sound config fail.
    """

    def __init__(self, where: str) -> None:
        """Start with no expression.

        Args:
            where: how messages name the config.
        """
        self.where = where
        self._known: set[tuple[str, str]] = set()
        self._left = SECONDS

    def add(self, text: str, within: str = WHOLE) -> None:
        """Check an expression, before it is matched.

        Args:
            text: the expression, as the config has it.
            within: the expression that it becomes a part of.

        Raises:
            BadExpressionError: it cannot be compiled, or is too long.
            AdapterError: there are too many, or compiling them takes too long.
        """
        if len(text) > MAX_LENGTH:
            raise BadExpressionError(f"longer than {MAX_LENGTH} characters")
        if _is_looked_up(text, within) or (within, text) in self._known:
            return
        self._known.add((within, text))
        if len(self._known) > MAX_EXPRESSIONS:
            raise AdapterError(
                "the config has too many regular expressions",
                where=self.where,
                expected=f"at most {MAX_EXPRESSIONS}; plain names do not count",
                hint="Name the modules in full instead",
            )
        begin = time.thread_time()
        try:
            _compiled(within, text)
        finally:
            self._spend(begin, _USUAL_COMPILING, text)

    def match(self, text: str, name: str, within: str) -> re.Match[str] | None:
        """Return the match of an expression, which may be one of many, where a name begins.

        Raises:
            AdapterError: it takes too long.
        """
        return self._timed(_compiled(within, text).match, name, _USUAL_OF_MANY, text)

    def fullmatch(self, text: str, name: str) -> bool:
        """Return whether an expression matches the whole of a name.

        Raises:
            AdapterError: it takes too long.
        """
        if _is_looked_up(text, WHOLE):
            return text == name
        return self._timed(_compiled(WHOLE, text).fullmatch, name, _USUAL, text) is not None

    def spend_since(self, begin: float) -> None:
        """Charge a search through many names, which began at ``begin`` of the thread's time."""
        self._spend(begin, _USUAL_OF_MANY, "")

    def _timed(self, match: _Matching, name: str, usual: float, text: str) -> re.Match[str] | None:
        begin, found = time.thread_time(), None
        try:
            found = match(name, timeout=self._left)
        except (TimeoutError, MemoryError):
            self._left = 0.0
        self._spend(begin, usual, text)
        return found

    def _spend(self, begin: float, usual: float, text: str) -> None:
        self._left -= max(0.0, time.thread_time() - begin - usual)
        if self._left <= 0:
            raise self._too_slow(text)

    def _too_slow(self, text: str) -> AdapterError:
        return AdapterError(
            "a regular expression of the config takes too long",
            where=self.where,
            expected=f"all of them done within {SECONDS:g} seconds",
            found=quoted(text),
            hint="Do not trust this file, or list the modules by name",
        )


def is_plain(text: str) -> bool:
    """Return whether an expression is a name, in which at most a dot can stand for another."""
    return _PLAIN.fullmatch(text) is not None


def _is_looked_up(text: str, within: str) -> bool:
    """Return whether an expression is a plain name, which is looked up and not matched."""
    if within == SUFFIX:
        return is_plain(text)
    return within in (WHOLE, BELOW) and is_segment(text)


def is_segment(text: str) -> bool:
    """Return whether an expression is a name without dots, which matches only itself."""
    return bool(text) and is_plain(text) and "." not in text


@lru_cache(maxsize=MAX_EXPRESSIONS)
def _compiled(within: str, text: str) -> _Pattern:
    import regex  # type: ignore[import-untyped]  # only adapters with expressions pay for it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of notations that may change their meaning one day
            re.compile(within.format(text))
            found: _Pattern = regex.compile(within.format(spelled_out(text)), cache_pattern=False)
            return found
    except Exception as error:  # compilers of strangers' expressions can raise anything
        raise BadExpressionError(f"{type(error).__name__}: {error}"[:200]) from None


def spelled_out(text: str) -> str:
    """Return an expression without the notations that ``regex`` reads in another way than ``re``.

    A brace that counts nothing, and a bracket inside a set, are plain characters to ``re``. To
    ``regex`` they can begin a fuzzy match (``{e<=1}``) and a class (``[[:alpha:]]``).
    """
    return _NOTATION.sub(_spelled_out, text)


def _spelled_out(match: re.Match[str]) -> str:
    if match["brace"]:
        return r"\{"
    if match["set"]:
        found: str = match["set"]
        return found[0] + _IN_SET.sub(lambda m: m[1] or r"\[", found[1:])
    return match[0]


def suffixes_of(name: str) -> Iterator[str]:
    """Yield a name, and what follows each of its dots, the longest first."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


_Value = TypeVar("_Value")


class FirstMatch(Generic[_Value]):
    """PEFT's lookup in ``rank_pattern`` and ``alpha_pattern``: the first pattern that matches.

    Plain names are found without going through them: some configs name every module.
    """

    def __init__(self, pairs: tuple[tuple[str, _Value], ...], expressions: Expressions) -> None:
        """Sort the patterns into plain names and expressions."""
        self._pairs, self._expressions = pairs, expressions
        # plain names by length, then by where their dots are: a dot matches any character
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = defaultdict(dict)
        self._others: list[tuple[int, str]] = []
        for number, (text, _) in enumerate(pairs):
            if not is_plain(text):
                self._others.append((number, text))
                continue
            dots = tuple(i for i, character in enumerate(text) if character == ".")
            self._names[len(text)].setdefault(dots, {}).setdefault(text, number)

    def find(self, name: str, default: _Value) -> _Value:
        """Return the value of the first pattern that matches, or ``default``.

        Raises:
            AdapterError: the expressions take too long.
        """
        if not self._pairs:
            return default
        first = self._first_plain(name)
        for number, text in self._others:
            if number > first:
                break
            if self._expressions.match(text, name, SUFFIX):
                first = number
                break
        return self._pairs[first][1] if first < len(self._pairs) else default

    def _first_plain(self, name: str) -> int:
        begin, first = time.thread_time(), len(self._pairs)
        for suffix in suffixes_of(name):
            for dots, names in self._names.get(len(suffix), {}).items():
                first = min(first, names.get(_dotted(suffix, dots), first))
        self._expressions.spend_since(begin)
        return first


def _dotted(name: str, dots: tuple[int, ...]) -> str:
    """Return ``name`` with a dot at each of these places."""
    characters = list(name)
    for at in dots:
        characters[at] = "."
    return "".join(characters)
