"""The digests of a model's tensors, kept for later work: what is known need not be hashed again.

digest -> open the model by its headers -> hash what is not known -> keep the digests
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.concurrency import default_threads, for_each
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.files.known_digests import KnownDigests, Range
from regraft.formats.files.reading import FilePool
from regraft.formats.files.watching import watched
from regraft.formats.hub import locate
from regraft.merging.options import MergeOptions
from regraft.progress import Progress, ProgressMeter, tell
from regraft.tensors import TensorSpec


@dataclass(frozen=True)
class DigestReport:
    """The digests of a model's stored tensors.

    Attributes:
        source: the model, as it was named.
        tensors: blake3 (hex) of each tensor's bytes, by its name in the file.
        known: how many were known.
        nbytes: bytes of all tensors.
        kept: whether all are known from now on.
        seconds: wall time.
    """

    source: str
    tensors: dict[str, str]
    known: int
    nbytes: int
    kept: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready objects."""
        return asdict(self)


@watched(to_the_end=True)
def digest(
    base: str | Path,
    *,
    threads: int | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> DigestReport:
    """Return the blake3 of every tensor of a model, and keep them for later work.

    A later merge, or other work, that is told to use them (``digest_cache``) takes them from here
    for files that are then as they are now. They are kept in ``~/.cache/regraft``, or where
    ``REGRAFT_CACHE`` says.

    Args:
        base: a folder, a single weights file, or a Hub id ``org/name[@revision]``; plain or
            quantized.
        threads: worker threads; by default three more than there are cores at hand.
        token: Hub token; by default the one the machine is logged in with.
        progress: called as work proceeds.

    Raises:
        RegraftError: it cannot be opened or read, or was changed meanwhile.
    """
    started = time.perf_counter()
    count = MergeOptions.of(threads=threads).threads or default_threads()
    tell(progress, "read", 0)
    stored = open_checkpoint(locate(base, kind="base", token=token))
    known, specs = KnownDigests.of_user(), list(stored.tensors.values())
    found = {spec.name: known.of(spec) for spec in specs}
    left = [spec for spec in specs if found[spec.name] is None]
    hashed = _hashed(left, count, ProgressMeter(progress, "digest", sum(s.nbytes for s in left)))
    by_file = defaultdict[Path, dict[Range, str]](dict)
    for spec in left:
        by_file[spec.path][spec.start, spec.nbytes] = hashed[spec.name]
    kept = [known.remember(path, digests) for path, digests in by_file.items()]
    return DigestReport(
        source=stored.source,
        tensors={name: of or hashed[name] for name, of in found.items()},
        known=len(specs) - len(left),
        nbytes=sum(spec.nbytes for spec in specs),
        kept=all(kept),
        seconds=time.perf_counter() - started,
    )


def _hashed(specs: list[TensorSpec], threads: int, told: ProgressMeter) -> dict[str, str]:
    """Return the digests of tensors, each of which one thread reads and hashes."""
    found: dict[str, str] = {}
    with FilePool() as files:

        def work(spec: TensorSpec, _: None) -> None:
            found[spec.name] = files.digest(spec)  # one thread's, and a name of its own: no lock
            told.add(spec.nbytes, spec.name)

        for_each(specs, work, threads, memory=lambda: None)
    return found
