"""The demo from beginning to end."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.demo import story
from regraft.demo.compare import LogitComparison, Logits, compare_logits
from regraft.demo.data import HELD_OUT_WORDS, TRAIN_WORDS, make_examples
from regraft.demo.merging import Measured, run_merge, run_unmerge, same_files, time_copy
from regraft.demo.model import Base, get_base, weight_bytes
from regraft.demo.progress import Progress, silent
from regraft.demo.quiet import quiet_libraries, wait_asleep
from regraft.demo.result import DemoResult, Figures, Question
from regraft.demo.settings import Settings
from regraft.demo.state import DemoFolder
from regraft.demo.text import memory, seconds, size
from regraft.errors import MissingExtraError

if TYPE_CHECKING:
    from regraft.demo.training import Training

Say = Callable[[str], None]
"""Takes a piece of text to show, of one line or several."""


def _say_nothing(text: str) -> None:
    del text


HELD_OUT = make_examples(HELD_OUT_WORDS, 10, seed=1)
"""The sentences of the evaluation."""

SHOWN = 3
"""How many of them are shown in full."""

_NEEDED = ("torch", "transformers", "peft", "gguf", "accelerate")


def run_demo(
    folder: Path,
    *,
    fresh: bool = False,
    hub_id: str | None = None,
    as_json: bool = False,
    say: Say = _say_nothing,
    progress: Progress = silent,
) -> DemoResult:
    """Train an adapter on a real model, merge it, and compare the two models.

    Args:
        folder: where everything is made and kept; made if need be. A second run takes the base
            and the adapter from it.
        fresh: do everything again.
        hub_id: take the base from the Hub instead of from its PyPI wheel.
        as_json: say nothing; the caller shows the result's ``to_json()``.
        say: shows a piece of the story.
        progress: makes the bar of the training.

    Raises:
        MissingExtraError: a package of the ``demo`` extra is not installed.
        OutputExistsError: the folder holds something that no demo made.
        RegraftError: the model cannot be had, or the merge failed.
    """
    _require_extra()
    demo = _Demo(DemoFolder(folder), _say_nothing if as_json else say)
    demo.folder.open()
    wait_asleep()
    with quiet_libraries():
        return demo.run(hub_id, progress, fresh=fresh)


def _require_extra() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the demo needs {', '.join(missing)}", hint="Run pip install 'regraft[demo]'"
        )


@dataclass(frozen=True)
class _Live:
    """What the base and the live adapter model gave for the held-out sentences."""

    base: list[str]
    adapter: list[str]
    logits: Logits


@dataclass(frozen=True)
class _Merged:
    """What the merged model gave for them."""

    answers: list[str]
    logits: LogitComparison
    float32_logits: LogitComparison


@dataclass(frozen=True)
class _Back:
    """What un-merging gave."""

    seconds: float
    undo_bytes: int
    identical: bool


class _Demo:
    """One run: each method is a section of the story."""

    def __init__(self, folder: DemoFolder, say: Say) -> None:
        self.folder = folder
        self.say = say
        self.start = time.perf_counter()

    def run(self, hub_id: str | None, progress: Progress, *, fresh: bool) -> DemoResult:
        base = self.get_model(hub_id, fresh=fresh)
        training = self.train(base, progress, fresh=fresh)
        live = self.ask_adapter(base)
        measured = self.merge(base)
        merged = self.ask_merged(base, live)
        back = self.take_back(base, measured)
        copy_seconds = time_copy(base.path, self.folder.path / "copy.tmp")
        figures = self.count(base, training, measured, back, copy_seconds)
        result = self.conclude(base, training, live, merged, back, figures)
        self.say(story.heading(7, "Figures"))
        self.say(story.figures(result))
        return result

    def get_model(self, hub_id: str | None, *, fresh: bool) -> Base:
        self.say(story.heading(1, "A real language model, SmolLM2-135M-Instruct"))
        base = get_base(self.folder, hub_id, fresh=fresh)
        got = "got" if hub_id else "converted to bfloat16 safetensors"
        self.say(
            story.indented(
                f"from {base.source}",
                f"{base.path}: {story.made_or_kept(base.kept, got, base.seconds)}",
            )
        )
        return base

    def train(self, base: Base, progress: Progress, *, fresh: bool) -> Training:
        from regraft.demo.training import get_adapter

        settings = Settings()
        self.say(story.heading(2, "Training an adapter: from a sentence to its fields"))
        self.say(story.task(make_examples(TRAIN_WORDS, 1, settings.seed)[0]))
        training = get_adapter(self.folder, base, settings, progress, fresh=fresh)
        self.say(
            story.indented(
                f"LoRA of rank {settings.rank} on {training.modules} linear layers, "
                f"{training.parameters / 1e6:.1f} M parameters, "
                f"{settings.steps} steps of {settings.batch} sentences",
                f"loss from {training.first_loss:.2f} to {training.last_loss:.4f}",
                f"{self.folder.adapter}: "
                + story.made_or_kept(training.kept, "trained", training.seconds),
            )
        )
        return training

    def ask_adapter(self, base: Base) -> _Live:
        from regraft.demo.answers import Asker

        self.say(story.heading(3, "Sentences whose names, cities and jobs were not in training"))
        asker = Asker(base.path, self.folder.adapter)
        with asker.without_adapter():
            of_base = asker.answers(HELD_OUT)
        live = _Live(of_base, asker.answers(HELD_OUT), asker.logits(HELD_OUT))
        self.say(story.answered(HELD_OUT[:SHOWN], {"base": live.base, "adapter": live.adapter}))
        total = len(HELD_OUT)
        self.say(
            story.indented(
                f"Right to the letter, of {total} such sentences: the base {_right(live.base)}, "
                f"the adapter {_right(live.adapter)}."
            )
        )
        return live

    def merge(self, base: Base) -> Measured:
        self.say(story.heading(4, "Merging the adapter into the base"))
        paths = [str(base.path), str(self.folder.adapter), "-o", str(self.folder.merged)]
        self.say(story.indented(f"$ regraft merge {shlex.join(paths)} --overwrite"))
        measured = run_merge(base.path, self.folder.adapter, self.folder.merged)
        totals = measured.answer["totals"]
        self.say(
            story.indented(
                f"{totals['merged']} of {totals['tensors']} tensors merged in "
                f"{seconds(measured.seconds)}, peak memory {memory(measured.peak_memory)}",
                f"{self.folder.merged}: {size(weight_bytes(self.folder.merged))}",
            )
        )
        return measured

    def ask_merged(self, base: Base, live: _Live) -> _Merged:
        from regraft.demo.answers import Asker

        self.say(story.heading(5, "The merged model, loaded by transformers without PEFT"))
        asker = Asker(self.folder.merged)
        answers = asker.answers(HELD_OUT)
        logits = compare_logits(live.logits, asker.logits(HELD_OUT))
        same = sum(a == b for a, b in zip(answers, live.adapter, strict=True))
        self.say(story.answered(HELD_OUT[:SHOWN], {"merged": answers}))
        self.say(
            story.indented(
                f"Right to the letter: {_right(answers)} of {len(HELD_OUT)}. "
                f"The same answer as the adapter's: {same} of {len(HELD_OUT)}."
            )
        )
        del asker
        float32_logits = self.compare_float32(base, live)
        self.say(story.agreement(logits, float32_logits))
        return _Merged(answers, logits, float32_logits)

    def compare_float32(self, base: Base, live: _Live) -> LogitComparison:
        """Merge once more without the rounding to the base's dtype, compare, and remove it."""
        from regraft.demo.answers import Asker

        out = self.folder.path / "merged-float32.tmp"
        run_merge(base.path, self.folder.adapter, out, "--dtype", "float32")
        comparison = compare_logits(live.logits, Asker(out).logits(HELD_OUT))
        shutil.rmtree(out)
        return comparison

    def take_back(self, base: Base, merging: Measured) -> _Back:
        """Get the base out of the merged model, compare it, and remove it."""
        self.say(story.heading(6, "Taking the merge back, without the base"))
        out = self.folder.path / "base-again.tmp"
        self.say(
            story.indented(f"$ regraft unmerge {shlex.join([str(self.folder.merged)])} -o ...")
        )
        measured = run_unmerge(self.folder.merged, out)
        back = _Back(
            measured.seconds, merging.answer["totals"]["undo_bytes"], same_files(base.path, out)
        )
        shutil.rmtree(out)
        self.say(story.taken_back(back.identical, back.seconds, back.undo_bytes))
        return back

    def count(
        self, base: Base, training: Training, measured: Measured, back: _Back, copy_seconds: float
    ) -> Figures:
        return Figures(
            base_bytes=weight_bytes(base.path),
            adapter_bytes=weight_bytes(self.folder.adapter),
            merged_bytes=weight_bytes(self.folder.merged),
            get_model_seconds=base.seconds,
            train_seconds=training.seconds,
            merge_seconds=measured.seconds,
            copy_seconds=copy_seconds,
            total_seconds=time.perf_counter() - self.start,
            merge_peak_memory=measured.peak_memory,
            undo_bytes=back.undo_bytes,
            unmerge_seconds=back.seconds,
        )

    def conclude(
        self, base: Base, training: Training, live: _Live, merged: _Merged, back: _Back,
        figures: Figures,
    ) -> DemoResult:  # fmt: skip
        answers = zip(HELD_OUT, live.base, live.adapter, merged.answers, strict=True)
        return DemoResult(
            folder=self.folder.path,
            base=base.path,
            adapter=self.folder.adapter,
            merged=self.folder.merged,
            source=base.source,
            kept_base=base.kept,
            kept_adapter=training.kept,
            first_loss=training.first_loss,
            last_loss=training.last_loss,
            questions=tuple(Question(e.sentence, e.answer, b, a, m) for e, b, a, m in answers),
            logits=merged.logits,
            float32_logits=merged.float32_logits,
            restored=back.identical,
            figures=figures,
        )


def _right(answers: list[str]) -> int:
    return sum(a == e.answer for a, e in zip(answers, HELD_OUT, strict=True))
