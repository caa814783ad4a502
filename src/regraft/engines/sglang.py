"""SGLang: PEFT folders, read by layer number and parts of names; one scale for all modules.

It does not run on machines without an accelerator, so these facts are from its source alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from regraft.engines.common import every_part, has_model, scales
from regraft.engines.facts import MERGE, UNIFORM, Engine, Rule, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject, is_head, stored_module
from regraft.shrinking.targets import Pair

_LAYER = re.compile(r"(^|\.)layers\.\d+\.")

JOINED = (("q_proj", "qkv_proj", ("v_proj",)), ("gate_proj", "gate_up_proj", ()))
"""Modules that it joins: the part that it looks for first, the whole, and the parts that have to be
there as well."""

EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules outside the layers that it takes, by a part of their names."""

SIZED = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj", "w1", "w2", "w3", "q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa",
    "q_b_proj", "kv_b_proj", "wq_b", "wk", "weights_proj",
)  # fmt: skip
"""Modules whose sizes it takes from the config, and w1 to w3 of experts, which it renames."""

OWN_SIZES = (
    "Gemma3n", "Gemma4", "Inkling", "InternS2", "Laguna", "Llama4", "NemotronH", "Qwen3_5",
)  # fmt: skip
"""What the names of classes begin with that say the sizes of their modules themselves."""

ORPHANS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Parts of joined modules that it finds only beside another one."""


def _configured_scale(subject: Subject, pair: Pair) -> float:
    del pair
    settings = subject.adapter.settings
    return settings.lora_alpha / settings.r


def layers_are_found(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find modules in no list called ``layers``, by which it tells where a tensor belongs."""
    del settings
    for pair in subject.pairs:
        name = stored_module(pair)
        if _LAYER.search(name) or any(known in name for known in EMBEDDINGS):
            continue
        because = (
            "its name has neither `layers.N` in it, by which SGLang tells where it belongs, nor "
        )
        because += " or ".join(EMBEDDINGS)
        yield Finding("leaves out", pair.name, because, MERGE)


def sizes_are_known(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find modules of layers for whose names it knows no sizes."""
    del settings
    if (subject.architecture or "").startswith(OWN_SIZES):
        return
    for pair in subject.pairs:
        name = stored_module(pair)
        leaf = name.rpartition(".")[2]
        if pair.layer != "experts" and _LAYER.search(name) and leaf not in SIZED:
            because = f"it knows no sizes of modules called {leaf}"
            yield Finding("refuses", pair.name, because, MERGE)


def tied_head(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find a tied head whose embedding has another name than the one that it unties them by."""
    del settings
    embedding = subject.index.names.input_embedding or ""
    if not subject.is_tied or embedding.endswith("embed_tokens"):
        return
    for pair in subject.pairs:
        if is_head(subject, pair.target.module):
            because = "it has a head of its own for a tied model if the embedding is embed_tokens"
            yield Finding("leaves out", pair.name, because, MERGE)


def ranks_are_one(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find modules of another rank than the config's ``r``."""
    del settings
    r = subject.adapter.settings.r
    for pair in subject.pairs:
        if pair.rank != r:
            because = f"its rank is {pair.rank}, and every module has to have the config's r, {r}"
            yield Finding("refuses", pair.name, because, UNIFORM)


def joined_parts(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find parts of joined modules whose other parts are not adapted."""
    del settings
    there = {stored_module(pair) for pair in subject.pairs}
    for pair in subject.pairs:
        owner, _, leaf = stored_module(pair).rpartition(".")
        missing = [m for first, _, rest in JOINED if leaf == first for m in rest]
        missing += [ORPHANS[leaf]] if leaf in ORPHANS else []
        absent = [name for name in missing if f"{owner}.{name}" not in there]
        if absent:
            because = f"it joins {leaf} with {absent[0]}, which the adapter does not have"
            yield Finding("refuses", pair.name, because, MERGE)


def target_expression(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find a ``target_modules`` that is a regular expression."""
    del settings
    wanted = subject.adapter.settings.target_modules
    if isinstance(wanted, str) and wanted not in ("all", "all-linear"):
        because = "target_modules is a regular expression, of which it takes none"
        way_out = "Write the names as a list in adapter_config.json; or: " + UNIFORM
        yield from (Finding("refuses", name, because, way_out) for name in every_part(subject))


SGLANG = Engine(
    name="sglang",
    shown="SGLang",
    version="0.5.23",
    sources=(
        "sglang/srt/lora/lora_config.py", "sglang/srt/lora/lora.py",
        "sglang/srt/lora/lora_manager.py", "sglang/srt/lora/mem_pool.py",
        "sglang/srt/lora/utils.py",
    ),
    distributions=("sglang",),
    has_class=lambda architecture: has_model("sglang", architecture),
    dialect="peft",
    rules=(
        Rule("dora", "refuses", "LoRA serving does not support DoRA adapters"),
        Rule("bias of a factor", "leaves out", "of a module's B it keeps the weight"),
        Rule("bias", "leaves out", "of a module's tensors it keeps the factors"),
        Rule("saved", "leaves out", "it takes no modules that are replaced"),
        Rule("token rows", "leaves out", "it takes no trained token rows"),
        Rule("grown embedding", "leaves out", "it takes no copy of an embedding"),
        Rule(
            "starts with the base", "misapplies",
            "it does not look at init_lora_weights, and leaves the base as it is",
            "Save it with PEFT's path_initial_model_for_weight_conversion; or: " + MERGE,
        ),
        Rule(
            "other part", "misapplies", "it tells by `layers.N` where a tensor belongs, and takes "
            "it for one of the language model's layer of that number",
        ),
        Rule("stack of experts", "refuses", "it takes experts one by one, not as a stack"),
        Rule("convolution", "refuses", "it has no LoRA for convolutions"),
    ),
    checks=(
        scales(
            _configured_scale, "it takes lora_alpha / r of the config for every module, and knows "
            "neither rsLoRA nor patterns", UNIFORM,
        ),
        layers_are_found, sizes_are_known, tied_head, ranks_are_one, joined_parts,
        target_expression,
    ),
    notes=("SGLang was not run: these facts are from its source alone",),
    ran=False,
)  # fmt: skip
