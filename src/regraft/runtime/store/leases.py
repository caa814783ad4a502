"""Things within a number of bytes: what is leased stays, of the rest the longest unused goes first.

It knows nothing of adapters. A thing is registered with its size and a function that loads it; a
lease of some names loads what is not there, and keeps all of them until it is released.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

from regraft.errors import MemoryCapError, Problem, UsageError

T = TypeVar("T")

_LOOK_UP = 1.0
"""Seconds after which whoever waits looks again: an interrupt may have swallowed the news."""

NOBODY = 0
"""The owner of leases that no thread is expected to release; no thread has this number."""


@dataclass(eq=False)
class Entry(Generic[T]):
    """A thing that can be loaded.

    Attributes:
        name: what it is asked for by.
        load: makes it.
        nbytes: the bytes it is counted with.
        users: how many leases each thread has on it.
        value: the thing, while it is loaded.
        held: whether its bytes are counted now; from before it is loaded until it is dropped.
        loading: held by the thread that loads it.
    """

    name: str
    load: Callable[[], T]
    nbytes: int
    users: Counter[int] = field(default_factory=Counter)
    value: T | None = None
    held: bool = False
    loading: threading.Lock = field(default_factory=threading.Lock)


class _Hold(Generic[T]):
    """What the store knows of a lease; the lease itself it must not know, for it to be let go of.

    Attributes:
        entries: what is leased.
        owner: the thread that is expected to release it.
    """

    __slots__ = ("entries", "owner")

    def __init__(self, entries: Sequence[Entry[T]], owner: int) -> None:
        self.entries, self.owner = tuple(entries), owner


class Lease(Generic[T]):
    """Some things that stay loaded until this is released; a context manager.

    One that is let go of without a release, because an interrupt came, is released then.

    Attributes:
        values: the things by name.
    """

    _released = True  # until it is made

    def __init__(self, store: Store[T], entries: Sequence[Entry[T]], owner: int) -> None:
        self._store, self._hold = store, _Hold(entries, owner)
        self._released = False
        self.values: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        return self.values[name]

    def keep(self) -> None:
        """Mark this lease as lasting, so that no thread waits for its release."""
        if not self._released:
            self._store._disown(self._hold)

    def release(self) -> None:
        """Give the things back; a second time does nothing."""
        if not self._released:
            self._store._give_back(self._hold)
            self._released, self.values = True, {}

    def __enter__(self) -> Lease[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.release()

    def __del__(self) -> None:
        if not self._released:
            self._store._give_back_later(self._hold)


class _Waiter:
    """A thread that stands in the queue; it is woken when something has changed.

    Attributes:
        since, deadline: from when until when, by the monotonic clock.
    """

    __slots__ = ("_bell", "deadline", "since")

    def __init__(self, since: float, deadline: float) -> None:
        self.since, self.deadline = since, deadline
        # Free means: something has changed since the waiter looked. A wake that comes before the
        # wait is not lost, and two wakes count as one.
        self._bell = threading.Lock()
        self._bell.acquire()

    def wait(self, seconds: float) -> None:
        """Wait until it is woken, or the time is up."""
        self._bell.acquire(timeout=max(0.0, min(seconds, _LOOK_UP)))

    def wake(self) -> None:
        """Let it look again."""
        with suppress(RuntimeError):  # it was woken already
            self._bell.release()


class Store(Generic[T]):
    """Things by name within a cap, for any number of threads.

    An interrupt may come between any two steps of a change. What is leased is decided by one step,
    an entry in the table of holds; whatever follows from it is then computed again.

    Attributes:
        max_bytes: the cap.
        timeout: seconds that a lease waits for room.
        hits, misses: how often a name that was asked for was there, and was not.
        evictions: how many things were dropped to make room.
        nbytes, peak_bytes: what is counted now, and the most that ever was.
    """

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self.hits = self.misses = self.evictions = self.nbytes = self.peak_bytes = 0
        self._entries: dict[str, Entry[T]] = {}
        self._holds: dict[_Hold[T], None] = {}
        self._idle: OrderedDict[Entry[T], None] = OrderedDict()
        self._idle_bytes = 0
        self._busy: set[Entry[T]] = set()
        self._owners: Counter[int] = Counter()
        self._queue: deque[_Waiter] = deque()
        self._dropped: deque[_Hold[T]] = deque()
        self._half_done = False
        # Guards every table here. Loading is not done under it: an entry has a lock of its own.
        # No condition: an interrupt in one of its methods, which are Python, would leave it locked.
        self._lock = threading.Lock()

    def register(self, name: str, load: Callable[[], T], nbytes: int) -> None:
        """Make a name known.

        Args:
            name: what it will be asked for by.
            load: makes the thing; called by one thread at a time, again after each eviction.
            nbytes: the bytes it takes once it is loaded.

        Raises:
            UsageError: the name is taken.
        """
        with self._lock:
            if name in self._entries:
                raise UsageError("the cache has an adapter of this name", where=name,
                                 hint="Give it another name, or delete the other one")  # fmt: skip
            self._entries[name] = Entry(name, load, nbytes)

    def unregister(self, name: str) -> None:
        """Forget a name. A lease on it stays valid, and its bytes count until it is released."""
        with self._lock:
            self._settle()
            entry = self._entry(name)
            self._half_done = True
            del self._entries[name]
            if entry in self._idle:
                self._drop(entry)
            self._half_done = False
            self._ring()

    def names(self) -> tuple[str, ...]:
        """Return the names of everything that is registered."""
        with self._lock:
            return tuple(self._entries)

    def loaded(self) -> tuple[str, ...]:
        """Return the names of what is loaded now."""
        with self._lock:
            return tuple(n for n, entry in self._entries.items() if entry.value is not None)

    def lease(self, names: Sequence[str], *, counted: bool = True) -> Lease[T]:
        """Load what is missing of some names, all or none, and keep them until it is released.

        Room is taken for all of them at once, before any is loaded. Where it is lacking and other
        threads could make it, this waits; whoever waited longest goes first.

        Args:
            names: what to lease; one name may come several times.
            counted: whether hits and misses are counted.

        Raises:
            UsageError: a name is not known.
            MemoryCapError: they do not fit beside what cannot go.
            Exception: whatever ``load`` raises; nothing is leased then.
        """
        return self._loaded(self._take(names, self.timeout, counted))

    def try_lease(self, names: Sequence[str], *, counted: bool = True) -> Lease[T] | None:
        """Return a lease as :meth:`lease` does, or None if there is no room right now."""
        try:
            lease = self._take(names, 0.0, counted)
        except MemoryCapError:
            return None
        return self._loaded(lease)

    def settle(self) -> None:
        """See to it that the figures are those of now, also after interrupts."""
        with self._lock:
            self._settle()

    def _loaded(self, lease: Lease[T]) -> Lease[T]:
        """Return a lease with everything loaded."""
        try:
            lease.values = {entry.name: _value(entry) for entry in lease._hold.entries}
        except BaseException:
            lease.release()
            raise
        return lease

    def _entry(self, name: str) -> Entry[T]:
        if name not in self._entries:
            raise UsageError("there is no adapter of this name", where=name,
                             found=", ".join(self._entries) or "none",
                             hint="Call load_adapter first")  # fmt: skip
        return self._entries[name]

    def _take(self, names: Sequence[str], timeout: float, counted: bool) -> Lease[T]:
        """Wait for room and mark the entries as used by this thread."""
        owner, now = threading.get_ident(), time.monotonic()
        waiter = None
        try:
            while True:
                with self._lock:
                    self._settle()
                    entries = [self._entry(name) for name in dict.fromkeys(names)]
                    if self._may_go(waiter, entries, owner):
                        lease = Lease(self, entries, owner)
                        self._start(lease._hold, counted)
                        return lease
                    left = self._time_left(entries, owner, now + timeout)
                    if waiter is None:
                        waiter = _Waiter(now, now + timeout)
                        self._queue.append(waiter)
                waiter.wait(left)
        finally:
            if waiter is not None:
                try:
                    self._leave(waiter)
                except BaseException:  # an interrupt may have come before it was done
                    self._leave(waiter)
                    raise

    def _leave(self, waiter: _Waiter) -> None:
        """Leave the queue; a second time does nothing."""
        with self._lock:
            if waiter in self._queue:
                self._queue.remove(waiter)
            self._ring()

    def _may_go(self, waiter: _Waiter | None, entries: Sequence[Entry[T]], owner: int) -> bool:
        """Whether there is room, and nobody who has to go first.

        Who needs no room need not wait, unless the first of the queue has waited for long. Who has
        a lease already must not: those before it in the queue may be waiting for just that lease.
        """
        first = not self._queue or self._queue[0] is waiter or self._owners[owner] > 0
        if all(entry.held for entry in entries):
            return first or not self._is_starving(self._queue[0], waiter)
        return first and self._has_room(entries)

    def _is_starving(self, first: _Waiter, waiter: _Waiter | None) -> bool:
        """Whether the first of the queue has waited half of its time.

        Leases on what is there could go on for ever, each beginning before another one ends, and
        there would never be room. A thread whose own time is up goes all the same.
        """
        now = time.monotonic()
        return now > first.since + self.timeout / 2 and (waiter is None or now < waiter.deadline)

    def _has_room(self, entries: Sequence[Entry[T]]) -> bool:
        missing = _sum([entry for entry in entries if not entry.held])
        kept = _sum([entry for entry in entries if entry in self._idle])
        return self.nbytes + missing - (self._idle_bytes - kept) <= self.max_bytes

    def _time_left(self, entries: Sequence[Entry[T]], owner: int, deadline: float) -> float:
        """Return for how long it can help to wait.

        Raises:
            MemoryCapError: it cannot, or the time is up.
        """
        others = [entry for entry in self._busy if entry not in entries]
        stuck = [entry for entry in others if NOBODY in entry.users or owner in entry.users]
        needed, left = _sum(entries), deadline - time.monotonic()
        if needed + _sum(stuck) > self.max_bytes:
            raise self._too_small(entries, needed, _sum(stuck))
        if left <= 0:
            raise self._too_small(entries, needed, _sum(others))
        return left

    def _too_small(self, entries: Sequence[Entry[T]], needed: int, used: int) -> MemoryCapError:
        there = f", beside {used:,} bytes that are pinned or in use" if used else ""
        return MemoryCapError(
            Problem(
                "no room in the adapter cache", ", ".join(entry.name for entry in entries),
                f"at most {self.max_bytes:,} bytes (max_bytes)", f"{needed:,} bytes{there}",
                f"Allow {needed + used:,} bytes, or use fewer adapters at once",
            )
        )  # fmt: skip

    def _start(self, hold: _Hold[T], counted: bool) -> None:
        """Count the entries of a lease, mark them as used, and drop others for them."""
        entries = hold.entries
        if counted:
            there = sum(entry.value is not None for entry in entries)
            self.hits, self.misses = self.hits + there, self.misses + len(entries) - there
        self._half_done = True
        self._holds[hold] = None
        for entry in entries:
            self._wake(entry)
        self._use(hold)
        if new := [entry for entry in entries if not entry.held]:
            self._make_room(_sum(new))
            for entry in new:
                entry.held = True
            self.nbytes += _sum(new)
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
        self._half_done = False

    def _use(self, hold: _Hold[T]) -> None:
        for entry in hold.entries:
            entry.users[hold.owner] += 1
            self._busy.add(entry)
        self._owners[hold.owner] += 1

    def _make_room(self, missing: int) -> None:
        while self._idle and self.nbytes + missing > self.max_bytes:
            self._drop(next(iter(self._idle)))
            self.evictions += 1

    def _wake(self, entry: Entry[T]) -> None:
        if entry in self._idle:
            del self._idle[entry]
            self._idle_bytes -= entry.nbytes

    def _drop(self, entry: Entry[T]) -> None:
        self._wake(entry)
        entry.value, entry.held = None, False
        self.nbytes -= entry.nbytes

    def _give_back(self, hold: _Hold[T]) -> None:
        with self._lock:
            self._settle()
            self._end(hold)

    def _give_back_later(self, hold: _Hold[T]) -> None:
        """Note a lease that was let go of; whoever holds the lock may be this very thread."""
        self._dropped.append(hold)

    def _end(self, hold: _Hold[T]) -> None:
        """Take a lease off its entries; a second time does nothing."""
        if hold not in self._holds:
            return
        self._half_done = True
        del self._holds[hold]
        self._forget(hold)
        for entry in hold.entries:
            if not entry.users:
                self._busy.discard(entry)
                self._rest(entry)
        self._half_done = False
        self._ring()

    def _disown(self, hold: _Hold[T]) -> None:
        with self._lock:
            self._settle()
            if hold not in self._holds or hold.owner == NOBODY:
                return
            self._half_done = True
            self._forget(hold)
            hold.owner = NOBODY
            self._use(hold)
            self._half_done = False
            self._ring()

    def _forget(self, hold: _Hold[T]) -> None:
        """Take one lease of an owner off its entries."""
        for users in (self._owners, *(entry.users for entry in hold.entries)):
            users[hold.owner] -= 1
            if not users[hold.owner]:
                del users[hold.owner]

    def _ring(self) -> None:
        """Let whoever waits look again."""
        for waiter in self._queue:
            waiter.wake()

    # -- after interrupts ------------------------------------------------------------------------

    def _settle(self) -> None:
        """Do what interrupts have left undone."""
        if self._half_done:
            self._count_again()
        while self._dropped:
            self._end(self._dropped[0])
            self._dropped.popleft()
        while self._queue and self._queue[0].deadline + 2 * _LOOK_UP < time.monotonic():
            self._queue.popleft()

    def _count_again(self) -> None:
        """Compute from the holds all that follows from them."""
        leased = [entry for hold in self._holds for entry in hold.entries]
        entries = dict.fromkeys([*self._idle, *self._entries.values(), *self._busy, *leased])
        self._owners, self._busy, self._idle = Counter(), set(), OrderedDict()
        for entry in entries:
            entry.users.clear()
        for hold in self._holds:
            self._use(hold)
        for entry in entries:
            is_known = self._entries.get(entry.name) is entry
            if not entry.users and is_known and entry.value is not None:
                self._idle[entry] = None
            entry.held = entry in self._idle or entry in self._busy
            entry.value = entry.value if entry.held else None
        self._idle_bytes = _sum([*self._idle])
        self.nbytes = _sum([entry for entry in entries if entry.held])
        self._make_room(0)
        self._half_done = False

    def _rest(self, entry: Entry[T]) -> None:
        """Keep an entry that nobody uses for the next who asks, if it is still known and loaded."""
        if entry.value is None or self._entries.get(entry.name) is not entry:
            self._drop(entry)
            return
        self._idle[entry] = None
        self._idle_bytes += entry.nbytes


def _value(entry: Entry[T]) -> T:
    """Return a leased entry's value; the first thread loads it, and the others wait."""
    if entry.value is None:
        with entry.loading:
            if entry.value is None:
                entry.value = entry.load()
    return entry.value


def _sum(entries: Sequence[Entry[T]]) -> int:
    return sum(entry.nbytes for entry in entries)
