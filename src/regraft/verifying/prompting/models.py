"""Models for prompts: which class of transformers loads one, and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regraft.errors import EnvironmentShortfall, InputError, RegraftError, UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.parsed import check_parsed
from regraft.formats.problems import quoted
from regraft.libraries import from_pretrained
from regraft.system.memory import available_memory

SPARE = 1.25
"""Memory wanted for a model, as a factor on its weights in float32."""


def auto_class(model: Checkpoint) -> str:
    """Return the class of transformers that loads a model which continues text.

    Raises:
        UnsupportedError: it is another kind of model.
        InputError: there is no config, or only a file was named.
    """
    if model.single_file or model.config is None:
        raise InputError(
            "prompts need a whole model: weights, config and tokenizer", where=model.source,
            expected="a folder", found="a file" if model.single_file else "no config.json",
        )  # fmt: skip
    from transformers.models.auto import modeling_auto

    kind, names = model.config.get("model_type"), model.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for auto, table in (
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        known = table.get(kind) if isinstance(kind, str) else None
        if known is not None and name in (known, None) and not _encodes(model.config):
            return auto
    raise UnsupportedError(
        "answers to prompts cannot be compared for this kind of model", where=model.source,
        expected="a model that continues text, which transformers knows",
        found=quoted(name or kind) + (", an encoder-decoder" if _encodes(model.config) else ""),
        hint="Leave --prompts out: its tensors are compared all the same",
    )  # fmt: skip


def _encodes(config: dict[str, Any]) -> bool:
    return bool(config.get("is_encoder_decoder") or text_config(config).get("is_encoder_decoder"))


@contextmanager
def loading(model: Checkpoint, what: str) -> Iterator[None]:
    """Turn whatever goes wrong while transformers loads something into typed errors."""
    try:
        yield
    except (RegraftError, MemoryError):
        raise
    except Exception as error:  # the library's errors are of many kinds
        if is_out_of_memory(error):
            raise no_memory(model.source, first_line(error)) from None
        raise UnsupportedError(
            f"transformers cannot load {what}", where=model.source, found=first_line(error)
        ) from None


def load_model(model: Checkpoint, dtype: str = "float32") -> Any:
    """Return a model for evaluation.

    Raises:
        UnsupportedError: transformers cannot load it.
        InputError: weights are missing, which transformers would fill with random numbers.
        EnvironmentShortfall: it does not fit into memory.
    """
    import transformers

    _check_memory(model)
    check_parsed(model.root)
    with loading(model, "it"):
        loaded, info = from_pretrained(
            getattr(transformers, auto_class(model)), model.root, dtype=dtype,
            local_files_only=True, weights_only=True, output_loading_info=True,
        )  # fmt: skip
    lost = sorted({*info["missing_keys"], *map(_name, info["mismatched_keys"])})
    if lost:
        raise InputError(
            "weights are missing: it gives no answers of its own", where=model.source,
            found=f"{len(lost)} without a value, such as {quoted(lost[0])}",
        )  # fmt: skip
    return loaded.eval()


def _name(mismatch: Any) -> str:
    return str(mismatch[0] if isinstance(mismatch, tuple) else mismatch)


def float32_bytes(model: Checkpoint) -> int:
    """Return what a model's weights take in float32, in bytes."""
    return 4 * sum(spec.numel for spec in model.tensors.values())


def _check_memory(model: Checkpoint) -> None:
    """Refuse to load what does not fit, where the system says how much there is (Linux)."""
    free = available_memory()
    needed = int(SPARE * float32_bytes(model))
    if free is not None and free < needed:
        found = f"{free / 1e9:.1f} GB available"
        raise no_memory(model.source, found, f"{needed / 1e9:.1f} GB")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch's says that memory ran out."""
    return "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error)


def no_memory(where: str, found: str, expected: str = "") -> EnvironmentShortfall:
    """Return the error of a model that does not fit."""
    return EnvironmentShortfall(
        "not enough memory to run prompts through the model", where=where, expected=expected,
        found=found, hint="Leave --prompts out: tensors are compared within --max-memory",
    )  # fmt: skip


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that is the language model's."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:300]}"
