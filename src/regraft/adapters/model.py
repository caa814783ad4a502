"""What an adapter is, whatever dialect it was written in.

Names of modules and parameters are the adapter's own, without PEFT's ``base_model.model.`` prefix
and without wrapper segments such as ``base_layer``; matching them with a base comes later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regraft.adapters.settings import LoraSettings
from regraft.tensors import TensorSpec

Origin = Literal["saved", "bias", "embedding"]
"""Why a whole tensor travels in an adapter.

``saved``: a module of ``modules_to_save``, trained on its own copy; ``bias``: ``bias="all"`` or
``"lora_only"``; ``embedding``: PEFT's copy of an embedding, a parameter of the base itself.
"""


FINGERPRINT = "regraft_base"
"""The key of a base's fingerprint in the header of an adapter's weights."""


@dataclass(frozen=True)
class LoraTarget:
    """The tensors one adapted module (or parameter) has in an adapter.

    Attributes:
        module: the module's name.
        kind: ``linear`` covers linear, convolution and expert weights; ``embedding`` keeps its
            factors transposed.
        a: A; ``(r, in)``, ``(r, in, *kernel)``, ``(r, vocab)``, or ``(experts * r, in)``.
        b: B; ``(out, r)``, ``(out, r, 1, ...)``, ``(dim, r)``, or ``(out, r * experts)``.
        b_bias: bias of B ``(out,)`` (``lora_bias``), if any.
        magnitude: DoRA's magnitude vector, if any.
        depth: wrappers inside the module around the one meant (``target_parameters``); 0 is the
            outermost.
    """

    module: str
    kind: Literal["linear", "embedding"]
    a: TensorSpec
    b: TensorSpec
    b_bias: TensorSpec | None = None
    magnitude: TensorSpec | None = None
    depth: int = 0


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of the adapter that takes the place of a parameter of the model."""

    parameter: str
    spec: TensorSpec
    origin: Origin


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that the adapter replaces.

    Attributes:
        module: the embedding's module name.
        indices: row numbers, in the order of ``spec``'s rows.
        spec: the new rows ``(n, dim)``; absolute values, despite PEFT's name for them.
    """

    module: str
    indices: tuple[int, ...]
    spec: TensorSpec


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read from headers and its config.

    Attributes:
        source: as the user named it.
        revision: the Hub commit, when it came from the Hub.
        root: the folder it lies in.
        weights_file: the name of the file that holds its tensors.
        weight: the user's factor on its scale.
        settings: its config.
        targets: adapted modules.
        whole: tensors that replace parameters.
        token_rows: embedding rows that are replaced.
        notes: what the user should know of how it was found.
        fingerprint: of the base that it was trained on, if it carries one; see
            :mod:`regraft.adapters.fingerprint`.
        origin: the folder or file that it was read from, where that is in another dialect than
            PEFT's; None where it is in ``root``.
    """

    source: str
    revision: str | None
    root: str
    weights_file: str
    weight: float
    settings: LoraSettings
    targets: tuple[LoraTarget, ...]
    whole: tuple[WholeTensor, ...]
    token_rows: tuple[TokenRows, ...]
    notes: tuple[str, ...] = ()
    fingerprint: str | None = None
    origin: Path | None = None

    @property
    def inputs(self) -> Path:
        """The folder or file of the user's that it was read from."""
        return Path(self.root) if self.origin is None else self.origin

    @property
    def files(self) -> tuple[Path, Path]:
        """Its config and its weights."""
        return Path(self.root) / "adapter_config.json", Path(self.root) / self.weights_file

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.source
