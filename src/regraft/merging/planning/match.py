"""Matching adapters with a base: which stored tensor gets what, with all misfits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from regraft.adapters.model import Adapter, LoraTarget, TokenRows, WholeTensor
from regraft.adapters.settings import RESAVE
from regraft.deltas.views import Delta, RowPatch, matrix_view
from regraft.errors import MismatchError, Problem
from regraft.formats.problems import quoted
from regraft.merging.inputs.base_index import BaseIndex, ResolvedName, StoredPart, nearest_hint
from regraft.merging.inputs.expert_stacks import StackOrientation
from regraft.merging.planning.placement import (
    Misfit,
    Placement,
    bias_delta,
    embedding_delta,
    linear_deltas,
    residual_delta,
    stack_orientation,
)
from regraft.merging.planning.prefixes import PrefixChange, changes_for, moved, several
from regraft.merging.planning.whole_parts import expert_row, whole_part
from regraft.tensors import WORKING_DTYPES, TensorSpec

_Item = TypeVar("_Item", WholeTensor, LoraTarget, TokenRows)


@dataclass
class Work:
    """What happens to one output tensor, gathered over all adapters.

    Attributes:
        name: the tensor's name in the output.
        base: the base's tensor, or None when the base has none.
        carried: an adapter's copy of the base's own (resized) embedding, with the adapter's
            number: it stands for the base.
        replaced: an adapter's trained tensor that takes the base's place, likewise.
        deltas: in the order they are added.
        patches: rows replaced afterwards.
        shared: adapters that asked for the two sides of a tie to stay one.
    """

    name: str
    base: TensorSpec | None
    carried: tuple[int, TensorSpec] | None = None
    replaced: tuple[int, TensorSpec] | None = None
    deltas: list[Delta] = field(default_factory=list)
    patches: list[RowPatch] = field(default_factory=list)
    shared: set[int] = field(default_factory=set)

    @property
    def source_adapter(self) -> int | None:
        """The adapter whose tensor the work starts from; None for the base's."""
        origin = self.replaced or self.carried
        return origin[0] if origin else None

    @property
    def source(self) -> TensorSpec:
        """The tensor the work starts from."""
        origin = self.replaced or self.carried
        spec = origin[1] if origin else self.base
        if spec is None:
            raise ValueError(f"nothing to make {self.name} from")
        return spec


@dataclass
class Matching:
    """The outcome: works by output name, works on tied parameters by their own name, and notes.

    Attributes:
        works: by the name of the base's tensor (or of the added one).
        tied: works on parameters that the base holds only under the name they are tied to.
        problems: every misfit.
        warnings: what the user should know.
    """

    works: dict[str, Work] = field(default_factory=dict)
    tied: dict[str, Work] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Matcher:
    """Matches the adapters of a merge with one base, one adapter after the other."""

    def __init__(self, index: BaseIndex) -> None:
        self.index = index
        self.result = Matching()
        self._tying: dict[int, frozenset[str]] = {}
        self._orientations: dict[int, StackOrientation] = {}

    def ties(self, number: int, module: str) -> bool:
        """Whether an adapter trained the two sides of a tie as one, of which ``module`` is one."""
        return module in self._tying.get(number, ()) or (
            number in self._tying and module.rpartition(".")[2] in PEFT_EMBEDDINGS
        )

    def _tied_modules(self, adapter: Adapter) -> frozenset[str]:
        """Return both sides of a tie where an adapter has factors for both.

        PEFT heeds ``ensure_weight_tying`` only for the names in :data:`PEFT_EMBEDDINGS`; of other
        names, the factors in the file tell.
        """
        names = {self.index.names.input_embedding, self.index.names.output_embedding}
        sides = {target.module for target in adapter.targets if target.module in names}
        return frozenset(sides) if len(sides) == 2 else frozenset()

    def add(self, number: int, adapter: Adapter) -> None:
        """Match one adapter; misfits go to ``result.problems``."""
        if adapter.settings.ensure_weight_tying:
            self._tying[number] = self._tied_modules(adapter)
        # Copies of the base's embeddings first: they say what the rest is measured against.
        for whole in sorted(adapter.whole, key=lambda w: w.origin != "embedding"):
            self._collect(self._place_whole, number, adapter, whole)
        for target in adapter.targets:
            self._collect(self._place_target, number, adapter, target)
        for rows in adapter.token_rows:
            self._collect(self._place_rows, number, adapter, rows)
        self._note_untouched(adapter)

    def _collect(
        self,
        place: Callable[[int, Adapter, _Item], None],
        number: int,
        adapter: Adapter,
        item: _Item,
    ) -> None:
        try:
            place(number, adapter, item)
        except Misfit as misfit:
            self.result.problems.append(misfit.problem)

    def _work(self, found: ResolvedName, held: StoredPart) -> Work:
        """Return the work on a stored tensor, or on the tied parameter behind it."""
        if found.alias is not None:
            return self.result.tied.setdefault(found.alias, Work(found.alias, held.spec))
        return self.result.works.setdefault(held.spec.name, Work(held.spec.name, held.spec))

    # -- LoRA targets ---------------------------------------------------------------------------

    def _place_target(self, number: int, adapter: Adapter, target: LoraTarget) -> None:
        parameter, key, selected = self._parameter_of(adapter, target)
        place = Placement(
            number, adapter, target, key, selected, self._orientation(number, adapter)
        )
        finds = self.index.find(parameter)
        if not finds:
            raise Misfit(self._not_found(place.where(), parameter))
        for found in finds:
            for held in found.held:
                self._add_deltas(place, found, held)
        if target.b_bias is not None:
            self._add_bias(place)

    def _orientation(self, number: int, adapter: Adapter) -> StackOrientation:
        if number not in self._orientations:
            seen = StackOrientation(adapter, lambda: self._seen_orientations(adapter))
            self._orientations[number] = seen
        return self._orientations[number]

    def _seen_orientations(self, adapter: Adapter) -> Iterator[bool]:
        """Yield whether stacks of experts are stored (in, out), of those whose sizes tell."""
        for target in adapter.targets:
            try:
                parameter, key, _ = self._parameter_of(adapter, target)
                place = Placement(0, adapter, target, key)
                for found in self.index.find(parameter):
                    yield from stack_orientation(place, found, self.index)
            except Misfit:
                continue  # reported when the target itself is placed

    def _parameter_of(self, adapter: Adapter, target: LoraTarget) -> tuple[str, str, bool]:
        """Return the parameter a target means, the key of its rank and alpha patterns, and whether
        ``target_parameters`` selected it."""
        selected = [
            leaf
            for leaf in adapter.settings.parameters_of(target.module)
            if self.index.find(f"{target.module}.{leaf}")
        ]
        known = self.index.names.expert_parameters(target.module) or EXPERT_ORDER
        ordered = [p for p in known if p in selected] + [p for p in selected if p not in known]
        if target.depth >= max(len(ordered), 1):
            raise Misfit(
                Problem("more wrapped parameters than target_parameters names",
                        f"{adapter.label}: {target.module}", f"at most {len(ordered)}",
                        str(target.depth + 1))
            )  # fmt: skip
        if ordered:
            # The parameter registered first is wrapped first, so it lies innermost.
            parameter = f"{target.module}.{ordered[len(ordered) - 1 - target.depth]}"
            return parameter, parameter, True
        self._check_targeted(adapter, target.module)
        packed = f"{target.module}.in_proj_weight"
        if packed in self.index.base.tensors:  # nn.MultiheadAttention
            self._note_attention(adapter)
            return packed, target.module, False
        return f"{target.module}.weight", target.module, False

    def _check_targeted(self, adapter: Adapter, module: str) -> None:
        parent = module.removesuffix(".out_proj")  # MultiheadAttention wraps its own out_proj
        settings = adapter.settings
        tied = settings.ensure_weight_tying and f"{module}.weight" in self.index.aliases
        if settings.targets(module) or tied or (parent != module and settings.targets(parent)):
            return
        raise Misfit(
            Problem("the adapter has factors for a module that its config does not target",
                    f"{adapter.label}: {module}", "a module that target_modules selects",
                    f"target_modules={_short(settings.target_modules)}",
                    "PEFT would ignore them in silence; mend target_modules in adapter_config.json")
        )  # fmt: skip

    def _add_deltas(self, place: Placement, found: ResolvedName, held: StoredPart) -> None:
        work = self._work(found, held)
        seen = self._seen(work, held)
        if place.target.kind == "embedding":
            deltas = [embedding_delta(place, seen.spec)]
        else:
            deltas = linear_deltas(place, found, seen, self.index)
        if work.replaced is not None:
            raise Misfit(_conflict(place.where(), work.name))
        for placed in deltas:
            delta = replace(placed, origin=place.origin)
            residual = residual_delta(place, delta, work.source)
            work.deltas += [residual, delta] if residual else [delta]
        if self.ties(place.adapter, place.target.module):
            work.shared.add(place.adapter)

    def _seen(self, work: Work, held: StoredPart) -> StoredPart:
        """What a delta will meet: PEFT's copy of a (resized) embedding wins over the base's."""
        source = self.result.works.get(held.spec.name, work)
        return StoredPart(source.carried[1], held.piece) if source.carried is not None else held

    def _add_bias(self, place: Placement) -> None:
        parameter = f"{place.target.module}.bias"
        finds = self.index.find(parameter)
        if len(finds) != 1 or len(finds[0].held) != 1:
            raise Misfit(
                Problem("lora_bias needs a bias in the base, and there is none", place.where(),
                        parameter, "nothing", "Nobody can merge this; serve it as an adapter")
            )  # fmt: skip
        work = self._work(finds[0], finds[0].held[0])
        work.deltas.append(bias_delta(place, finds[0], finds[0].held[0].spec))

    # -- whole tensors and rows ------------------------------------------------------------------

    def _place_whole(self, number: int, adapter: Adapter, whole: WholeTensor) -> None:
        where = f"{adapter.label}: {whole.parameter}"
        if adapter.weight != 1.0 and whole.origin != "embedding":
            raise Misfit(
                Problem("a replaced tensor cannot be weighted", where, "weight 1",
                        f"weight {adapter.weight:g}", "Merge this adapter with weight 1")
            )  # fmt: skip
        finds = self.index.find(whole.parameter)
        if not finds:
            self._add_tensor(number, whole, where)
            return
        for found in finds:
            for held in found.held:
                if row := expert_row(number, whole.spec, found, held):
                    self._place_row(row, found, held, where)
                    continue
                part = whole_part(whole.spec, found, held, self.index)
                if part is None:
                    raise Misfit(_not_one_tensor(where, finds))
                if whole.origin == "embedding":
                    self._carry(number, part, found.common, held, where)
                else:
                    self._replace(number, part, found, held, where)

    def _place_row(self, row: RowPatch, found: ResolvedName, held: StoredPart, where: str) -> None:
        """Put the bias of one expert in its place among those of all."""
        work = self._work(found, held)
        taken = {index for patch in work.patches for index in patch.indices}
        if work.replaced is not None or work.deltas or taken.intersection(row.indices):
            raise Misfit(_conflict(where, work.name))
        work.patches.append(row)

    def _carry(
        self, number: int, spec: TensorSpec, found: ResolvedName, held: StoredPart, where: str
    ) -> None:
        """Take an adapter's copy of a base's parameter for the base's, on both sides of a tie."""
        self._check_shape(spec, held.spec, where, saved=False)
        _check_dtype(spec, held.spec, where)
        work = self._work(found, held)
        if work.carried is not None and work.carried[1].shape != spec.shape:
            raise Misfit(
                Problem("this embedding is carried along in different sizes", where,
                        str(work.carried[1].shape), str(spec.shape))
            )  # fmt: skip
        work.carried = (number, spec)

    def _replace(
        self, number: int, spec: TensorSpec, found: ResolvedName, held: StoredPart, where: str
    ) -> None:
        self._check_shape(spec, held.spec, where, saved=True)
        _check_dtype(spec, held.spec, where)
        work = self._work(found, held)
        if work.replaced is not None or work.deltas:
            raise Misfit(_conflict(where, work.name))
        work.replaced = (number, spec)
        if self.ties(number, where.rpartition(": ")[2].rpartition(".")[0]):
            work.shared.add(number)

    def _check_shape(self, new: TensorSpec, old: TensorSpec, where: str, *, saved: bool) -> None:
        if new.shape == old.shape:
            return
        grown = len(old.shape) == len(new.shape) and new.shape[1:] == old.shape[1:]
        in_head = saved and not self._is_of_body(old.name)  # with another number of labels
        if grown and (in_head or vocabulary_side(self.index, old.name) is not None):
            return
        raise Misfit(
            Problem("the adapter's tensor has another shape than the base's", where,
                    f"{old.shape} (base)", f"{new.shape} (adapter)",
                    "Is this the base the adapter was trained on?")
        )  # fmt: skip

    def _is_of_body(self, tensor: str) -> bool:
        """Whether a tensor belongs to the base model below the heads, as far as is known."""
        prefix = f"{self.index.names.base_model_prefix}."
        pieces = self.index.names.pieces(tensor)
        return self.index.names.known and any(p.parameter.startswith(prefix) for p in pieces)

    def _add_tensor(self, number: int, whole: WholeTensor, where: str) -> None:
        if whole.origin != "saved":
            raise Misfit(self._not_found(where, whole.parameter))
        if whole.parameter in self.result.works:
            raise Misfit(_conflict(where, whole.parameter))
        work = Work(whole.parameter, None, replaced=(number, whole.spec))
        self.result.works[whole.parameter] = work

    def _place_rows(self, number: int, adapter: Adapter, rows: TokenRows) -> None:
        where = f"{adapter.label}: {rows.module}"
        if adapter.weight != 1.0:
            raise Misfit(
                Problem("replaced token rows cannot be weighted", where, "weight 1",
                        f"weight {adapter.weight:g}", "Merge this adapter with weight 1")
            )  # fmt: skip
        finds = self.index.find(f"{rows.module}.weight")
        if len(finds) != 1 or len(finds[0].held) != 1:
            raise Misfit(self._not_found(where, f"{rows.module}.weight"))
        held = finds[0].held[0]
        common = self._work(finds[0].common, held)
        if any(p.adapter == number and p.indices == rows.indices for p in common.patches):
            return  # the other side of a tie, with the same rows: PEFT trains them as one
        work = self._work(finds[0], held)
        self._check_rows(rows, work, where)
        n, width = rows.spec.shape
        work.patches.append(RowPatch(number, rows.indices, matrix_view(rows.spec, n, width)))

    def _check_rows(self, rows: TokenRows, work: Work, where: str) -> None:
        if len(work.source.shape) != 2:
            raise Misfit(
                Problem("token rows need a table", f"{where} -> {work.name}", "two axes",
                        str(work.source.shape), "Is this the base the adapter was trained on?")
            )  # fmt: skip
        height, width = work.source.shape
        taken = {i for patch in work.patches for i in patch.indices}
        if taken & set(rows.indices):
            raise Misfit(_conflict(where, f"rows of {work.name}"))
        beyond = sorted(i for i in rows.indices if i >= height)
        if beyond != list(range(height, height + len(beyond))) or rows.spec.shape[1] != width:
            raise Misfit(
                Problem("the adapter trained token rows that the base does not have", where,
                        f"rows below {height} of width {width}",
                        f"rows up to {max(rows.indices)} of width {rows.spec.shape[1]}",
                        "Resize the base's vocabulary first, or save the adapter with the "
                        "embeddings in modules_to_save")
            )  # fmt: skip

    # -- notes -----------------------------------------------------------------------------------

    def _not_found(self, where: str, parameter: str) -> Problem:
        return Problem(
            "the base has no such tensor", where, parameter, "nothing",
            nearest_hint(self.index, parameter),
        )  # fmt: skip

    def _note_attention(self, adapter: Adapter) -> None:
        note = (
            f"{adapter.label}: adapts nn.MultiheadAttention, where PEFT (0.21) adds the delta of "
            "out_proj twice as it runs; it is merged once, as its factors say"
        )
        if note not in self.result.warnings:
            self.result.warnings.append(note)

    def _note_untouched(self, adapter: Adapter) -> None:
        """Say which modules the config targets although the adapter has no factors for them."""
        targets = {target.module for target in adapter.targets}
        if not targets or adapter.settings.target_modules is None:
            return
        leaves = {module.rpartition(".")[2] for module in targets}
        untouched = [
            module
            for name in self.index.base.tensors
            if name.endswith(".weight")
            and (module := name.removesuffix(".weight")).rpartition(".")[2] in leaves
            and module not in targets
            and adapter.settings.targets(module)
            and not self.result.works.get(name)
        ]
        if untouched:
            self.result.warnings.append(
                f"{adapter.label}: the config targets {len(untouched)} more modules that the "
                f"adapter has no factors for (such as {untouched[0]}); they stay as in the base"
            )


PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")
"""The module names PEFT knows as embeddings."""

EXPERT_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""How transformers' experts modules register their parameters, where the table does not say."""


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return quoted(value) if isinstance(value, str) else repr(value)
    return ", ".join(map(quoted, value[:8])) + (", ..." if len(value) > 8 else "")


def _not_one_tensor(where: str, finds: tuple[ResolvedName, ...]) -> Problem:
    return Problem(
        "the base keeps this in a form that a whole tensor cannot replace", where, "one tensor",
        ", ".join(h.spec.name for f in finds for h in f.held),
    )  # fmt: skip


def _check_dtype(new: TensorSpec, old: TensorSpec, where: str) -> None:
    """Refuse a tensor in a dtype whose values are not converted to the base's."""
    if new.dtype != old.dtype and not {new.dtype, old.dtype} <= {*WORKING_DTYPES}:
        raise Misfit(
            Problem("the adapter's tensor cannot take the place of the base's", where,
                    f"dtype {old.dtype}", f"dtype {new.dtype}",
                    "Save it in the base's dtype: only float32, bfloat16 and float16 are converted")
        )  # fmt: skip


def _conflict(where: str, name: str) -> Problem:
    return Problem(
        "two adapters claim the same tensor, and at least one replaces it", f"{where} -> {name}",
        hint="Merge them one after the other, or keep the tensor in one of them only",
    )  # fmt: skip


def vocabulary_side(index: BaseIndex, tensor: str) -> str | None:
    """Return ``"input"`` or ``"output"`` for a tensor that has one row per token, else None."""
    names = index.names
    parameters = [piece.parameter for piece in names.pieces(tensor)] or [tensor]
    module = parameters[0].rpartition(".")[0]
    prefix = f"{names.base_model_prefix}."
    sides = {"input": names.input_embedding, "output": names.output_embedding}
    for side, known in sides.items():
        if known and module.removeprefix(prefix) == known.removeprefix(prefix):
            return side
    if not names.known:
        leaf = module.rpartition(".")[2]
        return {"embed_tokens": "input", "wte": "input", "lm_head": "output"}.get(leaf)
    return None


def match(index: BaseIndex, adapters: Iterable[Adapter]) -> Matching:
    """Match adapters with a base; misfits are collected, not raised.

    Raises:
        AdapterError: an adapter's regular expressions take too long.
        MismatchError: the base holds a single number as an embedding.
    """
    if unfit := _unfit_embeddings(index):
        raise MismatchError(unfit)
    matcher = Matcher(index)
    result = matcher.result
    for number, adapter in enumerate(adapters):
        changes = prefix_changes(index, adapter)
        if len(changes) > 1:
            result.problems.append(several(adapter, changes))
            continue
        result.warnings += [change.note(adapter.label) for change in changes]
        matcher.add(number, moved(adapter, changes[0]) if changes else adapter)
    works = (*result.works.values(), *result.tied.values())
    result.problems += [_shared_residual(work) for work in works if _shares_residual(work)]
    return result


def prefix_changes(index: BaseIndex, adapter: Adapter) -> list[PrefixChange]:
    """Return how an adapter's names become the base's: none, one way, or several."""

    def fits(other: Adapter) -> bool:
        matcher = Matcher(index)
        matcher.add(0, other)
        return not matcher.result.problems

    return changes_for(index, adapter, fits)


def _unfit_embeddings(index: BaseIndex) -> list[Problem]:
    """Return a problem for each embedding or head without rows, which all that follows counts."""
    return [
        Problem("the base's embedding has no rows", f"{index.base.source}: {name}", "a table",
                "a single number", "Download the base again")
        for name, spec in index.base.tensors.items()
        if not spec.shape and vocabulary_side(index, name) is not None
    ]  # fmt: skip


def _shares_residual(work: Work) -> bool:
    """Whether PiSSA or OLoRA meets another adapter: each would have begun from another base."""
    several = len({delta.adapter for delta in work.deltas}) > 1
    return several and any(delta.is_residual for delta in work.deltas)


def _shared_residual(work: Work) -> Problem:
    return Problem(
        "a PiSSA or OLoRA adapter cannot share a tensor with another adapter in one merge",
        work.name,
        hint=RESAVE,
    )
