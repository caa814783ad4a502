"""What transformers says about names, as plain data.

Everything here imports torch and transformers, and so runs when the table is made and when it is
tested, never when regraft runs. Models are built on the meta device: no weights, no downloads.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import PreTrainedConfig, conversion_mapping, initialization
from transformers import core_model_loading as loading
from transformers.models.auto import modeling_auto

Facts = dict[str, Any]

TASKS = {
    "CAUSAL_LM": (
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    ),
    "FEATURE_EXTRACTION": ("AutoModel",),
    "IMAGE_CLS": ("AutoModelForImageClassification",),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "SEQ_CLS": ("AutoModelForSequenceClassification",),
    "TOKEN_CLS": ("AutoModelForTokenClassification",),
}
"""PEFT's task types to transformers' auto classes; the first that knows the model type is meant."""

LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "encoder_num_hidden_layers",
)
MAX_LAYERS = 6
"""Enough to show every kind of layer of a hybrid, and few enough to build in milliseconds."""

FILLERS = {
    "deepstack_layer_map": [[0, 0]],
    "downsample_rate": "1/2",
    "head_dim": 64,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "indexer_head_dim": 64,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 4,
    "kv_channels": 64,
    "layer_types": ["full_attention", "conv"] * (MAX_LAYERS // 2),
    "mlp_layer_types": ["dense", "sparse"] * (MAX_LAYERS // 2),
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "pad_token_id": 0,
    "prediction_length": 8,
    "top_k_experts": 2,
    "vocab_size": 128,
    "vocabulary_map": {"<image>": 0, "<|extra_200|>": 0},
}
"""Values for settings that have no default, tried when a default configuration cannot be built."""

REPAIRS: dict[str, Facts] = {
    "AyaVisionVisionConfig": {"num_attention_heads": 16},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "ReformerConfig": {"is_decoder": True},
    "SiglipVisionConfig": {"num_attention_heads": 16},
}
"""Settings whose defaults contradict each other, by configuration class; tried with FILLERS."""

_KINDS = {
    loading.WeightRenaming: "rename",
    loading.PrefixChange: "rename",
    loading.GroupWeightRename: "group",
    loading.Inkling2IndexOffsetWeightRename: "offset",
    loading.WeightConverter: "convert",
}


# --- the raw mappings -----------------------------------------------------------------------------


def describe_transform(transform: Any) -> Facts:
    """Return one renaming or conversion as data: patterns as transformers processed them."""
    facts: Facts = {
        "kind": _KINDS[type(transform)],
        "sources": list(transform.source_patterns),
        "targets": list(transform.target_patterns),
        "regex": transform.compiled_sources.pattern,
    }
    if facts["kind"] == "offset":
        facts["offset"] = transform.offset
    if facts["kind"] == "convert":
        facts["operations"] = [describe_operation(op) for op in transform.operations]
    return facts


def describe_operation(operation: Any) -> Facts:
    """Return one conversion step: its class name and those parameters that are set."""
    parameters = {
        name: value for name, value in vars(operation).items() if value not in (None, False)
    }
    return {"name": type(operation).__name__, **parameters}


def extract_mappings() -> dict[str, list[Facts] | str]:
    """Return every entry of transformers' conversion mapping, by class name or model type.

    An entry equal to that of an earlier key (an alias, mostly) is that key as a string.
    """
    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    return share_equal({key: [describe_transform(t) for t in mapping[key]] for key in mapping})


def share_equal(entries: dict[str, Any]) -> dict[str, Any]:
    """Return ``entries`` sorted by key, each that equals an earlier one replaced by its key."""
    owners: dict[str, str] = {}
    keyed = ((key, owners.setdefault(repr(entries[key]), key)) for key in sorted(entries))
    return {key: entries[key] if owner == key else owner for key, owner in keyed}


# --- the auto classes -----------------------------------------------------------------------------


def auto_classes() -> dict[str, dict[str, str]]:
    """Return, per auto class, the class name it builds for each model type."""
    found: dict[str, dict[str, str]] = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") or name == "AutoBackbone":
            names = mapping._model_mapping if mapping is not None else {}
            found[name] = {model_type: _first(classes) for model_type, classes in names.items()}
    return found


def _first(classes: str | tuple[str, ...]) -> str:
    return classes if isinstance(classes, str) else classes[0]


def reachable_classes() -> dict[str, str]:
    """Return every model class named in the auto mappings, and the model type it stands under."""
    reachable: dict[str, str] = {}
    for name, mapping in sorted(vars(modeling_auto).items()):
        if name.startswith("MODEL_") and name.endswith("_NAMES"):
            for model_type, classes in mapping.items():
                for class_name in (classes,) if isinstance(classes, str) else classes:
                    reachable.setdefault(class_name, model_type)
    return reachable


# --- building a model without weights -------------------------------------------------------------


def configs_in(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted path, config)`` for a configuration and those inside it, outermost first."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from configs_in(value, f"{path}.{name}".lstrip("."))


def small_config(config_class: Any, fill: bool = False, tie: bool = True) -> Any:
    """Return the default configuration with few layers; tied; with ``fill``, without gaps."""
    config = config_class()
    for _, part in configs_in(config):
        if tie:
            _set(part, "tie_word_embeddings", True)
        for name in LAYER_COUNTS:
            count = getattr(part, name, None)
            if type(count) is int and count > MAX_LAYERS:
                _set(part, name, MAX_LAYERS)
        if fill:
            _fill_gaps(part)
    return config


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(Exception):
        setattr(config, name, value)


def _fill_gaps(config: Any) -> None:
    for name, value in FILLERS.items():
        if getattr(config, name, 0) is None:
            _set(config, name, value)
    for name, value in REPAIRS.get(type(config).__name__, {}).items():
        _set(config, name, value)


@contextlib.contextmanager
def marking_auto_classes() -> Iterator[None]:
    """Have each model that an auto class builds remember, as ``_built_by``, which one it was."""

    def marked(original: Any) -> Any:
        def from_config(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
            model = original(cls, *args, **kwargs)
            model._built_by = cls.__name__
            return model

        return classmethod(from_config)

    with contextlib.ExitStack() as stack:
        for name in auto_classes():
            auto = getattr(transformers, name)
            original = auto.from_config.__func__
            stack.enter_context(mock.patch.object(auto, "from_config", marked(original)))
        yield


def build(model_class: Any) -> Any:
    """Return an instance on the meta device, its configuration shrunk, filled up or as it is.

    Raises:
        Exception: what the last attempt raised, when none succeeds.
    """
    attempts: list[Callable[[], Any]] = [
        lambda: small_config(model_class.config_class),
        lambda: small_config(model_class.config_class, fill=True),
        lambda: small_config(model_class.config_class, fill=True, tie=False),
        model_class.config_class,
    ]
    for attempt in attempts:
        try:
            with torch.device("meta"), initialization.no_init_weights(), marking_auto_classes():
                return model_class(attempt())
        except Exception as error:
            failure = error
    raise failure


# --- what one architecture is ---------------------------------------------------------------------


def template(name: str) -> str:
    """Return ``name`` with ``*`` for each part that is a number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def extract_architecture(model_class: Any) -> Facts:
    """Return the facts of one class; keys that would hold the usual value are left out.

    Keys: ``type``, ``prefix``, ``submodels`` (rows of path, class, model type, path of its
    configuration, auto class that built it), ``tied`` (rows of owner's path, target, source),
    ``ties`` (whether it ties when config.json does not say; ``"text_config"``: or when that
    says so), ``input``, ``output``, ``experts``, ``keep`` (names that look old but are not),
    ``holds`` (templates of its tensors, those inside its submodels aside), ``lacks`` (templates of
    tensors that its submodels have elsewhere, and not in it), ``labels`` (its tensors that have
    one row for each label).
    """
    model = build(model_class)
    modules = {id(module): path for path, module in model.named_modules()}
    facts = {
        **extract_basics(model_class),
        "submodels": extract_submodels(model),
        "tied": extract_ties(model),
        "input": modules.get(id(_embedding(model.get_input_embeddings))),
        "output": modules.get(id(_embedding(model.get_output_embeddings))),
        "experts": extract_experts(model),
        "keep": extract_keep(model),
        "holds": extract_tensors(model),
        "labels": extract_labels(model_class, model),
    }
    return {key: value for key, value in facts.items() if value}


def extract_basics(model_class: Any) -> Facts:
    """Return the facts that need no instance."""
    return {
        "type": model_class.config_class.model_type,
        "prefix": model_class.base_model_prefix,
        "ties": ties_by_default(model_class.config_class),
    }


def extract_partial(model_class: Any) -> Facts:
    """Return what is known of a class that cannot be built here: its own ties, if plainly named."""
    keys = getattr(model_class, "_tied_weights_keys", None)
    ties = keys if isinstance(keys, dict) else {}
    plain = re.compile(r"[\w.]+\.(weight|bias)")
    tied = [["", t, s] for t, s in ties.items() if plain.fullmatch(t) and plain.fullmatch(s)]
    facts = {**extract_basics(model_class), "tied": tied}
    return {key: value for key, value in facts.items() if value}


def ties_by_default(config_class: Any) -> bool | str:
    """Return what a configuration of this class says when the file is silent on tying."""
    try:
        default = bool(getattr(config_class(), "tie_word_embeddings", False))
    except Exception:
        return bool(getattr(config_class, "tie_word_embeddings", False))
    if default:
        return True
    with contextlib.suppress(Exception):
        text = {**config_class().text_config.to_dict(), "tie_word_embeddings": True}
        if getattr(config_class(text_config=text), "tie_word_embeddings", False):
            return "text_config"
    return False


def extract_submodels(model: Any) -> list[list[str]]:
    """Return the submodels in the order of ``named_modules``, as rows of strings."""
    return [
        [path, type(module).__name__, module.config.model_type, *_origin(model, module)]
        for path, module in model.named_modules()
        if path and isinstance(module, transformers.PreTrainedModel)
    ]


def _origin(model: Any, module: Any) -> tuple[str, str]:
    """Return where in the root's configuration the submodel's lies, and who built it."""
    parts = list(configs_in(model.config))
    tests: list[Callable[[Any], bool]] = [
        lambda config: config is module.config,
        lambda config: type(config) is type(module.config),
        lambda config: config.model_type == module.config.model_type,
    ]
    for test in tests:
        for path, config in parts:
            if test(config):
                return path, getattr(module, "_built_by", "")
    return "", ""


def extract_ties(model: Any) -> list[list[str]]:
    """Return ``[owner, target, source]`` for each tied parameter when everything ties.

    Owners are named by their configuration's path, for it is that configuration that decides.
    """
    rows: dict[str, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, transformers.PreTrainedModel):
            owner = _origin(model, module)[0] if path else ""
            prefix = f"{path}." if path else ""
            ties = module.get_expanded_tied_weights_keys(all_submodels=False)
            for target, source in ties.items():
                rows.setdefault(prefix + target, [owner, prefix + target, prefix + source])
    return list(rows.values())


def _embedding(getter: Callable[[], Any]) -> Any:
    try:
        return getter()
    except Exception:
        return None


def extract_experts(model: Any) -> Facts:
    """Return ``{module template: [is_transposed, *parameter names]}`` for stacked experts."""
    experts: Facts = {}
    for path, module in model.named_modules():
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        stacked = any(len(shape) == 3 for shape in shapes.values())
        if hasattr(module, "is_transposed") or (stacked and "experts" in path.split(".")[-1]):
            experts.setdefault(template(path), [_is_transposed(module, shapes), *shapes])
    return experts


def _is_transposed(module: Any, shapes: dict[str, tuple[int, ...]]) -> bool | None:
    """Return whether experts are (in, out): as declared, or else as their shapes show."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    if not {"gate_up_proj", "down_proj"} <= shapes.keys():
        return None
    (_, up_first, up_last), (_, down_first, down_last) = shapes["gate_up_proj"], shapes["down_proj"]
    plain = up_first == 2 * down_last and up_last == down_first
    transposed = up_last == 2 * down_first and up_first == down_last
    return transposed if plain != transposed else None


def extract_keep(model: Any) -> list[str]:
    """Return templates of parameters whose own names the mapping would change, wrongly.

    transformers' loader leaves such a name alone: renaming it leads nowhere, and the model has it.
    """
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    names = model.state_dict()
    kept = set()
    for name in names:
        renamed, _ = loading.rename_source_key(name, renamings, converters)
        if renamed != name and renamed not in names:
            kept.add(template(name))
    return sorted(kept)


def extract_tensors(model: Any) -> list[str]:
    """Return templates of the tensors that a checkpoint of a model has to have."""
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    optional = [re.compile(pattern) for pattern in ignored]
    names = (name for name in model.state_dict() if not any(p.search(name) for p in optional))
    return sorted({template(name) for name in names})


def nest_tensors(facts: dict[str, Facts]) -> None:
    """Have each class hold what lies outside its submodels only, and say what those lack in it."""
    built = {name for name, entry in facts.items() if "holds" in entry}
    whole = {name: frozenset(facts[name]["holds"]) for name in built}
    for name, entry in facts.items():
        inner = {
            tensor
            for path, class_name in outermost(entry.get("submodels", ()), whole)
            for tensor in (f"{template(path)}.{below}" for below in whole[class_name])
        }
        if name in built:  # of an outline, nothing is known
            entry["holds"] = sorted(whole[name] - inner)
            entry |= {"lacks": sorted(inner - whole[name])} if inner - whole[name] else {}


def outermost(
    submodels: Iterable[Sequence[str]], known: Container[str]
) -> Iterator[tuple[str, str]]:
    """Yield path and class of the submodels that are known and not inside another such one."""
    above: list[str] = []
    for path, class_name, *_ in submodels:
        if class_name in known and not any(path.startswith(f"{outer}.") for outer in above):
            above.append(path)
            yield path, class_name


def extract_labels(model_class: Any, model: Any) -> list[str]:
    """Return the tensors whose first axis is as long as the configuration has labels."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with contextlib.suppress(Exception):
        config = copy.deepcopy(model.config)
        config.num_labels = model.config.num_labels + 5
        with torch.device("meta"), initialization.no_init_weights():
            other = model_class(config).state_dict()
        grown = (name for name in shapes if name in other and shapes[name][:1])
        return [name for name in grown if other[name].shape[0] == shapes[name][0] + 5]
    return []
