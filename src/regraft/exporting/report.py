"""What an export made, for people and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """What :func:`regraft.export` made.

    Attributes:
        model: as the user named it.
        output: the file or folder that was made.
        engine: what it was made for: ``gguf``, ``ollama`` or ``mlx``.
        files: names of the files of a folder; of a file, its own.
        nbytes: what they take.
        architecture: GGUF's or transformers' name of the model's kind.
        types: number of tensors of each type, in GGUF.
        tokenizer: what the tokenizer is to llama.cpp; empty for MLX.
        blake3: digest of the GGUF file (hex); empty for MLX.
        changes: keys of the config that were added, for MLX.
        notes: what the user should know.
        seconds: how long it took.
    """

    model: str
    output: str
    engine: str
    files: tuple[str, ...]
    nbytes: int
    architecture: str
    types: Mapping[str, int] = field(default_factory=dict)
    tokenizer: str = ""
    blake3: str = ""
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)
