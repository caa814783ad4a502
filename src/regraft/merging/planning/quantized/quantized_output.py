"""Planning an output that is quantized: in the base's own format, or in another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regraft.adapters.settings import RESAVE
from regraft.errors import Problem, UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.merging.files.receipt import Action
from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.inputs.dequantized_view import (
    CONFIG_KEYS,
    GGUF,
    Quantization,
    as_stored,
    virtual,
)
from regraft.merging.inputs.gguf_types import OfType
from regraft.merging.options import KEEP
from regraft.merging.planning.match import Work
from regraft.merging.planning.plan import Made, Segment, Step
from regraft.merging.planning.quantized.linear_layers import is_linear, plain_modules
from regraft.quant.registry import maker_of
from regraft.quant.weight import FORMATS, QuantizedWeight
from regraft.tensors import WORKING_DTYPES

Plain = Callable[[str], Step]
"""Gives the step that a tensor has in a merge into plain values."""


def resolved(
    quantize: str | None, quantization: Quantization | None, *, double_quant: bool = False
) -> str | None:
    """Return ``keep`` where the format asked for is the one that the base has."""
    if quantization is None or quantization.formats != (quantize,):
        return quantize
    codecs = [weight.codec for weight in quantization.weights.values()]
    plain = any(getattr(codec, "nested", None) is None for codec in codecs)
    return quantize if double_quant and plain else KEEP


def kept_format(base: Checkpoint, quantization: Quantization | None) -> Quantization:
    """Return a base's quantization, so that the output can keep its format.

    Raises:
        UnsupportedError: the base is not quantized, or its format cannot be written.
    """
    if quantization is not None and quantization.method == GGUF:
        return quantization  # of which only the tensors that an adapter has a say in are written
    if quantization is None:
        raise UnsupportedError(
            "the base is not quantized, so there is no format to keep", where=base.source,
            found="--quantize keep", expected=f"--quantize {'|'.join(FORMATS)}",
            hint="Name a format, or merge without --quantize",
        )  # fmt: skip
    unwritable = {w.codec.name for w in quantization.weights.values() if not w.codec.is_writable}
    if unwritable:
        raise UnsupportedError(
            "this format is read, but not written", where=base.source,
            found=", ".join(sorted(unwritable)), hint="Merge without --quantize keep",
        )  # fmt: skip
    return quantization


def unfit_for_codes(works: Iterable[Work], *, kept: bool) -> list[Problem]:
    """Return what an adapter asks for that cannot be done to a quantized weight."""
    problems = []
    for work in works:
        if work.base is None or not work.base.is_virtual:
            continue
        if any(delta.is_residual for delta in work.deltas):
            problems.append(
                Problem("PiSSA and OLoRA began from another base than this quantized one",
                        work.name, hint=RESAVE)
            )  # fmt: skip
        elif kept and (work.replaced or work.carried or work.patches):
            problems.append(
                Problem("the adapter replaces a quantized weight, which cannot stay quantized",
                        work.name, hint="Merge without --quantize into a folder")
            )  # fmt: skip
    return problems


# -- the base's format -----------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptSteps:
    """Makes the steps of a merge that keeps the base's format: one for each stored tensor."""

    works: Mapping[str, Work]
    quantization: Quantization
    plain: Plain
    segments: Callable[[Work], tuple[Segment, ...]]
    of_type: OfType | None = None

    def step(self, name: str) -> Step:
        """Return what becomes of a stored tensor."""
        stored = self.quantization.stored.tensors[name]
        owner = self.quantization.owners.get(name)
        if owner is None and name not in self.quantization.skipped:
            return self.plain(name)
        weight = self.quantization.weights.get(owner or "")
        work = self.works.get(owner or "")
        if weight is not None and self.of_type is not None:
            return self._in_blocks(name, weight, work, self.of_type)
        if weight is None or work is None or name != weight.codes.name:
            return Step(name, "copy", stored, None, stored.dtype, stored.shape)
        return Step(
            name, "merge", work.source, None, stored.dtype, stored.shape, self.segments(work), (),
            as_stored(weight),
        )  # fmt: skip

    def _in_blocks(
        self, name: str, weight: QuantizedWeight, work: Work | None, of_type: OfType
    ) -> Step:
        """Return what becomes of a tensor of GGUF."""
        into, stored = of_type(weight), weight.codes
        if work is None and into is weight:
            return Step(name, "copy", stored, None, stored.dtype, stored.shape)
        action: Action = "convert" if work is None else "merge"
        source = virtual(weight) if work is None else work.source
        shape, segments = (of_type.nbytes(weight),), () if work is None else self.segments(work)
        return Step(
            name, action, source, None, stored.dtype, shape, segments, (), into,
            retyped=into is not weight,
        )  # fmt: skip


# -- another format --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeSteps:
    """Makes the steps of an output in a format: several for each weight that is put into it."""

    index: BaseIndex
    format: str
    nested: bool

    def of(self, step: Step) -> list[Step]:
        """Return the steps that take the place of one of a merge into plain values."""
        if not self.takes(step):
            return [step]
        maker = self._maker(step.source.dtype)
        made = Made(step.name, step.shape, "", maker, maker.weight(step.name, step.shape))
        codes, *small = maker.outputs(step.name, step.shape)
        action: Action = "merge" if step.segments else "convert"
        found = [
            replace(step, name=codes.name, action=action, dtype=codes.dtype, shape=codes.shape,
                    made=replace(made, role=codes.role))
        ]  # fmt: skip
        for each in small:
            found.append(
                Step(each.name, "add", step.source, step.source_adapter, each.dtype, each.shape,
                     made=replace(made, role=each.role))
            )  # fmt: skip
        return found

    def _maker(self, dtype: str) -> Any:
        nested = {"nested": True} if self.nested else {}
        return maker_of(self.format, dtype=dtype, **nested)

    def takes(self, step: Step) -> bool:
        """Whether the result of a step is put into the format: a linear layer's weight."""
        if len(step.shape) != 2 or step.patches or not step.name.endswith(".weight"):
            return False
        if step.source.dtype not in WORKING_DTYPES or step.shape != step.source.shape:
            return False
        linear = is_linear(self.index, step.name)
        return linear and bool(self._maker(step.source.dtype).fits(step.shape))

    def config(self, steps: Sequence[Step], before: Mapping[str, Any]) -> dict[str, Any]:
        """Return what changes in the config: the format, and which modules stay plain."""
        dtypes = [step.source.dtype for step in steps if step.made is not None]
        said = self._maker(max(sorted(set(dtypes)), key=dtypes.count)).config()
        key = "modules_to_not_convert" if "modules_to_not_convert" in said else None
        said[key or "llm_int8_skip_modules"] = self._left_plain(steps)
        gone: dict[str, Any] = dict.fromkeys(key for key in CONFIG_KEYS if key in before)
        return gone | {"quantization_config": said}

    def _left_plain(self, steps: Sequence[Step]) -> list[str]:
        """Return the modules that transformers must not quantize."""
        made = [step.made.name for step in steps if step.made is not None]
        within = {name[:at] for name in made for at in range(len(name)) if name[at] == "."}
        found = {self.index.names.output_embedding or "lm_head"}
        for step in steps:
            if step.made is None:
                modules = set(plain_modules(self.index, step.name, step.shape))
                inside = len(modules & within) > 0
                found |= {step.name.removesuffix(".weight")} if inside else modules
        return sorted(found)


def check_made(steps: Iterable[Step], base: Checkpoint, format: str) -> None:
    """Refuse a format that no weight was put into.

    Raises:
        UnsupportedError: there is no linear layer that it fits.
    """
    if not any(step.made is not None for step in steps):
        raise UnsupportedError(
            "no linear layer of this model can be put into the format", where=base.source,
            found=f"--quantize {format}",
            hint="Layers that lie transposed (GPT-2) and stacks of experts stay as they are; fp8 "
            "takes matrices of whole blocks of 128 by 128",
        )  # fmt: skip
