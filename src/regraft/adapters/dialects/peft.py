"""PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from regraft.adapters.dialects.shared.once import twice
from regraft.adapters.fingerprint import KEY
from regraft.adapters.model import Adapter, LoraTarget, TokenRows, WholeTensor
from regraft.adapters.settings import LoraSettings, read_settings
from regraft.adapters.wrappers import plain_key
from regraft.errors import AdapterError, Problem
from regraft.formats import foreign
from regraft.formats.adapter_files import AdapterFiles
from regraft.formats.problems import quoted
from regraft.tensors import WORKING_DTYPES, TensorSpec

_FACTOR = re.compile(
    r"^(?P<module>.+?)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?P<rest>(\.[^.]+)*)$"
)
_TOKENS = re.compile(r"^(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?$")
_UNTRAINED = ".original_module."
_TOKEN_BASE = ".token_adapter.base_layer."
_EMBEDDING_LEAVES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")
_COUNT_OF_BATCHES = ".num_batches_tracked"
_STATISTICS = (
    "Merge it with PEFT's merge_and_unload(), or train with the batch norms left out of "
    "modules_to_save"
)
_SAVED_COPY = re.compile(r"\.modules_to_save(\.[^.]+)?\.")


@dataclass
class _Parts:
    """Tensors of one adapted module while they are being gathered."""

    found: dict[str, TensorSpec] = field(default_factory=dict)


def read_adapter(files: AdapterFiles, weight: float = 1.0) -> Adapter:
    """Return the adapter in PEFT's files, from headers alone.

    Args:
        files: the opened adapter.
        weight: the user's factor on its scale.

    Raises:
        UnsupportedError: a feature that cannot be merged.
        AdapterError: tensors without their pair, of odd dtypes, or that belong to nothing.
    """
    where = files.weights_shown
    if found := foreign.of_tensors({name: spec.shape for name, spec in files.tensors.items()}):
        raise foreign.refusal(*found, where)
    settings = read_settings(files.config, files.config_shown)
    problems: list[Problem] = []
    parts, rest = _gather(files, problems, where)
    targets = _targets(parts, problems, where)
    tokens, rest = _token_rows(rest, settings, problems, where)
    whole = _whole_tensors(rest, settings, problems, where)
    if not (targets or tokens or whole) and not problems:
        problems.append(
            Problem(
                "the adapter holds no tensors", where, hint="Was training stopped before a save?"
            )
        )
    if problems:
        raise AdapterError(problems)
    return Adapter(
        files.source, files.revision, str(files.root), files.weights_file, weight, settings,
        targets, whole, tokens, files.notes, files.metadata.get(KEY),
        files.origin,
    )  # fmt: skip


def _gather(
    files: AdapterFiles, problems: list[Problem], where: str
) -> tuple[dict[str, _Parts], dict[str, TensorSpec]]:
    """Sort tensors into factors by module, and everything else by cleaned name."""
    parts: dict[str, _Parts] = defaultdict(_Parts)
    rest: dict[str, TensorSpec] = {}
    for key, spec in files.tensors.items():
        name = plain_key(key)
        if name.endswith(_OF_VELORA) and files.config.get("velora_config"):
            continue  # a projection for its backward pass; its forward pass is LoRA's
        problems += _unusable(key, spec, where)
        if match := _FACTOR.match(name):
            slot = match["what"] + (".bias" if match["rest"].endswith(".bias") else "")
            same = parts[match["module"]].found.setdefault(slot, spec)
        else:
            same = rest.setdefault(name, spec)
        if same is not spec:
            problems.append(twice(same.name, spec.name, where))
    return parts, rest


def _unusable(key: str, spec: TensorSpec, where: str) -> list[Problem]:
    if spec.dtype not in WORKING_DTYPES:
        if key.endswith(_COUNT_OF_BATCHES):
            return [
                Problem(
                    f"tensor {key!r} is of a batch norm, whose statistics are not merged",
                    where,
                    hint=_STATISTICS,
                )
            ]
        what, expected = "has a dtype that adapters do not have", " or ".join(WORKING_DTYPES)
        return [Problem(f"tensor {key!r} {what}", where, expected, spec.dtype)]
    if 0 in spec.shape:
        hint = "Sharded training (ZeRO-3, FSDP) has to gather the weights before saving"
        return [Problem(f"tensor {key!r} is empty", where, found=str(spec.shape), hint=hint)]
    return []


def _targets(
    parts: dict[str, _Parts], problems: list[Problem], where: str
) -> tuple[LoraTarget, ...]:
    targets = []
    for path, gathered in parts.items():
        target = _target(path, gathered.found)
        if target is None:
            problems.append(_missing_pair(path, gathered.found, where))
        else:
            targets.append(target)
    return tuple(targets)


def _target(path: str, found: dict[str, TensorSpec]) -> LoraTarget | None:
    for kind, a, b in _PAIRS:
        if a in found and b in found:
            unknown = set(found) - {a, b, f"{b}.bias", "lora_magnitude_vector"}
            if unknown:
                return None
            return LoraTarget(
                module=strip_wrappers(path),
                kind=kind,
                a=found[a],
                b=found[b],
                b_bias=found.get(f"{b}.bias"),
                magnitude=found.get("lora_magnitude_vector"),
                depth=wrapper_depth(path),
            )
    return None


_OF_VELORA = ".lora_velora_embed"

_Kind = Literal["linear", "embedding"]
_PAIRS: tuple[tuple[_Kind, str, str], ...] = (
    ("linear", "lora_A", "lora_B"),
    ("embedding", "lora_embedding_A", "lora_embedding_B"),
)


def strip_wrappers(path: str) -> str:
    """Return a module's name without PEFT's ``base_layer`` segments."""
    return ".".join(segment for segment in path.split(".") if segment != "base_layer")


def wrapper_depth(path: str) -> int:
    """Return how many ``base_layer`` segments end a module's path."""
    segments = path.split(".")
    depth = 0
    while segments and segments[-1] == "base_layer":
        segments.pop()
        depth += 1
    return depth


def _missing_pair(path: str, found: dict[str, TensorSpec], where: str) -> Problem:
    return Problem(
        f"module {strip_wrappers(path)!r} has no complete pair of factors",
        where,
        expected="lora_A and lora_B",
        found=", ".join(sorted(found)),
        hint="The file was cut or edited; save or download the adapter again",
    )


def _token_rows(
    rest: dict[str, TensorSpec], settings: LoraSettings, problems: list[Problem], where: str
) -> tuple[tuple[TokenRows, ...], dict[str, TensorSpec]]:
    rows, others = [], {}
    for name, spec in rest.items():
        match = _TOKENS.match(name)
        if match is None:
            others[name] = spec
            continue
        indices = _indices_of(match["module"], settings)
        if len(spec.shape) != 2 or len(indices) != spec.shape[0]:
            problems.append(
                Problem(f"token rows of {match['module']!r} do not fit the config", where,
                        f"{len(indices)} rows (trainable_token_indices)", str(spec.shape))
            )  # fmt: skip
            continue
        rows.append(TokenRows(strip_wrappers(match["module"]), indices, spec))
    return tuple(rows), others


def _indices_of(module: str, settings: LoraSettings) -> tuple[int, ...]:
    """Return the rows trained in an embedding; a list in the config means the input embedding."""
    listed = settings.trainable_token_indices
    for name, indices in listed:
        if name == "" or module == name or module.endswith(f".{name}"):
            return indices
    # The other side of a tie: PEFT writes the rows there too when the vocabulary grew.
    return listed[0][1] if len(listed) == 1 else ()


def _whole_tensors(
    rest: dict[str, TensorSpec], settings: LoraSettings, problems: list[Problem], where: str
) -> tuple[WholeTensor, ...]:
    whole: dict[str, WholeTensor] = {}
    copies_last = sorted(rest.items(), key=lambda item: bool(_SAVED_COPY.search(item[0])))
    for name, spec in copies_last:
        if _UNTRAINED in name and settings.modules_to_save:
            continue  # the base's own weights, which PEFT writes along when the vocabulary grew
        parameter = strip_wrappers(_SAVED_COPY.sub(".", name))
        if parameter in whole and whole[parameter].spec.shape == spec.shape:
            continue  # PEFT writes a grown embedding twice; the plain name is the one it loads
        tensor = _whole_tensor(parameter, spec, settings)
        if _TOKEN_BASE in name:
            parameter = strip_wrappers(name.replace(_TOKEN_BASE, "."))
            tensor = WholeTensor(parameter, spec, "embedding")
        if tensor is None:
            problems.append(_belongs_to_nothing(name, settings, where))
        else:
            whole[parameter] = tensor
    return tuple(whole.values())


def _whole_tensor(parameter: str, spec: TensorSpec, settings: LoraSettings) -> WholeTensor | None:
    module, _, leaf = parameter.rpartition(".")
    if settings.saves(parameter):
        return WholeTensor(parameter, spec, "saved")
    if leaf == "bias" and settings.bias != "none":
        return WholeTensor(parameter, spec, "bias")
    if leaf in ("weight", "bias") and module.rpartition(".")[2] in _EMBEDDING_LEAVES:
        return WholeTensor(parameter, spec, "embedding")
    if leaf == "weight" and settings.targets(module) and len(spec.shape) == 2:
        return WholeTensor(parameter, spec, "embedding")
    return None


def _belongs_to_nothing(name: str, settings: LoraSettings, where: str) -> Problem:
    saved = ", ".join(map(quoted, settings.modules_to_save[:20])) or "none"
    bias = quoted(settings.bias)
    return Problem(
        f"tensor {name!r} belongs to nothing that the config describes",
        where,
        expected=f"LoRA factors, modules_to_save ({saved}), or biases (bias={bias})",
        hint="PEFT would leave it out in silence. If the adapter trained this module, its config "
        "lacks it (modules_to_save); else another program wrote the file in its own layout",
    )
