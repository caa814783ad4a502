"""From any name a tensor or module has had, to the parameter of the current transformers model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from regraft.names import table
from regraft.names.architecture import (
    Architecture,
    Config,
    compose,
    rules_for,
    template,
    tensors_of,
)
from regraft.names.pieces import Piece
from regraft.names.rules import RuleSet

DEFAULT_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)
"""Which auto class speaks for a model type when config.json names no architecture; first wins."""

GUESSED_TIES = {"lm_head.weight": "model.embed_tokens.weight"}
"""What an unknown model that says ``tie_word_embeddings`` ties: the usual names. A guess; whoever
uses it checks that the source is there and the target is not."""

_UNKNOWN = Architecture("", "", (), {}, {}, False, None, None)


@dataclass(frozen=True)
class NameMap:
    """The names of one model: make it with :meth:`for_config`.

    Attributes:
        architecture: the model's class; None when unknown.
        known: whether the class is in the table. The map of an unknown one changes no name.
        base_model_prefix: such as ``"model"``; ``""`` when unknown.
        tied: parameter to the parameter it is tied to, if everything ties; canonical names.
        tied_now: those of ``tied`` that this configuration ties.
        ties_by_default: whether the class ties when config.json does not say at its top level.
        input_embedding: module path such as ``"model.embed_tokens"``; None when unknown.
        output_embedding: module path such as ``"lm_head"``; None when unknown or there is none.
    """

    architecture: str | None
    known: bool
    base_model_prefix: str
    tied: Mapping[str, str]
    tied_now: Mapping[str, str]
    ties_by_default: bool
    input_embedding: str | None
    output_embedding: str | None
    _facts: Architecture
    _config: Config
    _groups: frozenset[int] = frozenset()

    @classmethod
    def for_config(cls, config: Config | None, architecture: str | None = None) -> NameMap:
        """Return the map for a config.json's content.

        The class is ``architecture`` if given, else the first of config's ``architectures``, else
        what its ``model_type`` stands for. A class that brings its own code (``auto_map``) and is
        not in the table, or no config at all, gives a map that changes no name.
        """
        config = config if config is not None else {}
        name = architecture or _named_class(config)
        facts = table.architecture(name) if name else None
        if facts is None and not architecture and not config.get("auto_map"):
            default = _default_class(config)
            facts = table.architecture(default) if default else None
            name = default if facts is not None else name
        if name is None or facts is None:
            return _unknown(name, config)
        return _known(compose(name, facts, config), config)

    @property
    def ties(self) -> bool:
        """Whether the model as configured ties any weights."""
        return bool(self.tied_now)

    def for_names(self, names: Iterable[str]) -> NameMap:
        """Return the map for one file's names.

        A few models shift names (``norm0`` to ``norm1`` and ``norm1`` to ``norm2``), so that one
        name alone does not tell old from new. Seeing all names does; without them such a name is
        taken as new.
        """
        groups = self._rules.groups_in(list(names)) if self.known else frozenset()
        return self if groups == self._groups else replace(self, _groups=groups)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return what a tensor of a *checkpoint* is, by its full name: one piece per parameter.

        A name that is nobody's comes back as it is.
        """
        if self._facts.keep and template(name) in self._facts.keep:
            return (Piece(name),)
        return self._rules.pieces(name) if self.known else (Piece(name),)

    def targets(self, name: str) -> tuple[Piece, ...]:
        """Return what an *adapter* means by a parameter's name.

        As :meth:`pieces`, except that a name which is canonical already means the parameter
        itself: an adapter trained on the current model has the parameter's layout, also where
        files keep another layout under the same name.
        """
        pieces = self.pieces(name)
        return (Piece(name),) if len(pieces) == 1 and pieces[0].parameter == name else pieces

    def canonical_candidates(self, name: str) -> tuple[tuple[Piece, ...], ...]:
        """Return the pieces of ``name``, then with the base model's prefix added, then without it.

        transformers' loader takes the one that the model has; so should the caller. The prefix is
        added and taken off both before and after renaming, as rules may need it or bring it.
        """
        prefix = f"{self.base_model_prefix}."
        candidates = [self.pieces(name)]
        if self.base_model_prefix:
            if not name.startswith(prefix):
                candidates += [_prefixed(candidates[0], prefix), self.pieces(prefix + name)]
            candidates.append(_unprefixed(candidates[0], prefix))
            if name.startswith(prefix):
                candidates.append(self.pieces(name.removeprefix(prefix)))
        return tuple(dict.fromkeys(candidates))

    def expert_parameters(self, module: str) -> tuple[str, ...]:
        """Return the names of an experts module's parameters as registered, () when unknown."""
        return self._facts.experts.get(template(module), (None, ()))[1]

    @property
    def has_experts(self) -> bool:
        """Whether the model is known to keep stacks of experts' matrices."""
        return bool(self._facts.experts)

    def is_transposed(self, module: str) -> bool | None:
        """Return whether an experts module stores (in, out) matrices; None when unknown."""
        return self._facts.experts.get(template(module), (None, ()))[0]

    @cached_property
    def tensors(self) -> frozenset[str] | None:
        """Templates (``*`` for a number) of the tensors that the class has; None when unknown."""
        return tensors_of(self._facts.class_name, self._config) if self.known else None

    def has(self, parameter: str, tensors: frozenset[str]) -> bool:
        """Whether a parameter, or it with or without the base model's prefix, is among templates.

        transformers' loader tries the same three names.
        """
        name, prefix = template(parameter), f"{self.base_model_prefix}."
        return not tensors.isdisjoint((name, prefix + name, name.removeprefix(prefix)))

    @cached_property
    def label_tensors(self) -> frozenset[str]:
        """The tensors that have one row for each label of a head; none when unknown."""
        facts = table.architecture(self._facts.class_name) or {}
        return frozenset(facts.get("labels", ()))

    @cached_property
    def _rules(self) -> RuleSet:
        rules = RuleSet.of(rules_for(self._facts), self._config)
        return replace(rules, active=self._groups)


def _named_class(config: Config) -> str | None:
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None


def _default_class(config: Config) -> str | None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    found = (table.auto_class(auto, model_type) for auto in DEFAULT_CLASSES)
    return next((name for name in found if name), None)


def _known(facts: Architecture, config: Config) -> NameMap:
    return NameMap(
        architecture=facts.class_name,
        known=True,
        base_model_prefix=facts.prefix,
        tied=MappingProxyType(facts.tied),
        tied_now=MappingProxyType(facts.tied_now),
        ties_by_default=facts.ties_by_default,
        input_embedding=facts.input,
        output_embedding=facts.output,
        _facts=facts,
        _config=config,
    )


def _unknown(name: str | None, config: Mapping[str, Any]) -> NameMap:
    tied = GUESSED_TIES if "tie_word_embeddings" in config else {}
    return NameMap(
        architecture=name,
        known=False,
        base_model_prefix="",
        tied=MappingProxyType(tied),
        tied_now=MappingProxyType(tied if config.get("tie_word_embeddings") else {}),
        ties_by_default=False,
        input_embedding=None,
        output_embedding=None,
        _facts=_UNKNOWN,
        _config=config,
    )


def _prefixed(pieces: tuple[Piece, ...], prefix: str) -> tuple[Piece, ...]:
    """Return ``pieces`` with the prefix before each parameter that lacks it."""
    return tuple(
        p if p.parameter.startswith(prefix) else replace(p, parameter=prefix + p.parameter)
        for p in pieces
    )


def _unprefixed(pieces: tuple[Piece, ...], prefix: str) -> tuple[Piece, ...]:
    return tuple(replace(p, parameter=p.parameter.removeprefix(prefix)) for p in pieces)
