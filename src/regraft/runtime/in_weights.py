"""What of a handle's adapters is in the model's weights: one state, changed in whole steps.

What is said of the weights is what the merges themselves say, after whatever happened to them: a
step that failed or was interrupted has been taken back, or is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from regraft.errors import UsageError
from regraft.runtime.forward.choices import Choice, listed, named
from regraft.runtime.forward.hooks import State
from regraft.runtime.forward.selection import Named
from regraft.runtime.in_place.merge import Merged, MergeReport, exchange
from regraft.runtime.whole import Turns


@dataclass(frozen=True)
class Merging:
    """Adapters with their weights, and their merge."""

    names: Named
    work: Merged

    @property
    def is_there(self) -> bool:
        """Whether the weights are others than the base's because of it."""
        return self.work.is_merged or self.work.is_torn


class InWeights:
    """The merge that is in a model's weights, if one is."""

    def __init__(self, state: State, turns: Turns, look: Callable[[], None]) -> None:
        """Take what is told of it.

        Args:
            state: what all hooks ask.
            turns: for its steps.
            look: called when layers may have become others.
        """
        self._state, self._turns, self._look = state, turns, look
        self._merging: Merging | None = None
        self._disabled: set[object] = set()

    @property
    def kept(self) -> Named:
        """What is merged, also while it is taken out for a while."""
        return self._merging.names if self._merging is not None else ()

    @property
    def names(self) -> Named:
        """What is in the weights at this moment."""
        merging = self._merging
        return merging.names if merging is not None and merging.is_there else ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that adapters are merged into."""
        return self._merging.work.names if self._merging is not None else ()

    def check_none(self) -> None:
        """Refuse to go on while adapters are merged.

        Raises:
            UsageError: they are.
        """
        if self._merging is not None:
            raise UsageError(
                "adapters are merged into the weights", where=listed(self._merging.names),
                hint="Call unmerge_adapter() first, or swap_adapter(merged, other)",
            )  # fmt: skip

    def check_is(self, adapters: Choice) -> None:
        """Refuse a call that names other adapters than those in the weights.

        Raises:
            UsageError: they are not.
        """
        if self._merging is None:
            raise UsageError(
                "no adapter is merged, so none can be swapped", where=repr(adapters),
                hint="merge_adapter(name) merges one",
            )  # fmt: skip
        if named(adapters) != self._merging.names:
            raise UsageError(
                "this is not what is merged", where=repr(adapters), expected=listed(self.kept),
                hint="Name what is merged first, and then what is to take its place",
            )  # fmt: skip

    def merge(self, names: Named, work: Merged) -> MergeReport:
        """Carry a merge out.

        Raises:
            UsageError: adapters are merged already.
            RegraftError: it cannot be done; the weights are then as before.
        """
        self._turns.whole(partial(self._merge, Merging(names, work)))
        return work.report

    def _merge(self, merging: Merging) -> None:
        self.check_none()
        try:
            merging.work.carry_out()
        finally:
            self._note(merging)

    def unmerge(self) -> None:
        """Take what is merged out of the weights.

        Raises:
            UsageError: nothing is merged.
            MismatchError: the weights were changed by others; they are then as before.
        """
        self._turns.whole(self._unmerge)

    def _unmerge(self) -> None:
        merging = self._needed()
        try:
            if merging.is_there:
                merging.work.unmerge()
        finally:
            self._note(merging)

    def exchange(
        self, adapters: Choice, names: Named, prepare: Callable[[Merged], Merged]
    ) -> MergeReport:
        """Take what is merged out, and merge something else.

        Args:
            adapters: what has to be merged now.
            names: what is to be merged.
            prepare: makes the other merge, out of the one that is there.

        Raises:
            UsageError: something else is merged, or nothing.
            RegraftError: it cannot be done; the weights are then as before.
        """
        self.check_is(adapters)
        before = self._needed()
        after = Merging(names, prepare(before.work))
        self._turns.whole(partial(self._exchange, adapters, before, after))
        return after.work.report

    def _exchange(self, adapters: Choice, before: Merging, after: Merging) -> None:
        self.check_is(adapters)
        try:
            exchange(before.work, after.work)
        finally:
            self._note(before, after)

    def disable(self, block: object) -> None:
        """Take what is merged out of the weights for a block of code."""
        self._turns.whole(partial(self._disable, block))

    def _disable(self, block: object) -> None:
        merging = self._merging
        if merging is None:
            return
        if merging.is_there:
            try:
                merging.work.unmerge()
            except BaseException:
                self._note(merging)
                raise
            self._look()
        self._disabled.add(block)

    def enable(self, block: object) -> None:
        """Merge it again, once no block needs it out; a second time does nothing."""
        self._turns.whole(partial(self._enable, block))

    def _enable(self, block: object) -> None:
        merging = self._merging
        self._disabled.discard(block)
        if merging is None or merging.is_there or self._disabled:
            return
        try:
            merging.work.carry_out(to_the_end=True)
        finally:
            self._note(merging)

    def forget_way_back(self) -> None:
        """Let go of what takes the merge out again: the parameters are others now."""
        if self._merging is not None:
            self._merging.work.forget()

    def leave(self) -> None:
        """Leave the merge in the weights for good, and say nothing of it any more.

        Raises:
            UsageError: a block of code has it taken out just now, or only a part is merged.
        """
        merging = self._needed()
        if not merging.work.is_merged:
            raise UsageError(
                "the merged adapters are not in the weights now", where=listed(merging.names),
                hint="Unload outside of disable_adapter()",
            )  # fmt: skip
        merging.work.forget()
        self._note()

    def _needed(self) -> Merging:
        if self._merging is None:
            raise UsageError("no adapter is merged", hint="merge_adapter(name) merges one")
        return self._merging

    def _note(self, *known: Merging) -> None:
        """Set the record of what is in the weights: one of these merges, as each reports itself, or
        none.
        """
        there = next((each for each in known if each.is_there), None)
        self._state.is_torn = there is not None and there.work.is_torn
        self._state.is_merged, self._merging = there is not None, there
        if there is None:  # nothing waits any more for the end of a block
            self._disabled.clear()
        self._look()  # layers that a merge takes out of their codes are other modules
