"""One model's architecture: a class's facts, with the submodels that its configuration names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.names import table
from regraft.names.rules import Rule

Config = Mapping[str, Any]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def template(name: str) -> str:
    """Return ``name`` with ``*`` for each part that is a number."""
    return _NUMBER.sub("*", name)


@dataclass(frozen=True)
class Submodel:
    """A model inside a model.

    Attributes:
        path: where it hangs; ``""`` is the whole model.
        class_name: its class.
        model_type: its configuration's type.
    """

    path: str
    class_name: str
    model_type: str


@dataclass(frozen=True)
class Architecture:
    """What regraft needs to know of a model's structure; every name is canonical.

    Attributes:
        class_name: the model's class.
        prefix: its ``base_model_prefix``.
        submodels: itself and its submodels, in the order of ``named_modules``.
        tied: parameter to the one it is tied to, when everything ties.
        tied_now: those that are tied under the configuration given.
        ties_by_default: whether it ties when its config.json does not say.
        input: path of the input embedding.
        output: path of the output embedding.
        experts: template of a module's path to ``(is_transposed, parameter names)``.
        keep: templates of names that look like old ones but are not.
    """

    class_name: str
    prefix: str
    submodels: tuple[Submodel, ...]
    tied: dict[str, str]
    tied_now: dict[str, str]
    ties_by_default: bool
    input: str | None
    output: str | None
    experts: dict[str, tuple[bool | None, tuple[str, ...]]] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()


def compose(class_name: str, facts: Mapping[str, Any], config: Config) -> Architecture:
    """Return the architecture of ``class_name`` under ``config``.

    A submodel that transformers builds by its configuration's type (a text tower, a backbone) is
    replaced, with all below it, where ``config`` names another type than the default.
    """
    swaps = list(_swaps(facts, config))
    gone = [f"{swap.path}." for swap, _ in swaps]
    architecture = Architecture(
        class_name=class_name,
        prefix=facts.get("prefix", ""),
        submodels=tuple(_submodels(class_name, facts, swaps)),
        tied={target: source for _, target, source in facts.get("tied", ())},
        tied_now={t: s for owner, t, s in facts.get("tied", ()) if _ties(facts, config, owner)},
        ties_by_default=_default(facts, config),
        input=facts.get("input"),
        output=facts.get("output"),
        experts={p: (e[0], tuple(e[1:])) for p, e in _outside(facts.get("experts", {}), gone)},
        keep=frozenset(name for name, _ in _outside(dict.fromkeys(facts.get("keep", ())), gone)),
    )
    for swap, inner_config in swaps:
        architecture = _put_in(architecture, facts, swap, inner_config)
    return architecture


def rules_for(architecture: Architecture) -> list[Rule]:
    """Return the rules of a model and its submodels, in the order transformers applies them.

    Follows ``get_model_conversion_mapping``: a class's own entry goes before its model type's,
    and an entry is not used again below a submodel that had it.
    """
    rules: list[Rule] = []
    users: dict[str, list[str]] = {}
    for submodel in architecture.submodels:
        key = _mapping_key(submodel, users)
        if key is not None:
            scopes = _scopes(submodel.path, architecture.prefix)
            rules += [Rule.from_table(entry, scopes) for entry in table.mapping(key) or ()]
            for used in {submodel.class_name, key}:
                users.setdefault(used, []).append(submodel.path)
    return rules + [Rule.from_table(entry, ()) for entry in table.mapping("legacy") or ()]


def _mapping_key(submodel: Submodel, users: Mapping[str, list[str]]) -> str | None:
    """Return the key of the entry that a submodel brings in, None when it brings none."""

    def used_above(key: str) -> bool:
        above = users.get(key, ())
        return any(not path or submodel.path.startswith(f"{path}.") for path in above)

    if used_above(submodel.class_name):
        return None
    if table.mapping(submodel.class_name) is not None:
        return submodel.class_name
    if used_above(submodel.model_type) or table.mapping(submodel.model_type) is None:
        return None
    return submodel.model_type


def _scopes(path: str, prefix: str) -> tuple[str, ...]:
    """Return the prefixes a submodel's rules hold below: with the base model's prefix, or without.

    The base model's own scope is empty: any name, once with its prefix taken off.
    """
    if not path:
        return ()
    scope = path.removeprefix(prefix).removeprefix(".")
    scope = f"{scope}." if scope else ""
    return (f"{prefix}.{scope}" if prefix else scope, scope)


def _submodels(
    class_name: str, facts: Mapping[str, Any], swaps: list[tuple[Submodel, Config]]
) -> Iterator[Submodel]:
    """Yield the model and its submodels, those swapped in standing where the old ones stood."""
    by_path = {swap.path: swap for swap, _ in swaps}
    yield Submodel("", class_name, facts.get("type", ""))
    for path, name, model_type, *_ in facts.get("submodels", ()):
        if not any(path.startswith(f"{swapped}.") for swapped in by_path):
            yield by_path.get(path, Submodel(path, name, model_type))


def _swaps(facts: Mapping[str, Any], config: Config) -> Iterator[tuple[Submodel, Config]]:
    """Yield the submodels that are not of the default class, and their configurations."""
    done: list[str] = []
    for path, class_name, model_type, config_path, auto in facts.get("submodels", ()):
        if not (auto and config_path) or any(path.startswith(f"{above}.") for above in done):
            continue
        inner = subconfig(config, config_path)
        inner_type = inner.get("model_type")
        if not isinstance(inner_type, str) or inner_type == model_type:
            continue
        found = table.auto_class(auto, inner_type)
        if found is not None and found != class_name:
            done.append(path)
            yield Submodel(path, found, inner_type), inner


def subconfig(config: Config, path: str) -> Config:
    """Return the configuration at a dotted path, empty where there is none."""
    for name in path.split(".") if path else ():
        inner = config.get(name)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _outside(entries: Mapping[str, Any], gone: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the entries whose path does not lie below one that was swapped out."""
    for path, value in entries.items():
        if not any(f"{path}.".startswith(template(prefix)) for prefix in gone):
            yield path, value


def _put_in(
    outer: Architecture, facts: Mapping[str, Any], swap: Submodel, config: Config
) -> Architecture:
    """Return ``outer`` with the facts of a submodel other than the default one."""
    inner = compose(swap.class_name, table.architecture(swap.class_name) or {}, config)
    default = _default_input(facts, swap.path)
    return Architecture(
        class_name=outer.class_name,
        prefix=outer.prefix,
        submodels=_spread(outer.submodels, swap, inner.submodels),
        tied=_retie(outer.tied, inner.tied, swap.path, default, inner.input),
        tied_now=_retie(outer.tied_now, inner.tied_now, swap.path, default, inner.input),
        ties_by_default=outer.ties_by_default,
        input=_moved(outer.input, swap.path, inner.input),
        output=_moved(outer.output, swap.path, inner.output),
        experts=outer.experts | {_join(swap.path, p): e for p, e in inner.experts.items()},
        keep=outer.keep | {_join(swap.path, name) for name in inner.keep},
    )


def _spread(
    outer: tuple[Submodel, ...], swap: Submodel, inner: tuple[Submodel, ...]
) -> tuple[Submodel, ...]:
    """Return ``outer`` with the models below the one swapped in right behind it."""
    below = [Submodel(_join(swap.path, m.path), m.class_name, m.model_type) for m in inner[1:]]
    at = outer.index(swap) + 1
    return (*outer[:at], *below, *outer[at:])


def _retie(
    outer: Mapping[str, str],
    inner: Mapping[str, str],
    path: str,
    old_input: str | None,
    new_input: str | None,
) -> dict[str, str]:
    """Return the ties of a model whose submodel at ``path`` was swapped for another class.

    Its own ties inside go and those of the new class come; what was tied to the old submodel's
    input embedding is tied to the new one's.
    """
    prefix = f"{path}."
    ties = {target: source for target, source in outer.items() if not target.startswith(prefix)}
    if old_input and new_input:
        old, new = f"{old_input}.weight", f"{_join(path, new_input)}.weight"
        ties = {target: new if source == old else source for target, source in ties.items()}
    return ties | {prefix + target: prefix + source for target, source in inner.items()}


def _default_input(facts: Mapping[str, Any], path: str) -> str | None:
    """Return the input embedding of the submodel that stands at ``path`` by default."""
    rows = {row[0]: row[1] for row in facts.get("submodels", ())}
    inner = (table.architecture(rows[path]) or {}).get("input")
    return _join(path, inner) if inner else None


def _moved(outer: str | None, path: str, inner: str | None) -> str | None:
    """Return a module's path, taken from the submodel swapped in where it lies inside that."""
    if outer is None or not outer.startswith(f"{path}."):
        return outer
    return _join(path, inner) if inner else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _default(facts: Mapping[str, Any], config: Config) -> bool:
    """Return whether a class ties when config.json is silent at its top level."""
    ties = facts.get("ties", False)
    if ties == "text_config":
        return bool(subconfig(config, "text_config").get("tie_word_embeddings", False))
    return bool(ties)


def _ties(facts: Mapping[str, Any], config: Config, owner: str) -> bool:
    """Return whether the (sub)model whose configuration lies at ``owner`` ties its weights."""
    default = _default(facts, config)
    if owner:
        default = _default(_owner_facts(facts, owner), subconfig(config, owner))
    said = subconfig(config, owner).get("tie_word_embeddings")
    from_text = facts.get("ties") == "text_config" and not owner and default
    return from_text or (default if said is None else bool(said))


def _owner_facts(facts: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
    """Return the facts of the first submodel built from the configuration at ``owner``."""
    for row in facts.get("submodels", ()):
        if row[3] == owner:
            return table.architecture(row[1]) or {}
    return {}


def tensors_of(class_name: str, config: Config) -> frozenset[str] | None:
    """Return templates of the tensors that a class has under ``config``; None when not known.

    What hangs on settings other than a submodel's class is as the default configuration has it.
    """
    facts = table.architecture(class_name)
    if facts is None or "holds" not in facts:
        return None
    swaps = {swap.path: (swap.class_name, inner) for swap, inner in _swaps(facts, config)}
    gone = tuple(template(f"{path}.") for path in swaps)
    found = {name for name in facts["holds"] if not name.startswith(gone)}
    above: list[str] = []
    for path, default, _, config_path, *_ in facts.get("submodels", ()):
        if any(path.startswith(f"{outer}.") for outer in above):
            continue
        inner_class, inner = swaps.get(path, (default, subconfig(config, config_path)))
        inside = tensors_of(inner_class, inner)
        if inside is not None:
            above.append(path)
            found |= {f"{template(path)}.{name}" for name in inside}
        elif path in swaps:
            return None
    return frozenset(found - set(facts.get("lacks", ())))
