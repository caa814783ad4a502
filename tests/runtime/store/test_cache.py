"""The adapter cache: within its cap, whatever is asked for, by however many threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from regraft import AdapterCache, MemoryCapError, UsageError
from regraft.runtime.store.leases import Lease, Store

NAMES = tuple("abcdefgh")
SIZES = dict(zip(NAMES, (10, 20, 30, 40, 50, 60, 70, 130), strict=True))
CAP = 120


def filled(store: Any, names: str = "abcdefg", nbytes: int = 10) -> Any:
    """Return a store, or cache, that knows some names; each is loaded as its name in capitals."""
    for name in names:
        store.register(name, name.upper, nbytes)
    return store


# -- against a model -------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """A store beside a plain list of what has to be loaded, the longest unused first.

    It is one thread, so a lease that cannot be had at once is an error at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store: Store[object] = Store(CAP, timeout=0.0)
        self.known: dict[str, object] = {}
        self.order: list[str] = []
        self.leases: list[tuple[Lease[object], dict[str, object]]] = []
        self.failing: set[str] = set()
        self.gone = 0

    def leased(self) -> set[str]:
        """Return the names in use that are still known."""
        found = {(name, id(value)) for _, values in self.leases for name, value in values.items()}
        return {name for name, value in self.known.items() if (name, id(value)) in found}

    def orphans(self) -> set[tuple[str, int]]:
        """Return what is in use though its name was forgotten."""
        found = {(name, id(value)) for _, values in self.leases for name, value in values.items()}
        return {(n, v) for n, v in found if self.known.get(n) is None or id(self.known[n]) != v}

    def used(self) -> int:
        return sum(SIZES[n] for n in self.order) + sum(SIZES[n] for n, _ in self.orphans())

    def load(self, name: str, value: object) -> object:
        if name in self.failing:
            raise OSError(name)
        return value

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str) -> None:
        if name in self.known:
            with pytest.raises(UsageError):
                self.store.register(name, object, 1)
            return
        value = object()
        self.known[name] = value
        self.store.register(name, lambda: self.load(name, value), SIZES[name])

    @rule(name=st.sampled_from(NAMES))
    def unregister(self, name: str) -> None:
        if name not in self.known:
            with pytest.raises(UsageError):
                self.store.unregister(name)
            return
        self.store.unregister(name)
        del self.known[name]
        self.order = [other for other in self.order if other != name]

    @rule(name=st.sampled_from(NAMES))
    def break_or_mend(self, name: str) -> None:
        self.failing ^= {name}

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=4), kept=st.booleans())
    def lease(self, names: list[str], kept: bool) -> None:
        wanted = list(dict.fromkeys(names))
        if not set(wanted) <= set(self.known):
            with pytest.raises(UsageError):
                self.store.lease(names)
            return
        busy = self.leased() | set(wanted)
        needed = sum(SIZES[n] for n in busy) + sum(SIZES[n] for n, _ in self.orphans())
        if needed > CAP:
            with pytest.raises(MemoryCapError):
                self.store.lease(names)
            assert self.store.try_lease(names) is None
            return
        self.make_room([n for n in wanted if n not in self.order], busy)
        broken = [n for n in wanted if n in self.failing and n not in self.order]
        if broken:
            with pytest.raises(OSError, match=broken[0]):
                self.store.lease(names)
            before = wanted[: wanted.index(broken[0])]
            self.touch([n for n in wanted if n in self.order or n in before])
            return
        lease = self.store.lease(names)
        assert lease.values == {n: self.known[n] for n in wanted}
        if kept:
            lease.keep()
        self.order += [n for n in wanted if n not in self.order]
        self.leases.append((lease, dict(lease.values)))

    def make_room(self, new: list[str], busy: set[str]) -> None:
        missing = sum(SIZES[n] for n in new)
        while self.used() + missing > CAP:
            self.order.remove(next(n for n in self.order if n not in busy))

    def touch(self, names: list[str]) -> None:
        """Note that names were released, in this order; who uses them still is not concerned."""
        idle = [n for n in names if n not in self.leased()]
        self.order = [n for n in self.order if n not in idle] + idle

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.leases:
            return
        lease, values = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        lease.release()
        names = [n for n, value in values.items() if self.known.get(n) is value]
        self.touch(names)

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert sorted(self.store.loaded()) == sorted(self.order)
        assert self.store.nbytes == self.used() <= CAP
        assert self.store.peak_bytes <= CAP

    @invariant()
    def leases_have_what_they_were_given(self) -> None:
        for lease, values in self.leases:
            assert lease.values == values


TestAgainstAModel = StoreMachine.TestCase
TestAgainstAModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


# -- one thread ------------------------------------------------------------------------------------


def test_the_longest_unused_goes_first() -> None:
    cache = filled(AdapterCache(30), "abcd")
    for name in "abcacd":
        cache.lease([name]).release()
    assert cache.loaded() == ("a", "c", "d")
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.reads) == (2, 4, 1, 4)
    assert stats.hit_rate == 2 / 6
    assert (stats.nbytes, stats.peak_bytes) == (30, 30)


def test_an_adapter_in_use_stays_though_it_is_the_oldest() -> None:
    cache = filled(AdapterCache(20), "abc")
    with cache.lease(["a"]) as first:
        for name in "bcbc":
            cache.lease([name]).release()
        assert "a" in cache.loaded()
        assert first["a"] == "A"


def test_an_adapter_larger_than_the_cap_is_refused_with_both_sizes() -> None:
    cache = filled(AdapterCache("1KB"), "a", nbytes=1001)
    with pytest.raises(MemoryCapError, match=r"a: no room.*1,000 bytes.*1,001 bytes") as caught:
        cache.lease(["a"])
    assert caught.value.problems[0].hint.startswith("Allow 1,001 bytes")
    assert cache.stats().reads == 0


def test_a_thread_that_stands_in_its_own_way_is_told_at_once() -> None:
    cache = filled(AdapterCache(20, timeout=60.0))
    started = time.monotonic()
    with cache.lease(["a", "b"]), pytest.raises(MemoryCapError, match="beside 20 bytes"):
        cache.lease(["c"])
    assert time.monotonic() - started < 30
    assert cache.lease(["c"])["c"] == "C"


def test_several_adapters_come_all_or_none() -> None:
    cache = filled(AdapterCache(20))
    with pytest.raises(MemoryCapError):
        cache.lease(["a", "b", "c"])
    assert cache.loaded() == ()
    with cache.lease(["a", "b", "a"]) as lease:
        assert lease.values == {"a": "A", "b": "B"}
    assert cache.lease([]).values == {}


def test_a_pinned_adapter_stays_until_it_is_unpinned() -> None:
    cache = filled(AdapterCache(20, timeout=60.0))
    cache.pin("a")
    cache.pin("a")
    for name in "bcde":
        cache.lease([name]).release()
    assert cache.loaded() == ("a", "e")
    with pytest.raises(MemoryCapError, match="beside 10 bytes"):
        cache.lease(["b", "c"])
    cache.unpin("a")
    cache.lease(["b", "c"]).release()
    assert cache.loaded() == ("b", "c")
    with pytest.raises(UsageError, match="not pinned"):
        cache.unpin("a")
    assert cache.stats().hits == 0


def test_a_forgotten_adapter_counts_until_it_is_given_back() -> None:
    cache = filled(AdapterCache(20))
    cache.pin("a")
    lease = cache.lease(["a"])
    cache.unregister("a")
    assert lease["a"] == "A"
    assert (cache.loaded(), cache.stats().nbytes) == ((), 10)
    cache.register("a", lambda: "another", 10)
    assert cache.lease(["a"])["a"] == "another"
    lease.release()
    assert cache.stats().nbytes == 10
    for call in (cache.unregister, cache.pin, lambda n: cache.lease([n]), cache.unpin):
        with pytest.raises(UsageError):
            call("unknown")
    with pytest.raises(UsageError, match="unknown"):
        cache.prefetch(["a", "unknown"])


def test_a_failed_load_leaves_nothing_behind_and_is_tried_again() -> None:
    cache, answers = AdapterCache(20), iter([OSError("bad disk"), "A"])

    def read() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    filled(cache, "b").register("a", read, 10)
    with pytest.raises(OSError, match="bad disk"):
        cache.lease(["b", "a"])
    assert (cache.loaded(), cache.stats().nbytes) == (("b",), 10)
    assert cache.lease(["a"])["a"] == "A"


@pytest.mark.parametrize("sizes", [(0, None), ("1 potato", None), (-1, None), (10, -1)])
def test_sizes_that_are_none_are_refused(sizes: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="_bytes: not a"):
        AdapterCache(sizes[0], host_bytes=sizes[1])


# -- a device of its own ---------------------------------------------------------------------------


def on_device(cache: AdapterCache, names: str = "abcd") -> list[str]:
    """Register adapters that are read to the host and placed on a device; return what happens."""
    log: list[str] = []

    def read(name: str) -> Any:
        log.append(f"read {name}")
        return name

    def place(name: Any) -> Any:
        log.append(f"place {name}")
        return name.upper()

    for name in names:
        cache.register(name, lambda name=name: read(name), 10, place)
    return log


def test_what_comes_back_from_host_memory_is_not_read_again() -> None:
    cache = AdapterCache(10)
    log = on_device(cache)
    for name in "abab":
        with cache.lease([name]) as lease:
            assert lease[name] == name.upper()
    assert log == ["read a", "place a", "read b", "place b", "place a", "place b"]
    stats = cache.stats()
    assert (stats.nbytes, stats.host_bytes, stats.reads) == (10, 20, 2)


@pytest.mark.parametrize(("host_bytes", "reads"), [(0, 4), (10, 4), (20, 2), ("1KiB", 2)])
def test_host_memory_has_a_cap_of_its_own(host_bytes: int | str, reads: int) -> None:
    cache = AdapterCache(10, host_bytes=host_bytes)
    on_device(cache)
    for name in "abab":
        cache.lease([name]).release()
    assert cache.stats().reads == reads


def test_without_a_number_host_memory_is_four_times_the_device() -> None:
    cache = AdapterCache(10)
    on_device(cache, "abcdefgh")
    for name in "abcdefgh":
        cache.lease([name]).release()
    assert (cache.host_bytes, cache.stats().host_bytes) == (40, 40)
    cache.unregister("h")
    assert cache.stats().host_bytes == 30


# -- threads ---------------------------------------------------------------------------------------


def run_threads(count: int, work: Callable[[int], None]) -> None:
    """Run a function in threads and raise the first of their errors."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread is stuck"
    if errors:
        raise errors[0]


def test_many_threads_that_ask_for_one_adapter_load_it_once() -> None:
    cache, gate = AdapterCache(10), threading.Barrier(8)
    loads: list[int] = []

    def read() -> Any:
        loads.append(threading.get_ident())
        time.sleep(0.05)
        return "A"

    cache.register("a", read, 10)

    def ask(_: int) -> None:
        gate.wait()
        with cache.lease(["a"]) as lease:
            assert lease["a"] == "A"

    run_threads(8, ask)
    assert len(loads) == 1


class Loaded:
    """Counts the bytes of things that exist, as the tensors of adapters would."""

    lock = threading.Lock()
    alive = 0

    def __init__(self, name: str) -> None:
        self.name = name
        with Loaded.lock:
            Loaded.alive += 1

    def __del__(self) -> None:
        with Loaded.lock:
            Loaded.alive -= 1


@pytest.fixture
def counted() -> Iterator[type[Loaded]]:
    Loaded.alive = 0
    yield Loaded
    assert Loaded.alive == 0


@pytest.mark.slow
def test_threads_at_random_get_their_own_and_never_exceed_the_cap(counted: type[Loaded]) -> None:
    names = [f"adapter{n}" for n in range(40)]
    cache = AdapterCache(12, timeout=50.0)
    for name in names:
        cache.register(name, lambda name=name: counted(name), 1)
    seen: list[int] = []
    fetched: list[Future[bool]] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(150):
            chosen = chance.sample(names, chance.choice((1, 1, 1, 2, 8)))
            with cache.lease(chosen) as lease:
                if chance.random() < 0.3:
                    fetched.extend(cache.prefetch(chance.sample(names, 2)))
                time.sleep(0)
                assert [lease[name].name for name in chosen] == chosen
                seen.append(counted.alive)

    run_threads(12, work)
    assert {future.result(30) for future in fetched} == {True, False}
    stats = cache.stats()
    assert max(seen) <= stats.peak_bytes <= 12
    assert stats.evictions > 100
    for name in cache.loaded():
        cache.unregister(name)


def test_who_waits_gets_the_room_that_another_thread_frees() -> None:
    cache, held = filled(AdapterCache(10, timeout=50.0)), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            with cache.lease(["a"]):
                held.set()
                time.sleep(0.1)
        else:
            held.wait()
            assert cache.lease(["b"])["b"] == "B"

    run_threads(2, work)


def test_a_wait_for_room_ends_with_an_error() -> None:
    cache, done = filled(AdapterCache(10, timeout=0.05)), threading.Event()
    held = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            with cache.lease(["a"]):
                held.set()
                done.wait(30)
            return
        held.wait()
        with pytest.raises(MemoryCapError, match="beside 10 bytes"):
            cache.lease(["b"])
        done.set()

    run_threads(2, work)
    assert cache.lease(["b"])["b"] == "B"


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    cache, stop = filled(AdapterCache(60, timeout=50.0)), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            with cache.lease(list("abcdef")) as lease:
                assert len(lease.values) == 6
            stop.set()
            return
        chance = random.Random(number)
        while not stop.is_set():
            with cache.lease([chance.choice("abcdefg")]):
                time.sleep(0.001)

    run_threads(6, work)


def started(work: Callable[[], None], until: Callable[[], object]) -> threading.Thread:
    """Start a thread, and return it once it has come to where something holds."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not until() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert until()
    return thread


def test_who_comes_later_does_not_take_the_room_that_another_one_waits_for() -> None:
    store, order = filled(Store(30, timeout=50.0)), []

    def ask(names: str) -> None:
        with store.lease(list(names)):
            order.append(names)
            time.sleep(0.01)

    first = store.lease(["a"])
    large = started(lambda: ask("bcd"), lambda: store._queue)
    small = started(lambda: ask("e"), lambda: order or len(store._queue) == 2)
    assert order == []
    first.release()
    for thread in (large, small):
        thread.join(30)
    assert order == ["bcd", "e"]


@pytest.mark.slow
def test_leases_without_an_end_on_what_is_there_do_not_starve_who_needs_room() -> None:
    store, stop = filled(Store(20, timeout=2.0)), threading.Event()

    def hold_in_turns(number: int) -> None:
        while not stop.is_set():
            with store.lease(["a"]):
                time.sleep(0.02 + 0.01 * number)

    threads = [started(lambda n=n: hold_in_turns(n), lambda: store._busy) for n in range(3)]
    with store.lease(["b", "c"]) as lease:
        assert lease.values == {"b": "B", "c": "C"}
    stop.set()
    for thread in threads:
        thread.join(30)


def test_an_adapter_that_is_deleted_and_loaded_again_is_had_in_time() -> None:
    cache, stop = AdapterCache(10, timeout=2.0), threading.Event()
    cache.register("a", lambda: 0, 10)
    seen: list[int] = []

    def ask(_: int) -> None:
        while not stop.is_set():
            try:
                with cache.lease(["a"]) as lease:
                    seen.append(lease["a"])
                    time.sleep(0.01)
            except UsageError:  # just now there is none
                time.sleep(0)

    def come_and_go() -> None:
        for version in range(1, 20):
            cache.unregister("a")
            cache.register("a", lambda version=version: version, 10)
            with cache.lease(["a"]) as lease:
                assert lease["a"] == version
            time.sleep(0.01)

    def work(number: int) -> None:
        try:
            come_and_go() if number == 0 else ask(number)
        finally:
            if number == 0:
                stop.set()

    begun = time.monotonic()
    run_threads(6, work)
    assert time.monotonic() - begun < 20
    assert max(seen) >= 1


def test_a_lease_that_is_let_go_of_without_a_release_is_released() -> None:
    cache = filled(AdapterCache(10, timeout=5.0))
    cache.lease(["a"])
    with cache.lease(["b"]) as lease:
        assert lease["b"] == "B"
    assert cache.stats().nbytes == 10


def test_prefetched_adapters_are_there_when_they_are_asked_for() -> None:
    cache = filled(AdapterCache(30))
    assert [each.result(30) for each in cache.prefetch("abc")] == [True, True, True]
    assert cache.stats().misses == 0
    with cache.lease(["a", "b", "c"]):
        assert cache.prefetch(["d"])[0].result(30) is False
    assert (cache.stats().hits, cache.stats().misses) == (3, 0)


def test_a_prefetch_tells_the_error_it_met() -> None:
    cache = AdapterCache(10)

    def read() -> Any:
        raise OSError("bad disk")

    cache.register("a", read, 10)
    with pytest.raises(OSError, match="bad disk"):
        cache.prefetch(["a"])[0].result(30)
    assert cache.stats().nbytes == 0
