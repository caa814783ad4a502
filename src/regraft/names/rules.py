"""Renamings and conversions of the table, compiled, with transformers' way of matching them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regraft.names.pieces import Conversion, Match, Piece

_BACKREFERENCE = re.compile(r"\\(\d+)")


@dataclass(frozen=True)
class Rule:
    """One entry of a mapping, perhaps limited to one submodel.

    Attributes:
        kind: ``rename``; ``group`` (several renamings that hold together or not at all);
            ``offset`` (a renaming that shifts an index); ``convert`` (tensors change too).
        sources: source patterns as written, ``*`` standing for an index.
        targets: replacement texts, ``\\1`` standing for what the source captured.
        regex: all sources as one expression, the i-th in a group named ``g<i>``.
        scopes: prefixes below which the rule holds, the first that fits counting; empty: anywhere.
        operations: what a conversion does to the tensors.
        offset: what an offset adds.
    """

    kind: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    regex: re.Pattern[str]
    scopes: tuple[str, ...] = ()
    operations: tuple[Mapping[str, Any], ...] = ()
    offset: int = 0

    @classmethod
    def from_table(cls, entry: Mapping[str, Any], scopes: tuple[str, ...]) -> Rule:
        """Return the rule that a table's entry describes."""
        return cls(
            kind=entry["kind"],
            sources=tuple(entry["sources"]),
            targets=tuple(entry["targets"]),
            regex=re.compile(entry["regex"]),
            scopes=scopes,
            operations=tuple(entry.get("operations", ())),
            offset=entry.get("offset", 0),
        )

    def rename(self, name: str, active: bool = True) -> str:
        """Return ``name`` renamed, or as it is where the rule does not apply.

        ``active`` tells a group whether it holds; others do not ask.
        """
        found = self._search(name)
        if found is None:
            return name
        prefix, rest, match = found
        source = int((match.lastgroup or "g0")[1:])
        if self.kind == "group" and source and not active:
            return name
        return prefix + rest.replace(match.group(0), self._replacement(match, source), 1)

    def guards(self, name: str) -> bool:
        """Return whether ``name`` meets a group's first source, and so shows that it holds."""
        found = self._search(name)
        return found is not None and found[2].lastgroup == "g0"

    def convert(self, name: str, config: Mapping[str, Any]) -> tuple[Piece, ...] | None:
        """Return what the tensor ``name`` is, None when the conversion is not for it."""
        found = self._search(name)
        if found is None:
            return None
        prefix, rest, match = found
        source = int((match.lastgroup or "g0")[1:])
        parameter = prefix + rest.replace(match.group(0), self._replacement(match, source), 1)
        index = self._index(match.group(0), source)
        conversion = Conversion(self.sources, self.targets, self.operations, config)
        return conversion.pieces(Match(parameter, source, index))

    def _search(self, name: str) -> tuple[str, str, re.Match[str]] | None:
        """Return ``(scope, name below it, match)``; only the first scope that fits is tried."""
        if not self.scopes:
            match = self.regex.search(name)
            return None if match is None else ("", name, match)
        for scope in self.scopes:
            if name.startswith(scope):
                rest = name[len(scope) :]
                match = self.regex.search(rest)
                return None if match is None else (scope, rest, match)
        return None

    def _replacement(self, match: re.Match[str], source: int) -> str:
        """Return the target's text for a match, its references filled in."""
        group = self.regex.groupindex[f"g{source}"]
        if self.kind == "offset":
            return self.targets[0].replace(r"\1", str(int(match.group(group + 1)) + self.offset))
        if self.kind != "group":
            target = self.targets[0]
            return target.replace(r"\1", match.group(group + 1)) if r"\1" in target else target
        return _BACKREFERENCE.sub(
            lambda reference: match.group(group + int(reference.group(1))), self.targets[source]
        )

    def _index(self, text: str, source: int) -> int | None:
        """Return the number that stands for the source's ``*``, None without one."""
        pattern = self._starred[source]
        match = pattern.match(text) if pattern else None
        digits = match.group("index") if match else ""
        return int(digits) if digits.isdecimal() else None

    @cached_property
    def _starred(self) -> list[re.Pattern[str] | None]:
        return [
            re.compile(source.replace("*.", r"(?P<index>.*)\.", 1)) if "*." in source else None
            for source in self.sources
        ]


@dataclass(frozen=True)
class RuleSet:
    """The rules of one model: all renamings in order, then at most one conversion.

    Attributes:
        renamings: rules that change names only.
        conversions: rules that change tensors.
        active: which of ``renamings`` are groups that hold for the names at hand.
        config: the model's configuration.
    """

    renamings: tuple[Rule, ...]
    conversions: tuple[Rule, ...]
    active: frozenset[int]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, rules: Sequence[Rule], config: Mapping[str, Any]) -> RuleSet:
        """Sort ``rules`` into renamings and conversions; no group holds yet."""
        renamings = tuple(rule for rule in rules if rule.kind != "convert")
        conversions = tuple(rule for rule in rules if rule.kind == "convert")
        return cls(renamings, conversions, frozenset(), config)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return what the tensor ``name`` is."""
        renamed = name
        for i, rule in enumerate(self.renamings):
            renamed = rule.rename(renamed, i in self.active)
        for rule in self.conversions:
            pieces = rule.convert(renamed, self.config)
            if pieces is not None:
                return pieces
        return (Piece(renamed),)

    def groups_in(self, names: Sequence[str]) -> frozenset[int]:
        """Return which renamings are groups that hold, as the names of one file show."""
        groups = [i for i, rule in enumerate(self.renamings) if rule.kind == "group"]
        return frozenset(i for i in groups if any(self._guarded(i, name) for name in names))

    def _guarded(self, group: int, name: str) -> bool:
        for rule in self.renamings[:group]:
            name = rule.rename(name, active=False)
        return self.renamings[group].guards(name)
