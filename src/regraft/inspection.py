"""What a path or Hub id is: a base model, a merged one, or an adapter. Reads headers only.

inspect -> locate the files -> read headers and configs -> Inspection
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from blake3 import blake3

from regraft.adapters.known_settings import unknown_settings
from regraft.adapters.model import FINGERPRINT
from regraft.adapters.settings import refusals
from regraft.adapters.wrappers import plain_key
from regraft.errors import AdapterError, FormatError, InputError, Problem
from regraft.formats import foreign
from regraft.formats.adapter_files import AdapterFiles, adapter_folder, layout_of
from regraft.formats.checkpoint import Checkpoint, open_checkpoint
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import access_error
from regraft.formats.gguf import open_gguf
from regraft.formats.gguf_header import PLAN_KEY, raw_head
from regraft.formats.hub import Located, locate
from regraft.formats.layout import ADAPTER_CONFIG, RECEIPT, looks_like, receipt_path
from regraft.formats.problems import quoted
from regraft.formats.remote import checkpoint_of, fetch_headers, is_whole
from regraft.merging.inputs.any_dialect import dialect_at, open_adapter
from regraft.tensors import TensorSpec

if TYPE_CHECKING:
    pass

Kind = Literal["base", "merged", "adapter"]
GGUF = "gguf"
"""What ``quantization`` says of a model in GGUF."""

Value = TypeVar("Value")

MAX_RECEIPT_BYTES = 2**28
"""A receipt has a record per tensor, so it may be larger than other JSON files."""


@dataclass(frozen=True)
class DTypeShare:
    """How much of the tensors is of one dtype.

    Attributes:
        dtype: a key of :data:`regraft.tensors.DTYPES`; in GGUF, the name of a ggml type.
        tensors: number of tensors.
        elements: elements as the header counts them; in GGUF, values.
        bytes: bytes of data.
    """

    dtype: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class FileFacts:
    """A weights file: its name, the bytes of its tensors, and how many there are."""

    name: str
    bytes: int
    tensors: int


@dataclass(frozen=True)
class ModelFacts:
    """What ``config.json`` says of a model; None or empty where it is silent.

    Attributes:
        model_type: transformers' name of the architecture.
        architectures: transformers' classes.
        layers: number of layers.
        hidden: width of the hidden states.
        vocab: rows of the embedding.
        tied_embeddings: whether input and output embeddings share a tensor.
        quantization: the ``quant_method`` of a quantized checkpoint.
    """

    model_type: str | None
    architectures: tuple[str, ...]
    layers: int | None
    hidden: int | None
    vocab: int | None
    tied_embeddings: bool | None
    quantization: str | None


@dataclass(frozen=True)
class MergeFacts:
    """What the receipt of a merged model says.

    Attributes:
        base: the base as it was named, with its revision.
        adapters: name and weight of each adapter, in order.
        created: UTC time of the merge, ISO 8601.
        regraft: version of regraft that merged it.
        relative_delta: |delta|/|W| over all adapted weights.
        changed_share: share of the adapted elements that changed.
    """

    base: str
    adapters: tuple[tuple[str, float | None], ...]
    created: str
    regraft: str
    relative_delta: float | None
    changed_share: float | None


@dataclass(frozen=True)
class FingerprintFacts:
    """The fingerprint of its base that an adapter carries.

    Attributes:
        parameters: of how many parameters values are kept.
        values: how many values.
        quantized: whether the base was quantized.
    """

    parameters: int
    values: int
    quantized: bool


@dataclass(frozen=True)
class AdapterFacts:
    """What ``adapter_config.json`` and the adapter's tensors say.

    Attributes:
        peft_type: PEFT's name of the method, such as ``"LORA"``.
        base: the base it claims to be trained on.
        base_revision: and that base's revision.
        task_type: such as ``"CAUSAL_LM"``.
        r: rank in the config.
        alpha: lora_alpha in the config.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        patterned: whether rank_pattern or alpha_pattern give some modules another scale.
        rslora: whether the scale divides by sqrt(r).
        dora: whether there are magnitude vectors.
        lora_bias: whether lora_B has biases.
        ranks: ranks seen in the tensors, and in how many modules.
        target_modules: as the config states them: names, or one regex.
        target_parameters: parameters (of experts) that are adapted.
        modules: modules adapted in fact.
        adapted: the same, counted by the last part of their names.
        modules_to_save: modules that the adapter replaces whole.
        token_rows: embedding rows that the adapter replaces.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.
        init: how the adapter was initialized, ``"true"`` for PEFT's default.
        unmergeable: features that cannot be merged, each with its reason.
        peft_version: version of PEFT that saved it.
        unknown_settings: settings that are switched on and that regraft does not know.
        fingerprint: of its base; None if it carries none.
        dialect: what it is written in, such as ``"mlx"``; the rest is what that is in PEFT's words.
        needs_base: why the base is needed to say more, ``""`` where it is not. Names and shapes may
            then be the file's own.
    """

    peft_type: str
    base: str | None
    base_revision: str | None
    task_type: str | None
    r: int | None
    alpha: float | None
    scale: float | None
    patterned: bool
    rslora: bool
    dora: bool
    lora_bias: bool
    ranks: Mapping[int, int]
    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    modules: int
    adapted: Mapping[str, int]
    modules_to_save: tuple[str, ...]
    token_rows: int
    bias: str
    init: str
    unmergeable: tuple[str, ...]
    peft_version: str | None
    unknown_settings: tuple[str, ...]
    fingerprint: FingerprintFacts | None = None
    dialect: str = "peft"
    needs_base: str = ""


@dataclass(frozen=True)
class Inspection:
    """The answer of :func:`inspect`.

    Attributes:
        kind: what it is.
        source: as the caller named it.
        revision: the Hub commit, when it came from the Hub.
        parameters: elements of all tensors, as stored: packed weights count packed; in GGUF,
            values.
        bytes: bytes of all tensors.
        dtypes: share of each dtype, the largest first.
        files: the files that hold tensors.
        model: what the config says, for a base or merged model that has one.
        merge: what the receipt says, for a merged model; None of a GGUF file without its receipt.
        adapter: what an adapter is made of.
    """

    kind: Kind
    source: str
    revision: str | None
    parameters: int
    bytes: int
    dtypes: tuple[DTypeShare, ...]
    files: tuple[FileFacts, ...]
    model: ModelFacts | None = None
    merge: MergeFacts | None = None
    adapter: AdapterFacts | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as JSON-ready objects."""
        return asdict(self)


def inspect(path: str | Path, *, token: str | None = None) -> Inspection:
    """Say what a path or a Hub id is, from headers and configs alone.

    A base on the Hub is not fetched: its headers are read where they are.

    Args:
        path: a folder, a weights file, or ``org/name[@revision]``.
        token: a Hub token; by default the one huggingface_hub knows of.

    Raises:
        InputError: there is no such thing, or it is neither a model nor an adapter.
        FormatError: a header, an index or a config is malformed.
        AdapterError: an adapter's config holds values of the wrong kind.
        UnsupportedError: it is of a kind that regraft does not read, such as GGUF.
        AccessError: the system refused to read it.
        EnvironmentShortfall: the Hub cannot be reached.
    """
    located = locate(path, kind="adapter", token=token)
    try:
        return _inspect(located, token)
    except OSError as error:
        raise access_error(Path(error.filename or located.path), error) from None


def _inspect(located: Located, token: str | None) -> Inspection:
    if (below := adapter_folder(located)[0]) is not located:
        raise InputError(
            "is neither a model nor an adapter: the adapter lies in a folder below",
            where=str(located.path), expected="the adapter's own folder",
            found=quoted(below.path.name), hint=f"Inspect {below.source}",
        )  # fmt: skip
    looks = looks_like(located.path)
    if looks in ("adapter", "mlx-adapter") or dialect_at(located) is not None:
        return _of_adapter(open_adapter(located, described=True))
    if layout := layout_of(located):
        raise foreign.refusal(*layout, located.path)
    if looks == "gguf":
        return _of_gguf(located)
    if located.subfolder:  # the Hub tells headers of files at the top alone
        located = locate(located.source, kind="base", token=token)
    elif located.repo_id is not None and not is_whole(located.path):
        return _of_hub_model(located, token)
    return _of_checkpoint(open_checkpoint(located), merged=looks == "merged")


def _of_checkpoint(checkpoint: Checkpoint, *, merged: bool) -> Inspection:
    receipt = checkpoint.root / RECEIPT
    tensors = checkpoint.tensors
    files = [(s.name, [tensors[n] for n in s.tensors if n in tensors]) for s in checkpoint.shards]
    return Inspection(
        kind="merged" if merged else "base",
        source=checkpoint.source,
        revision=checkpoint.revision,
        model=_model_facts(checkpoint.config),
        merge=_merge_facts(receipt) if merged else None,
        **_sizes(files),
    )


@dataclass(frozen=True)
class _Blocks:
    """A tensor in GGUF: its ggml type, its values, and their bytes."""

    dtype: str
    numel: int
    nbytes: int


def _of_gguf(located: Located) -> Inspection:
    """Describe a GGUF model; one that regraft merged says so, and its receipt lies beside it."""
    from regraft.merging.inputs.base import open_base

    base = open_base(located)
    file = open_gguf(base.shards[0].path)
    files: dict[Path, list[_Blocks]] = {path: [] for path in file.paths}
    for tensor in file.tensors.values():
        found = _Blocks(tensor.type, math.prod(tensor.shape), tensor.stored.nbytes)
        files[tensor.stored.path].append(found)
    said = {**(base.config or {}), "quantization_config": {"quant_method": GGUF}}
    merged = PLAN_KEY in file.metadata
    return Inspection(
        kind="merged" if merged else "base",
        source=base.source,
        revision=base.revision,
        model=_model_facts(said),
        merge=_merge_beside(file.paths[0]) if merged else None,
        **_sizes([(path.name, tensors) for path, tensors in files.items()]),
    )


def _merge_beside(path: Path) -> MergeFacts | None:
    """Return what the receipt beside a GGUF file says; None where there is none of this file."""
    receipt = receipt_path(path)
    if not receipt.is_file():
        return None
    headers = read_json_object(receipt, max_bytes=MAX_RECEIPT_BYTES).get("headers")
    known = headers.values() if isinstance(headers, dict) else ()
    return _merge_facts(receipt) if blake3(raw_head(path)).hexdigest() in known else None


def _of_adapter(adapter: AdapterFiles) -> Inspection:
    return Inspection(
        kind="adapter",
        source=adapter.source,
        revision=adapter.revision,
        adapter=_adapter_facts(adapter),
        **_sizes([(adapter.weights_file, list(adapter.tensors.values()))]),
    )


def _sizes(files: Sequence[tuple[str, Sequence[TensorSpec | _Blocks]]]) -> dict[str, Any]:
    """Return the fields of an inspection that are sums over tensors."""
    tensors = [spec for _, specs in files for spec in specs]
    return {
        "parameters": sum(spec.numel for spec in tensors),
        "bytes": sum(spec.nbytes for spec in tensors),
        "dtypes": _dtype_shares(tensors),
        "files": tuple(FileFacts(name, sum(s.nbytes for s in t), len(t)) for name, t in files),
    }


def _dtype_shares(tensors: Iterable[TensorSpec | _Blocks]) -> tuple[DTypeShare, ...]:
    by_dtype: dict[str, list[TensorSpec | _Blocks]] = {}
    for spec in tensors:
        by_dtype.setdefault(spec.dtype, []).append(spec)
    shares = (
        DTypeShare(dtype, len(specs), sum(s.numel for s in specs), sum(s.nbytes for s in specs))
        for dtype, specs in by_dtype.items()
    )
    return tuple(sorted(shares, key=lambda share: (-share.bytes, share.dtype)))


# ---- models


def _model_facts(config: Mapping[str, Any] | None) -> ModelFacts | None:
    """Return the facts of a config; where it lacks one, that of its ``text_config``."""
    if config is None:
        return None
    nested = config.get("text_config")
    levels = [config, nested] if isinstance(nested, dict) else [config]
    return ModelFacts(
        model_type=_first(levels, str, "model_type"),
        architectures=_strings(config.get("architectures")),
        layers=_first(levels, int, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=_first(levels, int, "hidden_size", "n_embd", "d_model"),
        vocab=_first(levels, int, "vocab_size"),
        tied_embeddings=_first(levels, bool, "tie_word_embeddings"),
        quantization=_quantization(config),
    )


def _first(levels: Iterable[Mapping[str, Any]], kind: type[Value], *names: str) -> Value | None:
    """Return the first value of type ``kind`` that a level has under one of the names."""
    found = (level.get(name) for level in levels for name in names)
    return next((value for value in found if type(value) is kind), None)


def _quantization(config: Mapping[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    return str(quantization.get("quant_method") or "unnamed")


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _merge_facts(path: Path) -> MergeFacts:
    """Return what a receipt says."""
    receipt = read_json_object(path, max_bytes=MAX_RECEIPT_BYTES)
    try:
        return MergeFacts(
            base=_named(receipt["base"]),
            adapters=tuple((_named(a), a["weight"]) for a in receipt["adapters"]),
            created=str(receipt["created"]),
            regraft=str(receipt["regraft"]),
            relative_delta=receipt["totals"]["relative_delta"],
            changed_share=receipt["totals"]["changed_share"],
        )
    except (KeyError, TypeError) as error:
        raise FormatError(
            "is not a receipt that this version can read",
            where=str(path),
            expected="base, adapters, created, regraft and totals",
            found=f"{type(error).__name__}: {error}",
            hint="Merge again, or delete it to treat the folder as a plain model",
        ) from None


def _named(record: Mapping[str, Any]) -> str:
    """Return the name of an input, with its Hub commit where it has one."""
    source, revision = str(record["source"]), record["revision"]
    return f"{source.partition('@')[0]}@{revision}" if revision else source


# ---- models on the Hub


def _of_hub_model(located: Located, token: str | None) -> Inspection:
    checkpoint = checkpoint_of(located, fetch_headers(located, token))
    files = [
        (shard.name, [checkpoint.tensors[name] for name in shard.tensors])
        for shard in checkpoint.shards
    ]
    return Inspection(
        kind="base",
        source=located.source,
        revision=located.revision,
        model=_model_facts(checkpoint.config),
        **_sizes(files),
    )


# ---- adapters

_FACTOR = re.compile(r"(.+)\.(?:lora_([AB])(?:\.[^.]+)?\.weight|lora_embedding_([AB])(?:\.[^.]+)?)")
_TOKEN_ROWS = re.compile(r".+\.trainable_tokens_delta(?:\.[^.]+)?")


def _adapter_facts(adapter: AdapterFiles) -> AdapterFacts:
    config = _Config(adapter.config, adapter.root / ADAPTER_CONFIG)
    names = adapter.tensors
    ranks = _ranks(adapter.tensors, config)
    r, alpha = config.number("r"), config.number("lora_alpha")
    rslora = bool(config.get("use_rslora"))
    facts = AdapterFacts(
        peft_type=str(config.get("peft_type") or "unknown"),
        base=config.text("base_model_name_or_path"),
        base_revision=config.text("revision"),
        task_type=config.text("task_type"),
        r=None if r is None else int(r),
        alpha=alpha,
        scale=_scale(r, alpha, rslora=rslora),
        patterned=bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        rslora=rslora,
        dora=bool(config.get("use_dora")) or any("lora_magnitude_vector" in n for n in names),
        lora_bias=bool(config.get("lora_bias")),
        ranks=dict(sorted(Counter(ranks.values()).items())),
        target_modules=config.names_or_pattern("target_modules"),
        target_parameters=config.names("target_parameters"),
        modules=len(ranks),
        adapted=dict(Counter(map(_leaf, ranks)).most_common()),
        modules_to_save=config.names("modules_to_save"),
        token_rows=sum(s.shape[0] for n, s in names.items() if s.shape and _TOKEN_ROWS.match(n)),
        bias=config.text("bias") or "none",
        init=str(config.get("init_lora_weights", True)).lower(),
        unmergeable=tuple(what for what, _ in refusals(adapter.config)),
        peft_version=config.text("peft_version") if adapter.dialect == "peft" else None,
        unknown_settings=unknown_settings(adapter.config),
        fingerprint=_fingerprint_facts(adapter.metadata.get(FINGERPRINT)),
        dialect=adapter.dialect,
        needs_base=adapter.needs_base,
    )
    config.raise_problems()
    return facts


def _fingerprint_facts(text: str | None) -> FingerprintFacts | None:
    if text is None:
        return None
    from regraft.adapters.fingerprint import parsed

    found = parsed(text)
    if found is None:
        return None
    return FingerprintFacts(len(found.shapes), sum(map(len, found.values)), found.coded)


def _ranks(tensors: Mapping[str, TensorSpec], config: _Config) -> dict[str, int]:
    """Return the rank of each adapted module: the second dimension of B, or without B A's first.

    Experts adapted by ``target_parameters`` stack theirs: A is (experts * r, in), and the number of
    experts is not in the adapter, so they count with the config's rank.
    """
    stated = config.get("r")
    ranks: dict[str, int] = {}
    for name, spec in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match and len(spec.shape) > 1:
            module, is_b = plain_key(match[1]), "B" in (match[2], match[3])
            ranks[module] = spec.shape[1] if is_b else ranks.get(module, spec.shape[0])
            if isinstance(stated, int) and _is_parameter(module, config):
                ranks[module] = stated
    return ranks


def _is_parameter(module: str, config: _Config) -> bool:
    """Whether ``module`` holds a parameter that ``target_parameters`` names."""
    owners = {name.rpartition(".")[0] for name in config.names("target_parameters")}
    plain = f".{_without_wrappers(module)}"
    return any(plain.endswith(f".{owner}") for owner in owners if owner)


def _without_wrappers(module: str) -> str:
    return module.replace(".base_layer", "")


def _leaf(module: str) -> str:
    return _without_wrappers(module).rpartition(".")[2]


def _scale(r: float | None, alpha: float | None, *, rslora: bool) -> float | None:
    """Return alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    if not r or alpha is None or r < 0:
        return None
    return alpha / (math.sqrt(r) if rslora else r)


class _Config:
    """``adapter_config.json``, whose values a stranger chose: wrong kinds are gathered."""

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.get = fields.get
        self._path = path
        self._problems: dict[str, Problem] = {}

    def raise_problems(self) -> None:
        """Raise all values of the wrong kind together."""
        if self._problems:
            raise AdapterError(list(self._problems.values()))

    def number(self, name: str) -> float | None:
        """Return a number, or None where there is none."""
        value = self.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None or (is_number and abs(value) <= sys.float_info.max):
            return value
        return self._bad(name, "a finite number", None)

    def text(self, name: str) -> str | None:
        """Return a string, or None where there is none."""
        value = self.get(name)
        return (
            value if value is None or isinstance(value, str) else self._bad(name, "a string", None)
        )

    def names(self, name: str) -> tuple[str, ...]:
        """Return a list of names, empty where there is none."""
        value = self.get(name)
        if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            return tuple(value or ())
        return self._bad(name, "a list of names", ())

    def names_or_pattern(self, name: str) -> str | tuple[str, ...]:
        """Return a list of names, or the one string that is a regex."""
        value = self.get(name)
        return value if isinstance(value, str) else self.names(name)

    def _bad(self, name: str, expected: str, fallback: Value) -> Value:
        found = repr(self.get(name))[:80]
        self._problems[name] = Problem(
            "a field is of the wrong kind", f"{self._path}, {name}", expected, found
        )
        return fallback
