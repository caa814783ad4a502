"""The handle on a live model: adapters are loaded, chosen, mixed, merged and taken off through it.

It is no wrapper. The model is used as before; which adapters answer is said here. PEFT's verbs have
PEFT's names.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.adapters.dialects.peft import read_adapter
from regraft.adapters.model import Adapter
from regraft.errors import UsageError
from regraft.formats.adapter_files import AdapterFiles
from regraft.runtime.forward import scopes
from regraft.runtime.forward.choices import Choice, listed, named
from regraft.runtime.forward.following import Following
from regraft.runtime.forward.hooks import Hooks, State
from regraft.runtime.forward.layers.operations import Part
from regraft.runtime.forward.selection import Named, RowSelection, Selection
from regraft.runtime.in_place.merge import Merged, MergeReport, prepared_merge
from regraft.runtime.in_weights import InWeights
from regraft.runtime.model.attached import Handle, all_attached, forget, remember
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.model.matching import LiveAdapter
from regraft.runtime.model.row_axes import is_of_transformers
from regraft.runtime.model.wrappers import check_trainable, unwrapped
from regraft.runtime.store import loading
from regraft.runtime.store.cache import AdapterCache
from regraft.runtime.store.library import Chosen, Library, LoadedAdapter
from regraft.runtime.training.counting import counts, sentence
from regraft.runtime.training.optimizers import watch_optimizers
from regraft.runtime.whole import Turns, whole

_numbers = itertools.count(1)


class Adapters(Handle):
    """The adapters of one live model; made by :func:`regraft.attach`.

    Which of them answer is said for everyone by :meth:`set_adapter`, and for a block of code, in
    this thread or asyncio task alone, by :meth:`using`, :meth:`rows` and :meth:`disable_adapter`.
    """

    def __init__(self, model: nn.Module, cache: AdapterCache | None = None) -> None:
        self._given = weakref.ref(model)
        model = unwrapped(model)
        self._base = LiveBase(model)
        self._state = State(next(_numbers))
        self._hooks = Hooks(self._base, self._state, self._follow)
        self._following = Following(self._base, self._hooks)
        self._library = Library(cache)
        self._default: Chosen | None = None
        self._turns = Turns()
        self._in_weights = InWeights(self._state, self._turns, self._hooks.look)
        self._frozen: list[nn.Parameter] = []
        remember(model, self)

    def __repr__(self) -> str:
        names = ", ".join(self.names) or "none"
        there = self._in_weights.names
        merged = f"; merged: {listed(there)}" if there else ""
        return f"Adapters({names}; active: {listed(self._default_names)}{merged})"

    @property
    def base(self) -> LiveBase:
        """The model's parameters and modules, as they are now.

        Raises:
            MismatchError: modules were replaced by others that the adapters do not fit.
        """
        self._follow(thoroughly=True)
        return self._base

    @property
    def model(self) -> nn.Module:
        """The model itself, as it was given to ``attach``: wrapped, if it was."""
        given = self._given()
        return self._base.model if given is None else given

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return self._library.names

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that answer here: in this thread or task, if a scope says so, or for all."""
        if merged := self.merged_adapters:
            return merged
        selection = self._state.selection()
        return selection.adapter_names() if selection is not None else []

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are in the weights now."""
        return [name for name, _ in self._in_weights.names]

    @property
    def _default_names(self) -> Named:
        default = self._state.default
        return default.names if isinstance(default, Selection) else ()

    def adapter(self, name: str) -> LiveAdapter:
        """Return an adapter with its tensors.

        Raises:
            UsageError: there is none of this name.
        """
        with self._library.choose([name]) as chosen:
            return chosen[name].adapter

    # -- adapters come and go --------------------------------------------------------------------

    def load_adapter(
        self,
        source: str | Path,
        name: str = "default",
        *,
        is_trainable: bool = False,
        dtype: torch.dtype | str | None = None,
        peft_version: str | None = None,
        token: str | None = None,
    ) -> None:
        """Load one more adapter; the active adapters stay active.

        With a cache it is looked at now, and read when it is first used.

        Args:
            source: a folder or a Hub id ``org/name[@revision]``.
            name: what it is called.
            is_trainable: whether it goes on in training; its tensors are then float32.
            dtype: of its tensors; by default as they are stored.
            peft_version: as for :func:`regraft.merge`.
            token: Hub token; by default the one the machine is logged in with.

        Raises:
            UsageError: the name is taken.
            RegraftError: it cannot be read, or does not fit the model. Nothing has changed then.

        Warns:
            BaseMismatchWarning: it was trained on another base, by the fingerprint it carries.
            UserWarning: its config has settings that are switched on and not known here.
        """
        self._follow(thoroughly=True)
        self._library.check_new(name)
        files = loading.open_files(source, token, peft_version, self._base.plain)
        adapter = read_adapter(files)
        if self._library.cache is None or is_trainable:
            live = loading.load(name, files, adapter)
            live = loading.prepared(live, self._base, dtype, is_trainable=is_trainable)
            self._take_whole(self._held(live))
        else:
            self._register(name, files, adapter, dtype)
        loading.warn_of(name, files, adapter, self._base)

    def _register(
        self, name: str, files: AdapterFiles, adapter: Adapter, dtype: torch.dtype | str | None
    ) -> None:
        """Let the cache read an adapter when it is used; hooks come now, while nobody uses it."""
        outline = loading.without_values(name, files, adapter, dtype)
        self._held(outline)

        def read() -> LiveAdapter:
            return loading.load(name, files, adapter)

        def place(live: LiveAdapter) -> LoadedAdapter:
            return self._held(loading.prepared(live, self._base, dtype))

        size = loading.bytes_in_use(outline, self._base)
        if self._base.device.type == "cpu":
            register = partial(self._library.register, name, lambda: place(read()), size)
        else:
            register = partial(self._library.register, name, read, size, place)
        self._turns.whole(register)

    def add_adapter(self, name: str, config: Any) -> None:
        """Make a new adapter to be trained; which ones answer stays as it is.

        Args:
            name: what it is called.
            config: a :class:`LoraConfig` of regraft or PEFT, or a mapping of its fields.

        Raises:
            UsageError: the name is taken.
            UnsupportedError: the config asks for what regraft does not train.
            MismatchError: the config selects nothing in this model.
        """
        from regraft.runtime.training.new_adapter import as_config, new_adapter

        self._follow(thoroughly=True)
        self._library.check_new(name)
        self._take_whole(self._held(new_adapter(self._base, as_config(config), name)))

    def combine_adapters(
        self,
        adapters: Choice,
        name: str,
        *,
        method: str = "sum",
        rank: int | None = None,
        energy: float | None = None,
        density: float | None = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        """Make one more adapter of several; the active adapters stay active.

        What is combined is the deltas, each with its weight, as :func:`regraft.combine` does it
        with files, by the same methods.

        Args:
            adapters: names, or names with weights.
            name: what the new one is called.
            method, rank, energy, density, seed: as for :func:`regraft.combine`.
            dtype: of its tensors; float32 by default.

        Raises:
            UsageError: the name is taken, one is unknown, none is named, or options contradict
                each other.
            UnsupportedError: something of theirs is combined in files alone, or not at all.
            MismatchError: the adapters do not fit each other.
        """
        from regraft.runtime.combined import Combining

        self._follow(thoroughly=True)
        self._library.check_new(name)
        parts = named(adapters)
        combining = Combining.of(parts, method, rank, energy, density, seed)
        with self._library.choose([each for each, _ in parts]) as chosen:
            made = combining.made(name, chosen.parts(parts))
        self._take_whole(self._held(loading.prepared(made, self._base, dtype)))

    def _held(self, adapter: LiveAdapter) -> LoadedAdapter:
        return LoadedAdapter(adapter, self._together([(adapter, 1.0)]))

    def _together(self, parts: Sequence[Part]) -> Selection:
        """Find out what adapters do together, and see to the modules that this needs."""
        return self._following.selection(parts)

    def _take_whole(self, held: LoadedAdapter) -> None:
        self._turns.whole(partial(self._take, held))

    def _take(self, held: LoadedAdapter) -> None:
        if held.adapter.is_trainable:
            check_trainable(self.model)
        self._library.add(held)
        if held.adapter.is_trainable:
            self._freeze_base()

    def _freeze_base(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Let nothing but adapters be trained; undone by :meth:`detach`."""
        for parameter in self._base.model.parameters() if parameters is None else parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)
        self._hooks.keep_gradients()
        watch_optimizers(all_attached)

    # -- the model changes -----------------------------------------------------------------------

    def _follow(self, *, thoroughly: bool = False) -> None:
        """Go along with modules that were replaced since the adapters were attached.

        Args:
            thoroughly: look at all modules and parameters, and not only at whether the modules that
                adapters touch are there.

        Raises:
            MismatchError: the adapters do not fit what the model has now.
        """
        if not (self._base.is_current() if thoroughly else self._hooks.watch.holds()):
            whole(partial(self._follow_on, thoroughly=thoroughly))

    def _follow_on(self, *, thoroughly: bool) -> None:
        with self._following.lock:
            if self._hooks.watch.holds() and (self._in_weights.kept or not thoroughly):
                return  # another thread was here; of merged parameters the way back sees to itself
            new = self._following.follow(self._in_weights.parameters)
            if new:
                self._in_weights.forget_way_back()
        there = {id(parameter) for parameter in self._base.model.parameters()}
        self._frozen = [parameter for parameter in self._frozen if id(parameter) in there]
        if any(adapter.is_trainable for adapter in self._library.resident()):
            self._freeze_base(
                p for module in new for p in module._parameters.values() if p is not None
            )

    def delete_adapter(self, name: str) -> None:
        """Let go of an adapter.

        Raises:
            UsageError: there is none of this name, or it answers or is merged now.
        """
        self._library.check_known([name])
        used = {**dict(self._default_names), **dict(self._in_weights.kept)}
        if name in self.active_adapters or name in used:
            raise UsageError(
                "this adapter answers now", where=repr(name),
                hint="Choose another one with set_adapter(name), or None, and then delete it",
            )  # fmt: skip
        self._turns.whole(partial(self._library.remove, name))

    def detach(self) -> nn.Module:
        """Take everything off the model and return it: as it was before ``attach``."""
        self._turns.whole(self._detach)
        return self.model

    def _detach(self) -> None:
        if self._in_weights.kept:
            self.unmerge_adapter()
        self._hooks.remove()
        self._choose(None)
        self._library.close()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        forget(self._base.model)

    unload = detach

    # -- which ones answer -----------------------------------------------------------------------

    def set_adapter(self, adapters: Choice) -> None:
        """Say which adapters answer wherever no scope says otherwise.

        Args:
            adapters: a name; several, which add up; names with weights; None for none.

        Raises:
            UsageError: a name is unknown.
            MismatchError: they cannot go together.
        """
        self._in_weights.check_none()
        self._follow()
        self._choose(adapters)

    def _choose(self, adapters: Choice) -> None:
        chosen, before = self._chosen(adapters), self._default
        chosen.keep()
        # Nothing is called between these two, so no interrupt falls between them.
        self._state.default, self._default = chosen.selection, chosen
        if before is not None:
            before.release()

    def _chosen(self, adapters: Choice) -> Chosen:
        """Return a choice of adapters, which stay in memory until it is released."""
        parts = named(adapters)
        chosen = self._library.choose([name for name, _ in parts])
        try:
            chosen.selection = self._selection(parts, chosen)
        except BaseException:
            chosen.release()
            raise
        return chosen

    def _selection(self, parts: Named, chosen: Chosen) -> Selection | None:
        if not parts:
            return None
        if len(parts) == 1 and parts[0][1] == 1.0:
            return chosen[parts[0][0]].selection
        return self._library.mix(parts, chosen, lambda: self._together(chosen.parts(parts)))

    @contextmanager
    def using(self, adapters: Choice) -> Iterator[None]:
        """Let these adapters answer in a block, in this thread or asyncio task alone.

        A thread that is started inside the block does not have it; ``contextvars.copy_context``
        and ``asyncio.to_thread`` take it along.

        Raises:
            UsageError, MismatchError: as :meth:`set_adapter`.
        """
        self._in_weights.check_none()
        self._follow()
        with self._chosen(adapters) as chosen, self._scope(chosen.selection):
            yield

    @contextmanager
    def rows(self, adapters: Sequence[Choice], *, repeats: int = 1) -> Iterator[None]:
        """Let each row of a batch have adapters of its own in a block, here alone.

        Args:
            adapters: for each row a name, names, names with weights, or None.
            repeats: rows that the model makes of each, one after the other, such as
                ``num_beams`` or ``num_return_sequences`` of ``generate``.

        Raises:
            UsageError: no row or an unknown name; in the block, a batch of another length.
            MismatchError: adapters of one row cannot go together.
        """
        self._in_weights.check_none()
        self._follow()
        of_row = tuple(named(each) for each in adapters)
        if not of_row or repeats < 1:
            raise UsageError(
                "no rows were named", where="rows()", hint="Name an adapter or None for each row"
            )
        names = dict.fromkeys(name for parts in of_row for name, _ in parts)
        with self._library.choose(list(names)) as chosen:
            rows = self._library.rows(
                of_row, repeats, chosen, lambda: self._rows(of_row, repeats, chosen)
            )
            with self._scope(rows):
                yield

    def _rows(self, of_row: Sequence[Named], repeats: int, chosen: Chosen) -> RowSelection:
        distinct = {parts: self._selection(parts, chosen) for parts in of_row}
        number = {parts: at for at, parts in enumerate(distinct)}
        mixes, numbers = tuple(distinct.values()), tuple(number[parts] for parts in of_row)
        if not is_of_transformers(self._base.model):
            self._hooks.cover((), ("",))  # such a model is run as a whole, once for each mix
        rows = RowSelection(mixes, numbers, self._base, self._state.key, repeats)
        return self._following.rows(rows)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the base alone answer in a block, in this thread or asyncio task.

        Adapters that are merged are taken out of the weights for the block, for all threads, and
        merged again after it.
        """
        self._follow()
        block = object()
        try:
            if self._in_weights.kept:
                self._in_weights.disable(block)
            with self._scope(None):
                yield
        finally:
            try:
                if self._in_weights.kept:
                    self._in_weights.enable(block)
            except BaseException:  # an interrupt may have come before the step
                self._in_weights.enable(block)
                raise

    def _scope(self, selection: Selection | RowSelection | None) -> scopes.scope:
        if scopes.in_task():
            self._state.in_tasks = True
        return scopes.scope(self._state.key, selection, self._state.open_scopes)

    # -- merged into the weights -----------------------------------------------------------------

    def merge_adapter(
        self,
        adapters: Choice = None,
        *,
        rounding: str | None = None,
        seed: int = 0,
        dequantize: bool = False,
    ) -> MergeReport:
        """Merge adapters into the model's weights, in place: the bits of the merge on files.

        The model then runs as fast as the base, with these adapters, for all threads; nobody must
        run it meanwhile. :meth:`unmerge_adapter` gives the base's exact bits back.

        Args:
            adapters: which ones; by default those that answer here.
            rounding: how values become codes where the base is quantized: ``stochastic``, which
                keeps the deltas on average (the default), or ``nearest``.
            seed: which random bits that takes.
            dequantize: put plain layers in the place of quantized ones.

        Raises:
            UsageError: adapters are merged already, or there is none to merge.
            RegraftError: they cannot be merged; the model is then as before.
        """
        self._in_weights.check_none()
        self._follow(thoroughly=True)
        parts = named(adapters) if adapters is not None else self._active_mix()
        if not parts:
            raise UsageError("no adapter answers here, so none can be merged", hint="Name one")
        with self._library.choose([name for name, _ in parts]) as chosen:
            weighted = chosen.parts(parts)
            work = prepared_merge(
                self._base, weighted, rounding=rounding, seed=seed, dequantize=dequantize
            )
        return self._in_weights.merge(parts, work)

    def unmerge_adapter(self) -> None:
        """Take the merged adapters out of the weights again: every bit is what it was.

        Raises:
            UsageError: nothing is merged.
            MismatchError: the weights were changed meanwhile by others.
        """
        self._follow()
        self._in_weights.unmerge()

    def swap_adapter(self, merged_adapter: Choice, adapter: Choice) -> MergeReport:
        """Take one merged adapter (or mix) out of the weights, and merge another one.

        Args:
            merged_adapter: what is merged now.
            adapter: what is to be merged.

        Raises:
            UsageError: something else is merged, or nothing.
            RegraftError: the other one cannot be merged; the model is then merged as before.
        """
        self._in_weights.check_is(merged_adapter)
        self._follow()
        parts = named(adapter)
        with self._library.choose([name for name, _ in parts]) as chosen:
            weighted = chosen.parts(parts)
            return self._in_weights.exchange(
                merged_adapter, parts, lambda there: Merged(self._base, weighted, there.choices)
            )

    def merge_and_unload(
        self,
        adapters: Choice = None,
        *,
        rounding: str | None = None,
        seed: int = 0,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge adapters for good and take everything else off; return the model.

        Arguments and errors are those of :meth:`merge_adapter`; what is merged already stays.
        """
        if not self._in_weights.kept:
            self.merge_adapter(adapters, rounding=rounding, seed=seed, dequantize=dequantize)
        self._follow()
        self._turns.whole(self._leave_merged)
        return self.model

    def _leave_merged(self) -> None:
        self._in_weights.leave()
        self._detach()

    def _active_mix(self) -> Named:
        selection = self._state.selection()
        if isinstance(selection, RowSelection):
            raise UsageError("rows have adapters of their own here", hint="Name those to be merged")
        return selection.names if isinstance(selection, Selection) else ()

    # -- training --------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return what is trained: all trainable tensors of all adapters, with PEFT's names.

        What two sides of a tie share comes once, under the first of its names, as in torch.
        """
        return self._library.trained()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters are trained, and how many the model and its adapters have.

        Adapters of a cache, which come and go, do not count.
        """
        adapters = self._library.resident()
        return counts(self._base.model, (t for each in adapters for t in each.tensors.values()))

    def print_trainable_parameters(self) -> None:
        """Print these two numbers as PEFT does, with the share that is trained in percent."""
        print(sentence(*self.get_nb_trainable_parameters()))

    def for_trainer(
        self, name: str | None = None, *, checkpoint: str | Path | None = None
    ) -> nn.Module:
        """Return what to give to ``transformers.Trainer(model=...)`` to train an adapter.

        It is of the model's class and runs in its modules; see
        :func:`regraft.runtime.training.trainer.trainer_model`.

        Args:
            name: the adapter to train; by default the only one that is trainable.
            checkpoint: one that a run with PEFT has left, if it is to go on from there.

        Raises:
            UsageError: no adapter is trainable, several are, or the one to train does not answer.
            MismatchError: the checkpoint is another adapter's.
        """
        from regraft.runtime.training.trainer import trainer_model

        twin: nn.Module = trainer_model(self, name, checkpoint)
        return twin

    def save_pretrained(self, folder: str | Path, name: str | None = None, **options: Any) -> Path:
        """Save an adapter in PEFT's format; see :func:`regraft.save`, which takes the options."""
        from regraft.runtime.saving.save import save

        return save(self, folder, name=name, **options)
