"""The dialects of adapters: who reads and writes each. A new one is a module and a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from regraft.formats import foreign
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.layout import ADAPTER_SAFE, MLX_WEIGHTS

if TYPE_CHECKING:  # to say what a file is takes no arrays
    from regraft.adapters.dialects.form import NewFile, PlainAdapter


class Reader(Protocol):
    """What a dialect's module has that reads it."""

    def read(self, path: Path, base: Checkpoint | None) -> PlainAdapter:
        """Read an adapter, from headers and configs.

        Args:
            path: its folder, or its weights file.
            base: the model it is for, where that is known: quantized weights are seen as plain.

        Raises:
            UnsupportedError: something in it has no counterpart in PEFT's format.
            AdapterError: it contradicts itself, or the base; all that is wrong at once.
            UsageError: it cannot be told without the base, and there is none.
            RegraftError: a file cannot be opened.
        """


class Writer(Protocol):
    """What a dialect's module has that writes it."""

    def write(self, adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
        """Return the files of an adapter in this dialect.

        Args:
            adapter: the adapter.
            base: the model it is for, where it is known; quantized weights are seen as plain.

        Raises:
            UnsupportedError: the dialect cannot say something that the adapter has; each such
                tensor is named, with what can.
            UsageError: it takes the base, and there is none.
        """


@dataclass(frozen=True)
class Dialect:
    """A way to write an adapter down.

    Attributes:
        name: how ``--to`` and ``--from`` call it.
        shown: what an adapter in it is called, such as ``"an MLX adapter"``.
        module: the module that reads or writes it.
        reads, writes: whether it does.
        uniform: whether it has one rank and one scale for all modules, or what its module calls
            sayable (``is_sayable``).
        weights: the usual name of its file of tensors.
        turned: whether its A is (in, r) and its B (r, out).
        notes: what to say to whoever writes it.
    """

    name: str
    shown: str
    module: str
    reads: bool = True
    writes: bool = True
    uniform: bool = False
    weights: str = ""
    turned: bool = False
    notes: tuple[str, ...] = ()

    @property
    def of_images(self) -> bool:
        """Whether its adapters are for parts of a pipeline that makes images."""
        return ".images." in self.module

    @property
    def reader(self) -> Callable[[Path, Checkpoint | None], PlainAdapter]:
        """What reads it."""
        return cast(Reader, import_module(self.module)).read

    def takes(self, adapter: PlainAdapter) -> bool:
        """Whether it can say an adapter's ranks and scales, as they are."""
        own = getattr(import_module(self.module), "is_sayable", None)
        if own is not None:
            return bool(own(adapter))
        forms = {(module.rank, module.scale) for module in adapter.modules}
        return not self.uniform or len(forms) <= 1

    @property
    def writer(self) -> Callable[[PlainAdapter, Checkpoint | None], tuple[NewFile, ...]]:
        """What writes it."""
        return cast(Writer, import_module(self.module)).write


_HERE = "regraft.adapters.dialects"

_LITGPT = (
    "litgpt merge_lora wants model_config.yaml and the tokenizer of its base beside the adapter",
    "and in hyperparameters.yaml, as checkpoint_dir, the path of that base",
)

_MISTRAL = (
    "mistral-inference reads no params.json: call load_lora with scaling= its lora.scaling",
)

_KOHYA = (
    "diffusers loses some of what it may say (alphas, DoRA): see regraft check --for diffusers",
)

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("peft", "an adapter in PEFT's format", f"{_HERE}.as_peft", reads=False),
        Dialect("mlx", foreign.MLX.name, f"{_HERE}.mlx", uniform=True, weights=MLX_WEIGHTS,
                turned=True),
        Dialect("torchtune", foreign.TORCHTUNE.name, f"{_HERE}.torchtune", uniform=True,
                weights="adapter_model.pt"),
        Dialect("litgpt", foreign.LITGPT.name, f"{_HERE}.litgpt", uniform=True,
                weights="lit_model.pth.lora", notes=_LITGPT),
        Dialect("tinker", foreign.TINKER.name, f"{_HERE}.tinker", uniform=True,
                weights=ADAPTER_SAFE),
        Dialect("automodel", foreign.AUTOMODEL.name, f"{_HERE}.automodel", uniform=True,
                weights=ADAPTER_SAFE),
        Dialect("mistral", foreign.MISTRAL.name, f"{_HERE}.mistral", uniform=True,
                weights="lora.safetensors", notes=_MISTRAL),
        Dialect("kohya", foreign.KOHYA.name, f"{_HERE}.images.kohya", notes=_KOHYA),
        Dialect("diffusers", foreign.DIFFUSERS.name, f"{_HERE}.images.diffusers"),
        Dialect("gguf", foreign.GGUF.name, f"{_HERE}.gguf", uniform=True),
    )
}  # fmt: skip
"""Every dialect that is read or written, by name."""


def dialect_of(layout: foreign.Layout) -> Dialect | None:
    """Return the dialect of a layout that files show, None where it is not read."""
    found = DIALECTS.get(layout.key)
    return found if found is not None and found.reads else None
