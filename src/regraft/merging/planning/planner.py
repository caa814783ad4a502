"""Making the plan: from matched works to steps, files, config, memory and disk."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from regraft.adapters.known_settings import unknown_note
from regraft.adapters.model import Adapter
from regraft.concurrency import default_threads
from regraft.errors import MemoryCapError, MismatchError, Problem
from regraft.formats.checkpoint import Checkpoint
from regraft.merging.files.receipt import Action
from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.inputs.dequantized_view import GGUF, Quantization, removed, room_of, turned
from regraft.merging.inputs.gguf_types import OfType
from regraft.merging.inputs.published import published
from regraft.merging.options import KEEP, SUM, ElementMethod, MergeOptions, dtype_name
from regraft.merging.planning.base_drift import TrainedOn
from regraft.merging.planning.completeness import notes_of_class
from regraft.merging.planning.config_updates import (
    Chosen,
    choose_class,
    class_updates,
    left_out_of,
    missing_head,
    note_left_out,
)
from regraft.merging.planning.element_methods import combining_bytes, unfit_for_method
from regraft.merging.planning.match import Matching, Work, match
from regraft.merging.planning.plan import OutputShard, Plan, Segment, Step
from regraft.merging.planning.quantized.gguf_output import gguf_name, unfit_for_gguf, whole
from regraft.merging.planning.quantized.quantized_output import (
    KeptSteps,
    MadeSteps,
    check_made,
    kept_format,
    resolved,
    unfit_for_codes,
)
from regraft.merging.planning.ties import TieOutcome, output_rows, settle_ties, vocabulary_changed
from regraft.merging.planning.tiles import smallest_tile
from regraft.names import NameMap
from regraft.tensors import DTYPES, WORKING_DTYPES

BASELINE_BYTES = 170 * 2**20
"""Resident memory of the interpreter with numpy, numba and the compiled kernels, measured."""

BYTES_PER_TENSOR = 4 * 2**10
"""Memory that the specs, steps and records of one tensor take, measured."""

BYTES_PER_MERGED = 12 * 2**10
"""What the factors, views and records of a tensor take that deltas are added to, beside that."""

LARGEST_TILE = 2 * 2**20
SMALLEST_TILE = 64 * 2**10
FACTOR_BYTES = 48 * 2**20
"""Room for the factors of the steps in flight, when none alone needs more."""


def settled(options: MergeOptions, quantization: Quantization | None) -> MergeOptions:
    """Return options in which it is settled whether an undo is kept.

    Not, if not asked for, where weights are put into another format: nothing in the output tells
    of what they were, so an undo would be a copy of them. Nor where those of a GGUF file are put
    into another of its types.
    """
    format = _format(options, quantization)
    in_gguf = format == KEEP and quantization is not None and quantization.method == GGUF
    usual = format in (None, KEEP) and not (in_gguf and options.dtype is not None)
    undo = usual if options.undo is None else options.undo
    return replace(options, quantize=format, undo=undo, keep_adapter=options.keep_adapter and undo)


def _format(options: MergeOptions, quantization: Quantization | None) -> str | None:
    return resolved(options.quantize, quantization, double_quant=options.double_quant)


def make_plan(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    options: MergeOptions,
    out: Path | None,
    undone: Mapping[str, Step] | None = None,
    quantization: Quantization | None = None,
    trained_on: TrainedOn | None = None,
    room: int = 0,
) -> Plan:
    """Return the plan of a merge, from headers alone.

    Args:
        base: the base; of a quantized one its plain weights.
        adapters: the adapters, in the order they are added.
        options: what was asked for.
        out: the output folder, if it is known.
        undone: the steps of an earlier merge that are run backwards while the base is read.
        quantization: how the base is quantized, if it is.
        trained_on: the base that the adapters were trained on, if another one was named.
        room: bytes that reading the base takes besides, however many threads do it.

    Raises:
        UnsupportedError: the output cannot be quantized as asked for.
        MismatchError: adapters and base do not fit; every misfit is listed.
        MemoryCapError: a step cannot fit under the cap.
    """
    options = replace(options, quantize=_format(options, quantization))
    view = _view(base, adapters, options, quantization, trained_on)
    quantization, trained_on, options = view.quantization, view.trained_on, view.options
    index, works = view.index, view.works
    updates = _config_updates(index, works, view.ties, options, view.matching)
    updates |= class_updates(index, adapters, works, view.chosen)
    left_out = left_out_of(view.base, index)
    _check_fit(view, adapters, left_out)
    made = None
    if options.quantize not in (None, KEEP):
        made = MadeSteps(index, options.quantize or "", options.double_quant)
    of_type = OfType(view.ggml_type) if view.in_gguf else None
    shards = _shards(view.base, works, options, left_out, quantization, made, of_type)
    if view.in_gguf:
        shards = [replace(shards[0], name=gguf_name(view.base, out))]
        options = replace(options, dtype=view.ggml_type)
    steps = [step for shard in shards for step in shard.steps]
    if trained_on is not None:
        trained_on.check(steps)
    read = (quantization, trained_on and trained_on.quantization)
    room += sum(room_of(each.stacks.values()) for each in read if each)
    threads, tile, memory = fit_memory(
        steps, options, undone, compare=trained_on is not None, room=room
    )
    if made is not None:
        check_made(steps, view.base, made.format)
        updates |= made.config(steps, view.base.config or {})
    elif view.merged_out:
        updates |= dict.fromkeys(removed(view.base.config or {}))
    return Plan(
        view.base, tuple(adapters), tuple(shards), updates, _recorded(options), memory, threads,
        tile, _warnings(view, adapters, left_out), out=str(out) if out else None,
        quantization=quantization, trained_on=trained_on,
    )  # fmt: skip


@dataclass(frozen=True)
class _View:
    """The base as a plan reads it, and what the adapters mean in it.

    Attributes:
        base: the base, with the names and shapes that are planned with.
        quantization: how it is quantized, if it is.
        trained_on: the base that the adapters were trained on, if another one was named.
        options: what was asked for; without a dtype where that is a type of GGUF.
        ggml_type: the type that a GGUF file's matrices are to have, if one was asked for.
        chosen: the class that the output's config names.
        index: the base's tensors by name.
        matching: which tensor gets which delta, and what does not fit.
        ties: what becomes of tied tensors.
        works: what is done to each tensor that changes.
    """

    base: Checkpoint
    quantization: Quantization | None
    trained_on: TrainedOn | None
    options: MergeOptions
    ggml_type: str | None
    chosen: Chosen
    index: BaseIndex
    matching: Matching
    ties: TieOutcome
    works: Mapping[str, Work]

    @property
    def in_gguf(self) -> bool:
        """Whether the output is one GGUF file."""
        is_kept = self.options.quantize == KEEP
        return is_kept and self.quantization is not None and self.quantization.method == GGUF

    @property
    def merged_out(self) -> bool:
        """Whether a quantized base becomes plain weights."""
        return self.options.quantize is None and self.quantization is not None


def _view(
    base: Checkpoint, adapters: Sequence[Adapter], options: MergeOptions,
    quantization: Quantization | None, trained_on: TrainedOn | None,
) -> _View:  # fmt: skip
    """Return what a plan is made of.

    Raises:
        UnsupportedError: weights cannot stay quantized as they are.
    """
    transposed, ggml_type = frozenset[str](), None
    if options.quantize == KEEP:
        kept = kept_format(base, quantization)
        if kept.method == GGUF:
            quantization, ggml_type = whole(kept), options.dtype
            options = replace(options, dtype=None)
        base, transposed = turned(base, kept), kept.transposed
    chosen = choose_class(base, adapters)
    names = NameMap.for_config(base.config, chosen.name)
    if options.quantize != KEEP:
        if quantization is not None:
            base, quantization = published(base, quantization, names)
        trained_on = trained_on and trained_on.published(names)
    index = BaseIndex(base, names, transposed)
    matching = match(index, adapters)
    ties = settle_ties(index, matching, base.config)
    works = {**matching.works, **{work.name: work for work in ties.parted}}
    return _View(
        base, quantization, trained_on, options, ggml_type, chosen, index, matching, ties, works
    )


def _check_fit(view: _View, adapters: Sequence[Adapter], left_out: frozenset[str]) -> None:
    """Refuse adapters that do not fit.

    Raises:
        MismatchError: some do not; lists every misfit.
    """
    problems, works = view.matching.problems, view.works
    problems += view.chosen.problems
    problems += missing_head(view.index, adapters, works, left_out)
    problems += unfit_for_codes(works.values(), kept=view.options.quantize == KEEP)
    if view.in_gguf and view.quantization is not None:
        problems += unfit_for_gguf(works.values(), view.quantization, view.ggml_type)
    if view.options.element_method is not None:
        problems += unfit_for_method(works.values(), adapters, view.options.element_method)
    if problems:
        raise MismatchError(problems)


def _warnings(
    view: _View, adapters: Sequence[Adapter], left_out: frozenset[str]
) -> tuple[str, ...]:
    """Return what the user should know."""
    quantization = view.quantization
    is_quantized = bool(quantization or view.trained_on)
    return (
        *view.matching.warnings, *_notes(adapters, view.ties),
        *note_left_out(view.index, left_out), *view.chosen.notes,
        *notes_of_class(view.index, view.works, left_out, merged_out=view.merged_out),
        *(quantization.warnings if quantization is not None else ()),
        *_notes_of_base(adapters, quantized=is_quantized),
    )  # fmt: skip


def _recorded(options: MergeOptions) -> dict[str, Any]:
    """Return the options that decide the bytes, as the receipt has them."""
    recorded: dict[str, Any] = {
        "dtype": options.dtype and dtype_name(options.dtype),
        "shard_size": options.shard_size,
        "undo": bool(options.undo),
    }
    if options.quantize is not None:
        recorded |= {"quantize": options.quantize, "rounding": _rounding(options)}
        recorded |= {"seed": options.seed}
    if options.quantize not in (None, KEEP):
        recorded["double_quant"] = options.double_quant
    if options.method != SUM:
        recorded |= {"method": options.method, "density": options.density, "seed": options.seed}
    if options.peft_version is not None:
        recorded["peft_version"] = options.peft_version
    return recorded


def _rounding(options: MergeOptions) -> str:
    """Return how values become codes.

    Weights that lie on a grid need chance to leave their places as far as a small delta asks.
    Others fall to either side by themselves, and chance would only add noise.
    """
    return options.rounding or ("stochastic" if options.quantize == KEEP else "nearest")


# -- config ----------------------------------------------------------------------------------------


def _config_updates(
    index: BaseIndex,
    works: Mapping[str, Work],
    ties: TieOutcome,
    options: MergeOptions,
    matching: Matching,
) -> dict[str, Any]:
    """Return what changes in config.json, by dotted path."""
    config = index.base.config or {}
    updates: dict[str, Any] = {}
    if ties.untied:
        for path in ("", "text_config."):
            if not path or isinstance(config.get("text_config"), dict):
                updates[f"{path}tie_word_embeddings"] = False
    updates |= _vocabulary_updates(index, works, matching, config)
    if options.dtype:
        updates |= _dtype_updates(config, DTYPES[options.dtype].config_name)
    return updates


def _vocabulary_updates(
    index: BaseIndex, works: Mapping[str, Work], matching: Matching, config: Mapping[str, Any]
) -> dict[str, Any]:
    if not vocabulary_changed(index, works.values()):
        return {}
    sizes = _vocabulary_sizes(index, works)
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {rows}" for name, rows in sizes.items())
        matching.problems.append(
            Problem("the vocabulary grew on one side only", index.base.source,
                    "the same number of rows in both embeddings", listed,
                    "Save the adapter with both embeddings in modules_to_save, or resize the base")
        )  # fmt: skip
        return {}
    rows = next(iter(sizes.values()))
    paths = ["vocab_size"] * ("vocab_size" in config)
    if isinstance(config.get("text_config"), dict) and "vocab_size" in config["text_config"]:
        paths.append("text_config.vocab_size")
    return dict.fromkeys(paths, rows)


def _vocabulary_sizes(index: BaseIndex, works: Mapping[str, Work]) -> dict[str, int]:
    """Return the rows of both embeddings in the output, by tensor name."""
    sizes: dict[str, int] = {}
    names = index.names
    for module in (names.input_embedding, names.output_embedding):
        for found in index.find(f"{module}.weight") if module else ():
            for held in found.held:
                name = found.alias if found.alias in works else held.spec.name
                work = works.get(name or held.spec.name)
                sizes[name or ""] = output_rows(work) if work else held.spec.shape[0]
    for work in works.values():
        if work.base is None and work.name == f"{names.output_embedding}.weight":
            sizes[work.name] = output_rows(work)
    return sizes


def _dtype_updates(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return what changes with the dtype; nothing for a model of diffusers, which stops at one."""
    if is_of_diffusers(config):
        return {}
    paths = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    for name, part in config.items():
        if isinstance(part, dict):
            paths += [f"{name}.{key}" for key in ("dtype", "torch_dtype") if key in part]
    return dict.fromkeys(paths, dtype)


# -- steps and files -------------------------------------------------------------------------------


def _shards(
    base: Checkpoint, works: Mapping[str, Work], options: MergeOptions, left_out: frozenset[str],
    quantization: Quantization | None, made: MadeSteps | None, of_type: OfType | None = None,
) -> list[OutputShard]:  # fmt: skip
    if options.quantize == KEEP and quantization is not None:
        base = replace(base, shards=quantization.stored.shards)
        kept = KeptSteps(
            works, quantization, lambda n: _step(n, base, works.get(n), options),
            lambda work: segments_of(work, options.element_method), of_type,
        )  # fmt: skip
        files = [[kept.step(n) for n in s.tensors if n not in left_out] for s in base.shards]
        known = {*quantization.weights}
    else:
        files = [
            [
                _step(name, base, works.get(name), options)
                for name in shard.tensors
                if name not in left_out
            ]
            for shard in base.shards
        ]
        known = set()
    known |= {step.name for steps in files for step in steps}
    extra = [_step(name, base, work, options) for name, work in works.items() if name not in known]
    if made is not None:
        files = [[each for step in steps for each in made.of(step)] for steps in files]
        extra = [each for step in extra for each in made.of(step)]
    if options.shard_size:
        files = _split([step for steps in files for step in steps] + extra, options.shard_size)
        names = numbered_names(len(files), _stem(base))
    else:
        files[-1].extend(extra)
        names = _kept_names(base)
    return [OutputShard(name, tuple(steps)) for name, steps in zip(names, files, strict=True)]


def is_of_diffusers(config: Mapping[str, Any] | None) -> bool:
    """Return whether a config is that of a part of a diffusers pipeline."""
    return "_class_name" in (config or {})


def numbered_names(count: int, stem: str = "model") -> list[str]:
    """Return transformers' file names for ``count`` weight files, or diffusers' by its stem."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _stem(base: Checkpoint) -> str:
    return "diffusion_pytorch_model" if is_of_diffusers(base.config) else "model"


def _kept_names(base: Checkpoint) -> list[str]:
    """Return the base's file names where transformers will find them, else the usual ones."""
    names = [shard.name for shard in base.shards]
    usual = len(names) > 1 or names[0] in (
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
    )
    if base.container == "safetensors" and usual and not base.single_file:
        return names
    return numbered_names(len(names), _stem(base))


def _split(steps: list[Step], limit: int) -> list[list[Step]]:
    files: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        if files[-1] and filled + step.nbytes > limit:
            files.append([])
            filled = 0
        files[-1].append(step)
        filled += step.nbytes
    return files


def _step(name: str, base: Checkpoint, work: Work | None, options: MergeOptions) -> Step:
    if work is None:
        spec = base.tensors[name]
        dtype = _output_dtype(spec.dtype, options)
        same = dtype == spec.dtype and not spec.is_virtual
        action: Action = "copy" if same else "convert"
        return Step(name, action, spec, None, dtype, spec.shape)
    stored = work.base.dtype if work.base is not None else _main_dtype(base, work.source.dtype)
    dtype = _output_dtype(stored, options)
    shape = (output_rows(work), *work.source.shape[1:]) if work.source.shape else ()
    return Step(
        name, action_of(work), work.source, work.source_adapter, dtype, shape,
        segments_of(work, options.element_method), tuple(work.patches),
    )  # fmt: skip


def action_of(work: Work) -> Action:
    """Return what a work does to its tensor, for the receipt."""
    if work.base is None:
        return "add"
    if work.deltas or work.patches:
        return "merge"
    return "replace" if work.source_adapter is not None else "add"


def _output_dtype(stored: str, options: MergeOptions) -> str:
    return options.dtype if options.dtype and stored in WORKING_DTYPES else stored


def _main_dtype(base: Checkpoint, fallback: str) -> str:
    """Return the dtype most of the base's weights have, for tensors that the base lacks."""
    bytes_of: dict[str, int] = {}
    for spec in base.tensors.values():
        if spec.dtype in WORKING_DTYPES:
            bytes_of[spec.dtype] = bytes_of.get(spec.dtype, 0) + spec.nbytes
    return max(bytes_of, key=lambda d: bytes_of[d]) if bytes_of else fallback


def segments_of(work: Work, method: ElementMethod | None = None) -> tuple[Segment, ...]:
    """Cut the rows wherever a delta begins or ends, so that each piece has one list of deltas.

    Args:
        work: the work.
        method: how the deltas of a piece become one; None for their sum.
    """
    if not work.deltas:
        return ()
    edges = sorted({edge for delta in work.deltas for edge in delta.rows})
    segments = []
    for low, high in pairwise(edges):
        here = tuple(d for d in work.deltas if d.rows[0] <= low and high <= d.rows[1])
        if here:
            segments.append(Segment((low, high), here, method))
    return tuple(segments)


# -- memory ----------------------------------------------------------------------------------------


PER_THREAD, TO_KEEP, TO_RESTORE = 4, 2, 3
"""Buffers of a thread, in tiles: to merge, what keeping for an undo adds, and what restoring."""

TO_DECODE, TO_DECODE_GGUF, TO_ENCODE, TO_COMPARE = 1, 5, 6, 10
"""What decoding a quantized base adds to them, making codes, and comparing with another base."""

TO_COMBINE = 2
"""What a delta of a tile's size adds to them, in float32."""


def fit_memory(
    steps: Sequence[Step], options: MergeOptions, undone: Mapping[str, Step] | None = None,
    *, compare: bool = False, room: int = 0,
) -> tuple[int, int, int]:  # fmt: skip
    """Choose threads and tile size under the cap: ``(threads, tile bytes, memory bytes)``.

    Args:
        steps: what is to be done.
        options: the cap, the threads, and whether an undo is kept for.
        undone: the steps of an earlier merge that are run backwards meanwhile.
        compare: whether another base is read beside.
        room: bytes that reading takes, however many threads do it.

    Raises:
        MemoryCapError: not even one thread with the smallest tile fits.
    """
    back = undone or {}

    def cost(step: Step) -> int:
        other = back.get(step.source.name)
        return step.factor_bytes + (other.factor_bytes + 32 * other.units.count if other else 0)

    largest = max(steps, key=cost)
    factors = max(FACTOR_BYTES, cost(largest))
    wanted = options.threads or default_threads()
    listed = BYTES_PER_TENSOR * (len(steps) + len(back))
    listed += BYTES_PER_MERGED * sum(bool(step.segments) for step in [*steps, *back.values()])
    fixed = BASELINE_BYTES + listed + factors + room
    tiles = PER_THREAD + TO_KEEP * bool(options.undo) + TO_RESTORE * (undone is not None)
    tiles += TO_DECODE * any(step.source.is_virtual for step in steps)
    tiles += TO_DECODE_GGUF * any(step.source.path.suffix == ".gguf" for step in steps)
    tiles += TO_COMPARE * compare
    coded = any(step.codes_of is not None for step in [*steps, *back.values()])
    tiles += TO_ENCODE * coded
    combining = max(combining_bytes(step) for step in [*steps, *back.values()])
    tiles += TO_COMBINE * bool(combining)
    rows = [smallest_tile(step) for step in steps]
    rows += [smallest_tile(step, backwards=True) for step in back.values()]
    least = max(SMALLEST_TILE, -(-max(rows) // 4096) * 4096)
    for threads in range(wanted, 0, -1):
        room = options.max_memory - fixed - combining * threads
        tile = min(max(LARGEST_TILE, least), room // (tiles * threads))
        tile -= tile % 4096  # whole values, and whole blocks of the disk
        if tile >= least:
            return threads, tile, fixed + (combining + tiles * tile) * threads
    needed = fixed + combining + tiles * least
    many = listed > factors + tiles * least
    raise MemoryCapError(
        f"{'so many tensors need' if many else 'one step needs'} more memory than allowed",
        where=f"{len(steps)} tensors" if many else largest.name,
        expected=f"at most {_in_mib(options.max_memory)} (--max-memory)",
        found=f"{math.ceil(needed / 2**20)} MiB",
        hint=f"Allow it: --max-memory {math.ceil(needed / 2**20)}MiB",
    )


def _in_mib(nbytes: int) -> str:
    """Return a cap in MiB; one below a MiB, which was meant otherwise, in bytes."""
    return f"{nbytes / 2**20:.0f} MiB" if nbytes >= 2**20 else f"{nbytes} bytes"


_QUANTIZED_NAME = re.compile(r"(?i)(^|[-_./])(bnb|4-?bit|8-?bit|nf4|gptq|awq|fp8|gguf)([-_./]|$)")


def _notes_of_base(adapters: Sequence[Adapter], *, quantized: bool) -> list[str]:
    """Return what to say of adapters that name a quantized base, where this one is plain."""
    notes = []
    for adapter in adapters:
        name = adapter.settings.base_model_name_or_path or ""
        if not quantized and _QUANTIZED_NAME.search(Path(name).name):
            notes.append(
                f"{adapter.label}: trained on {name}, by its name a quantized model, and this base "
                "is not quantized; --trained-on says how far apart the two are"
            )
    return notes


def _notes(adapters: Sequence[Adapter], ties: TieOutcome) -> list[str]:
    notes = []
    if ties.untied:
        notes.append(
            "the adapter gives the input and output embeddings different weights: both are "
            "written, and tie_word_embeddings is set to false"
        )
    counts = Counter((adapter.label, adapter.weight) for adapter in adapters)
    notes += [
        f"{label} is named {number} times, and its delta is added as often: a weight "
        "(ADAPTER=WEIGHT) says so in one"
        for (label, _), number in counts.items()
        if number > 1
    ]
    for adapter in adapters:
        notes += adapter.notes
        notes += unknown_note(adapter.label, adapter.settings.unknown)
        init = str(adapter.settings.init_lora_weights).lower()
        if init.startswith("pissa_niter"):
            notes.append(
                f"{adapter.label}: {init} began with a randomized factorization; it is recomputed "
                "with the exact one, which it approximates"
            )
    return notes
