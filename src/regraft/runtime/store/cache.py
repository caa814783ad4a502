"""More adapters than fit: the hot ones lie beside the model, the others in memory or on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from regraft.errors import UsageError
from regraft.runtime.store.leases import Lease, Store
from regraft.tensors import parse_size

Item = Any
"""What a live model keeps of an adapter: its tensors, and what follows from them alone."""

HOST_TIMES = 4
"""How much larger than the device's part the host's is, unless it is said.

Main memory is a few times that of the device in most machines. A number that depends on what is
free just now would make the same program behave differently from run to run, and without a limit
a thousand adapters would push out everything else.
"""


@dataclass(frozen=True)
class CacheStats:
    """Counts of an adapter cache so far, and the bytes in it now.

    Attributes:
        hits: how often an adapter that was asked for was there. Pins and prefetches do not count.
        misses: how often it was not, and had to be loaded or waited for.
        evictions: how many adapters were dropped to make room for others.
        reads: how often an adapter was read from disk.
        nbytes: the bytes of the adapters that are there now.
        peak_bytes: the most they ever were.
        host_bytes: the bytes of the copies in host memory; 0 where the model lies there itself.
    """

    hits: int
    misses: int
    evictions: int
    reads: int
    nbytes: int
    peak_bytes: int
    host_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits among all that was asked for; 0 before anything was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class AdapterCache:
    """Adapters of a live model within a cap, for any number of threads.

    ``regraft.attach(model, cache=AdapterCache("1GiB"))`` reads only headers when an adapter is
    loaded. Its tensors come to the model's device when they are first used, and go again, the
    longest unused first, when others need the room. An adapter in use is never dropped: whoever
    uses one holds a lease on it, and the bytes under lease count. On a device of its own the cache
    also keeps copies in host memory, so that an adapter that comes back is not read again. On a CPU
    the two are the same memory, and there is only one part.
    """

    def __init__(
        self,
        max_bytes: int | str,
        *,
        host_bytes: int | str | None = None,
        timeout: float = 30.0,
        threads: int = 2,
    ) -> None:
        """Make an empty cache.

        Args:
            max_bytes: cap on the adapters' bytes on the device, such as ``2**30`` or ``"1GiB"``.
            host_bytes: cap on the copies in host memory; 0 for none, None for four times
                ``max_bytes``.
            timeout: seconds that a use waits for room while all of it is in use by other threads.
            threads: how many adapters are loaded at once by :meth:`prefetch`.

        Raises:
            UsageError: a size is not one.
        """
        self.max_bytes = _size("max_bytes", max_bytes)
        default = HOST_TIMES * self.max_bytes
        self.host_bytes = default if host_bytes is None else _size("host_bytes", host_bytes)
        self._device: Store[Item] = Store(self.max_bytes, timeout)
        self._host: Store[Item] = Store(self.host_bytes, 0.0)
        self._pins: dict[str, Lease[Item]] = {}
        self._reads = 0
        self._lock = threading.Lock()  # guards the pins and the count of reads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="regraft-prefetch")

    def register(
        self,
        name: str,
        read: Callable[[], Item],
        nbytes: int,
        place: Callable[[Item], Item] | None = None,
    ) -> None:
        """Make an adapter known; nothing is read yet.

        Args:
            name: what it will be asked for by.
            read: reads it into host memory; it may be called again, by any thread, one at a time.
            nbytes: the bytes of its tensors.
            place: copies it to the device; None where the model lies in host memory.

        Raises:
            UsageError: the name is taken, also by an adapter of another model on this cache.
        """
        load = self._counted(read)
        if place is None:
            self._device.register(name, load, nbytes)
            return
        self._device.register(name, lambda: self._placed(name, load, place), nbytes)
        self._host.register(name, load, nbytes)

    def unregister(self, name: str) -> None:
        """Forget an adapter; whoever has a lease on it keeps it until the release.

        Raises:
            UsageError: the name is not known.
        """
        self._device.unregister(name)
        self._unpinned(name)
        if name in self._host.names():
            self._host.unregister(name)

    def lease(self, names: Sequence[str]) -> Lease[Item]:
        """Return some adapters, which stay loaded until the lease is released.

        Room is taken for all of them at once. If it is lacking because other threads use theirs,
        this waits up to ``timeout`` seconds, first come, first served.

        Raises:
            UsageError: a name is not known.
            MemoryCapError: they do not fit beside what is pinned, selected or leased by this thread
                (at once), or by others (after the wait).
            RegraftError: an adapter could not be read.
        """
        return self._device.lease(names)

    def pin(self, name: str) -> None:
        """Load an adapter and keep it until :meth:`unpin`; a second time does nothing.

        Raises:
            UsageError: the name is not known.
            MemoryCapError: there is no room for it.
            RegraftError: it could not be read.
        """
        lease = self._device.lease([name], counted=False)
        lease.keep()
        with self._lock:
            kept = self._pins.setdefault(name, lease)
        if kept is not lease:
            lease.release()

    def unpin(self, name: str) -> None:
        """Let a pinned adapter go when room is needed.

        Raises:
            UsageError: it is not pinned.
        """
        if not self._unpinned(name):
            raise UsageError("the adapter is not pinned", where=name)

    def prefetch(self, names: Sequence[str]) -> list[Future[bool]]:
        """Load adapters in the background, in their order, as far as there is room.

        What is in use or pinned stays; of the rest, the longest unused goes, so more names than
        fit push out the first of them.

        Returns:
            One future per name: whether it was loaded, or the error that reading it raised. Using
            the adapter later tries again.

        Raises:
            UsageError: a name is not known.
        """
        unknown = [name for name in names if name not in self._device.names()]
        if unknown:
            raise UsageError("there is no adapter of this name", where=", ".join(unknown))
        return [self._pool.submit(self._fetch, name) for name in names]

    def loaded(self) -> tuple[str, ...]:
        """Return the names of the adapters whose tensors are on the device now."""
        return self._device.loaded()

    def stats(self) -> CacheStats:
        """Return the figures up to now."""
        device = self._device
        for store in (device, self._host):
            store.settle()
        return CacheStats(
            device.hits, device.misses, device.evictions, self._reads, device.nbytes,
            device.peak_bytes, self._host.nbytes,
        )  # fmt: skip

    def _fetch(self, name: str) -> bool:
        lease = self._device.try_lease([name], counted=False)
        if lease is None:
            return False
        lease.release()
        return True

    def _unpinned(self, name: str) -> bool:
        with self._lock:
            lease = self._pins.pop(name, None)
        if lease is not None:
            lease.release()
        return lease is not None

    def _counted(self, read: Callable[[], Item]) -> Callable[[], Item]:
        def load() -> Item:
            with self._lock:
                self._reads += 1
            return read()

        return load

    def _placed(
        self,
        name: str,
        load: Callable[[], Item],
        place: Callable[[Item], Item],
    ) -> Item:
        """Return an adapter on the device, by way of its copy in host memory if there is room."""
        try:
            lease = self._host.try_lease([name])
        except UsageError:  # it has been forgotten since it was leased on the device
            lease = None
        if lease is None:
            return place(load())
        with lease:
            return place(lease[name])


def _size(name: str, size: int | str) -> int:
    if size == 0 and name == "host_bytes":
        return 0
    try:
        return parse_size(size)
    except ValueError as error:
        raise UsageError(str(error), where=name) from None
