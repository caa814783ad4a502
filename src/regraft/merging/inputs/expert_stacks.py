"""Which way the factors of a stack of experts lie, where sizes do not tell.

Of a stack (experts, n, m) PEFT up to 0.18 made A (experts * r, n) and B (m, experts * r). From
0.19.1 on A is (experts * r, m) and B (n, experts * r), but for modules that store (in, out) and say
so (``is_transposed``). 0.19.0 had this condition the wrong way round, unless transformers mended
it (PEFT's ``ParamWrapper.update_layer``). Where n equals m, the shapes are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from regraft.adapters.model import Adapter
from regraft.errors import Problem, UsageError
from regraft.formats.adapter_files import AdapterFiles

Orientation = bool
"""Whether a stack is stored (experts, in, out) as seen from its factors A (.., in), B (out, ..)."""

_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?!\d)(.*)", re.DOTALL)
_LAST_OLD, _FIRST_NEW = (0, 18), (0, 19, 1)

WAY_ON = (
    "Say which PEFT trained it: --peft-version 0.18.0 (in Python peft_version) for 0.17 and 0.18, "
    '0.19.1 for 0.19.1 and later; or write it into adapter_config.json, as "peft_version"'
)


@dataclass(frozen=True)
class StackOrientation:
    """What is known of the stacks of one adapter beside their sizes.

    Attributes:
        adapter: the adapter.
        siblings: gives the orientation of each of its stacks that sizes tell; asked at most once.
    """

    adapter: Adapter
    siblings: Callable[[], Iterable[Orientation]]

    @cached_property
    def _seen(self) -> frozenset[Orientation]:
        return frozenset(self.siblings())

    def of_square(self, is_transposed: bool | None) -> Orientation | None:
        """Return the orientation of a stack whose sizes do not tell; None where nothing tells.

        Args:
            is_transposed: whether its module is known to store (in, out); None if not known.
        """
        if len(self._seen) == 1:
            return next(iter(self._seen))
        return by_version(self.adapter.settings.peft_version, is_transposed)

    def refused(self, where: str) -> Problem:
        """Return the refusal of a stack that nothing tells the orientation of."""
        version = self.adapter.settings.peft_version
        return Problem(
            "it cannot be told which way these factors of square experts lie: PEFT turned them "
            "round in 0.19", where, "a peft_version, of a release other than 0.19.0",
            version or "none", WAY_ON,
        )  # fmt: skip


def by_version(version: str | None, is_transposed: bool | None) -> Orientation | None:
    """Return the orientation that a release of PEFT gives a stack; None where it is not known.

    Args:
        version: ``peft_version`` of the config, such as ``"0.18.1"``.
        is_transposed: whether the module is known to store (in, out); None if not known.
    """
    release = _release(version)
    if release is not None and release[:2] <= _LAST_OLD:
        return True
    if release is not None and release >= _FIRST_NEW:
        return bool(is_transposed)
    # Neither is known: the two rules agree where a module stores (in, out).
    return True if is_transposed and version is None else None


def check_version(version: str | None) -> None:
    """Refuse what does not tell the orientation of a stack.

    Raises:
        UsageError: it is no release, or one that made both.
    """
    if version is not None and (not isinstance(version, str) or _release(version) is None):
        raise UsageError(
            "no release of PEFT that turns stacks of experts one way", where="--peft-version",
            expected="such as 0.18.0, or 0.19.1 for any later one", found=repr(version)[:40],
        )  # fmt: skip


def with_version(files: AdapterFiles, version: str | None) -> AdapterFiles:
    """Return an adapter whose config says which PEFT trained it, where it does not by itself.

    Args:
        files: the adapter.
        version: the release that is told; None for none.
    """
    own = files.config.get("peft_version")
    if version is None or (isinstance(own, str) and _release(own) is not None):
        return files
    return replace(files, config={**files.config, "peft_version": version})


def _release(version: str | None) -> tuple[int, int, int] | None:
    """Return a release as numbers; None for none, for 0.19.0, and for what lies between them."""
    match = _VERSION.match(version or "")
    if match is None:
        return None
    release = (int(match[1]), int(match[2]), int(match[3] or 0))
    before = "dev" in match[4] and release in ((0, 18, 2), (0, 19, 0), _FIRST_NEW)
    return None if before or release == (0, 19, 0) else release
