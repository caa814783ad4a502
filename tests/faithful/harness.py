"""What a faithfulness test is made of: a case, the workshop that makes its files, the check."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import regraft
from regraft.testing import zoo
from regraft.testing.adapters import Prepare, live_logits, make_adapter

TOLERANCE = 1e-4
"""Largest difference from the live model's logits, as a share of their range."""

VISIBLE = 1e-2
"""Least change an adapter has to make to the base's logits, as a share of their range."""


@dataclass(frozen=True)
class Case:
    """One adapter (or several) on one architecture.

    Attributes:
        architecture: a name of the zoo.
        feature: what is tested, as a part of the test's id.
        configs: fields of each adapter's ``LoraConfig``.
        weights: the factor on each adapter; None leaves them out of the call.
        dtype: the stored dtype of the base.
        sharded: whether the base is split over several files.
        prepare: what training did to the base before the adapter went on.
        expect: logits of the truth where PEFT's live model is known to be wrong.
        inputs: changes the example inputs, so that what is adapted is used.
        tolerance: largest difference of logits allowed, as a share of their range.
    """

    architecture: str
    feature: str
    configs: tuple[Mapping[str, Any], ...]
    weights: tuple[float, ...] | None = None
    dtype: str = "bfloat16"
    sharded: bool = False
    prepare: Prepare | None = None
    expect: Callable[[Path, Sequence[Path], dict[str, Any]], np.ndarray] | None = None
    inputs: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    tolerance: float = TOLERANCE

    @property
    def id(self) -> str:
        """The test's id."""
        return f"{self.architecture}-{self.feature}"

    def example_inputs(self) -> dict[str, Any]:
        """Return the forward arguments this case is compared on."""
        inputs = zoo.example_inputs(self.architecture)
        return self.inputs(inputs) if self.inputs else inputs


class Workshop:
    """Makes bases and adapters on first use and keeps them for the session.

    Args:
        folder: this process's own.
        shared: where processes that test at the same time have bases and adapters together.
    """

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        self.folder, self.shared = folder, shared or folder
        self._numbers = itertools.count()
        self._logits: dict[Any, np.ndarray] = {}

    def base(self, architecture: str, dtype: str = "bfloat16", sharded: bool = False) -> Path:
        """Return the folder of a base checkpoint."""
        folder = self.shared / f"{architecture}-{dtype}{'-sharded' if sharded else ''}"
        size = "4KB" if sharded else None
        return self.made(folder, lambda new: zoo.make_base(architecture, new, dtype, size))

    def made(self, folder: Path, make: Callable[[Path], Any]) -> Path:
        """Return a folder; if it is not there yet, it appears whole, whoever else makes it."""
        if not folder.exists():
            new = self.fresh("new")
            make(new)
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(folder)
        return folder

    def adapters(self, case: Case) -> list[Path]:
        """Return the folders of the case's adapters."""
        base = self.base(case.architecture, case.dtype, case.sharded)
        return [
            self.adapter(base, config, seed=number + 1, prepare=case.prepare)
            for number, config in enumerate(case.configs)
        ]

    def adapter(
        self, base: Path, config: Mapping[str, Any], seed: int = 1, prepare: Prepare | None = None
    ) -> Path:
        """Return the folder of one adapter, made once for the same arguments."""
        from peft import LoraConfig

        what = f"{sorted(config.items(), key=str)} {seed} {prepare and prepare.__qualname__}"
        key = hashlib.sha256(what.encode()).hexdigest()[:12]
        folder = self.shared / f"{base.name}-adapter-{key}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.made(
                folder, lambda new: make_adapter(base, new, LoraConfig(**config), seed, prepare)
            )

    def plain_logits(self, base: Path, inputs: dict[str, Any]) -> np.ndarray:
        """Return what a base answers without an adapter, asked once for the same arguments."""
        key = (base, _spelled(inputs))
        return self._known(key, lambda: zoo.logits(zoo.load_base(base), inputs))

    def live_logits(
        self, base: Path, adapters: Sequence[Path], inputs: dict[str, Any],
        weights: Sequence[float] | None = None, prepare: Prepare | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Return what PEFT's live model answers, asked once for the same arguments.

        The folders are those of this workshop, whose content stays.
        """
        key = (base, _spelled(inputs), tuple(adapters), weights and tuple(weights), prepare)
        return self._known(key, lambda: live_logits(base, adapters, inputs, weights, prepare))

    def _known(self, key: Any, ask: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self._logits:
            self._logits[key] = ask()
            self._logits[key].flags.writeable = False
        return self._logits[key]

    def fresh(self, name: str) -> Path:
        """Return a path in the workshop where nothing is yet."""
        return self.folder / f"{name}-{next(self._numbers)}"


def _spelled(inputs: dict[str, Any]) -> str:
    return str(sorted((name, tensor.tolist()) for name, tensor in inputs.items()))


def merge_and_load(
    base: Path, adapters: Any, out: Path, architecture: str, dtype: str = "float32"
) -> Any:
    """Merge with regraft, load the result as a user would, and check that the load was complete.

    One thread merges: a second costs more than such a model takes.
    """
    regraft.merge(base, adapters, out, dtype=dtype, threads=1)
    return load_complete(out, architecture)


def load_complete(folder: Path, architecture: str) -> Any:
    """Load a checkpoint by its Auto class; fail if a tensor was missing, left over or misshapen."""
    import transformers

    auto = zoo.ARCHITECTURES[architecture].auto
    loader = getattr(transformers, auto) if auto else zoo.model_class(folder)
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {info[kind]}"
    return model.eval()


def assert_faithful(case: Case, workshop: Workshop) -> np.ndarray:
    """Merge the case's adapters at float32 and compare with the live model, logit by logit.

    Returns:
        The live model's logits.
    """
    base = workshop.base(case.architecture, case.dtype, case.sharded)
    adapters = workshop.adapters(case)
    inputs = case.example_inputs()
    expected = expected_logits(case, workshop, base, adapters, inputs)
    assert_visible(expected, workshop.plain_logits(base, _within_base(inputs)))
    merged = merge_and_load(
        base, _argument(case, adapters), workshop.fresh("merged"), case.architecture
    )
    assert_close(zoo.logits(merged, inputs), expected, case.tolerance)
    return expected


def expected_logits(
    case: Case, workshop: Workshop, base: Path, adapters: list[Path], inputs: dict[str, Any]
) -> np.ndarray:
    """Return the truth: what the live model answers, unless the case says otherwise."""
    if case.expect is not None:
        return case.expect(base, adapters, inputs)
    return workshop.live_logits(base, adapters, inputs, case.weights, case.prepare)


def _argument(case: Case, adapters: list[Path]) -> Any:
    if case.weights is not None:
        return list(zip(adapters, case.weights, strict=True))
    return adapters if len(adapters) > 1 else adapters[0]


def _within_base(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with the ids that only a grown vocabulary has replaced."""
    if "input_ids" not in inputs:
        return inputs
    return inputs | {"input_ids": inputs["input_ids"].clamp(max=zoo.VOCAB - 1)}


def assert_visible(adapted: np.ndarray, base: np.ndarray) -> None:
    """Fail unless the adapter changes the logits, so that a merge that does nothing cannot pass."""
    shared = min(adapted.shape[-1], base.shape[-1])
    change = np.abs(adapted[..., :shared] - base[..., :shared]).max()
    assert change > VISIBLE * np.ptp(base), f"the adapter moves the logits by only {change:g}"


def assert_close(merged: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Fail unless ``merged`` is within ``tolerance`` of the range of ``expected``."""
    assert merged.shape == expected.shape
    assert np.isfinite(expected).all()
    error = np.abs(merged - expected).max() / np.ptp(expected)
    assert error <= tolerance, f"logits differ by {error:.2e} of their range"
