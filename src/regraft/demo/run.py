"""The demo from beginning to end."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.demo.progress import Progress, silent
from regraft.demo.quiet import quiet_libraries, wait_asleep
from regraft.demo.state import DemoFolder
from regraft.demo.steps.compare import LogitComparison, Logits, compare_logits
from regraft.demo.steps.lessons import LESSONS, MERGED
from regraft.demo.steps.merging import Measured, run_merge, run_unmerge, same_files, time_copy
from regraft.demo.steps.model import Base, get_base, weight_bytes
from regraft.demo.telling import story
from regraft.demo.telling.conclusion import DemoFindings, conclude
from regraft.demo.telling.result import DemoResult, Training
from regraft.demo.telling.text import memory, milliseconds, seconds, size
from regraft.errors import MissingExtraError
from regraft.merging.files.publish import out_path

if TYPE_CHECKING:
    from regraft.demo.steps.live import Answers, InMemory, LiveModel, Switched

Say = Callable[[str], None]
"""Takes a piece of text to show, of one line or several."""


def _say_nothing(text: str) -> None:
    del text


SHOWN = 2
"""How many of the held-out sentences are shown in full."""

_NEEDED = ("torch", "transformers", "bitsandbytes", "gguf", "accelerate")


def run_demo(
    folder: Path,
    *,
    fresh: bool = False,
    hub_id: str | None = None,
    as_json: bool = False,
    say: Say = _say_nothing,
    progress: Progress = silent,
) -> DemoResult:
    """Train two adapters on a real model, use them live, merge one, and compare.

    Args:
        folder: where everything is made and kept; made if need be. A second run takes the base
            and the adapters from it.
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
    demo = _Demo(DemoFolder(out_path(folder)), _say_nothing if as_json else say)
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
    """What the base in memory gave, with its adapters."""

    model: LiveModel
    switched: Switched
    rows: dict[str, str]
    logits: Logits


class _Demo:
    """One run: each method is a section of the story."""

    def __init__(self, folder: DemoFolder, say: Say) -> None:
        self.folder = folder
        self.say = say
        self.start = time.perf_counter()
        self.sentences = [example.sentence for example in MERGED.held_out()]
        self.right = {
            lesson.name: [example.answer for example in lesson.held_out()] for lesson in LESSONS
        }
        self.adapter = folder.adapter(MERGED.name)

    def run(self, hub_id: str | None, progress: Progress, *, fresh: bool) -> DemoResult:
        base = self.get_model(hub_id, fresh=fresh)
        training = self.train(base, progress, fresh=fresh)
        live = self.switch(base)
        four_bits, four_bits_bytes = self.ask_four_bits(base)
        in_memory = self.merge_in_memory(live)
        measured = self.merge(base)
        merged, logits, float32_logits = self.ask_merged(base, live)
        restored, unmerging = self.take_back(base, measured)
        found = DemoFindings(
            folder=self.folder,
            base=base,
            training=training,
            sentences=self.sentences,
            right=self.right,
            switched=live.switched,
            rows=live.rows,
            load_seconds=live.model.load_seconds,
            four_bits=four_bits,
            four_bits_bytes=four_bits_bytes,
            in_memory=in_memory,
            merging=measured,
            merged=merged,
            logits=logits,
            float32_logits=float32_logits,
            restored=restored,
            unmerging=unmerging,
            copy_seconds=time_copy(base.path, self.folder.path / "copy.tmp"),
            total_seconds=time.perf_counter() - self.start,
        )
        result = conclude(found)
        self.say(story.heading(9, "Figures"))
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

    def train(self, base: Base, progress: Progress, *, fresh: bool) -> dict[str, Training]:
        from regraft.demo.steps.training import get_adapter

        self.say(
            story.heading(2, "Training two adapters, each with a form of its own to answer in")
        )
        self.say(story.task())
        training: dict[str, Training] = {}
        for lesson in LESSONS:
            self.say(story.lesson(lesson, str(self.folder.adapter(lesson.name))))
            came_to = get_adapter(self.folder, base, lesson, progress, fresh=fresh)
            self.say(story.trained(came_to))
            training[lesson.name] = came_to
        return training

    def switch(self, base: Base) -> _Live:
        from regraft.demo.steps.live import LiveModel

        self.say(story.heading(3, "One base in memory, both adapters on it"))
        model = LiveModel(base.path, self.folder)
        self.say(story.attaching({each.name: self.folder.adapter(each.name) for each in LESSONS}))
        switched = model.switched(self.sentences)
        self.say(
            story.indented(
                f"Both were loaded in {milliseconds(model.load_seconds)}; "
                f"adapters.set_adapter(name) takes {milliseconds(switched.switch_seconds)}.",
                "The names, cities and jobs in these sentences were not in training:",
            )
        )
        answers = {"base": switched.base, **switched.adapters}
        self.say(story.answered(self.sentences[:SHOWN], answers, self.right))
        self.say(self.score(answers))
        rows = self.ask_rows(model)
        return _Live(model, switched, rows, model.logits(MERGED.name, MERGED.held_out()))

    def ask_rows(self, model: LiveModel) -> dict[str, str]:
        """Ask one sentence in a batch whose rows have different adapters."""
        names = [None, *(lesson.name for lesson in LESSONS)]
        sentence = self.sentences[SHOWN]
        answers = model.by_row(names, [sentence] * len(names))
        rows = dict(zip([name or "base" for name in names], answers, strict=True))
        self.say(story.rows(names))
        right = {name: [answers[SHOWN]] for name, answers in self.right.items()}
        self.say(story.answered([sentence], {name: [text] for name, text in rows.items()}, right))
        return rows

    def ask_four_bits(self, base: Base) -> tuple[Answers, int]:
        from regraft.demo.steps.live import LiveModel

        self.say(story.heading(4, "The same adapters on the base in 4 bits (bitsandbytes, NF4)"))
        self.say(
            story.code(
                "model = AutoModelForCausalLM.from_pretrained(..., "
                'quantization_config=nf4, device_map="cpu")'
            )
        )
        model = LiveModel(base.path, self.folder, four_bits=True)
        answers = model.all_by_row(self.sentences)
        self.say(
            story.indented(
                "and both attached as before, though they were trained on the base in 16 bits.",
                f"All in one batch of {len(LESSONS) * len(self.sentences)} rows:",
            )
        )
        self.say(story.answered(self.sentences[:1], answers, self.right))
        self.say(self.score(answers))
        return answers, model.nbytes

    def merge_in_memory(self, live: _Live) -> InMemory:
        self.say(story.heading(5, "Merged in memory, and taken out again"))
        self.say(story.code(f'adapters.merge_adapter("{MERGED.name}")'))
        found = live.model.merged_in_memory(MERGED.name, self.sentences)
        alone = live.switched.adapters[MERGED.name]
        self.say(
            story.indented(
                f"in {seconds(found.merge_seconds)}. The same answer as before it was merged: "
                f"{_same(found.answers, alone)} of {len(alone)}."
            )
        )
        self.say(story.code("adapters.unmerge_adapter()"))
        self.say(
            story.back_in_memory(
                found.restored,
                found.tensors,
                found.changed,
                found.unmerge_seconds,
                found.undo_bytes,
            )
        )
        return found

    def merge(self, base: Base) -> Measured:
        self.say(story.heading(6, "Merged on files, without torch"))
        paths = [str(base.path), str(self.adapter), "-o", str(self.folder.merged)]
        self.say(story.indented(f"$ regraft merge {shlex.join(paths)} --overwrite"))
        measured = run_merge(base.path, self.adapter, self.folder.merged)
        totals = measured.answer["totals"]
        self.say(
            story.indented(
                f"{totals['merged']} of {totals['tensors']} tensors merged in "
                f"{seconds(measured.seconds)}, peak memory {memory(measured.peak_memory)}",
                f"{self.folder.merged}: {size(weight_bytes(self.folder.merged))}",
            )
        )
        return measured

    def ask_merged(
        self, base: Base, live: _Live
    ) -> tuple[list[str], LogitComparison, LogitComparison]:
        from regraft.demo.steps.answers import Asker

        self.say(story.heading(7, "The merged model, loaded by transformers and nothing else"))
        asker = Asker(self.folder.merged)
        answers = asker.answers(self.sentences)
        logits = compare_logits(live.logits, asker.logits(MERGED.held_out()))
        del asker
        right = self.right[MERGED.name]
        alone = live.switched.adapters[MERGED.name]
        self.say(story.answered(self.sentences[:SHOWN], {"merged": answers}, {"merged": right}))
        self.say(
            story.indented(
                f"Right to the letter: {_same(answers, right)} of {len(answers)}. "
                f"The same answer as the adapter's: {_same(answers, alone)} of {len(answers)}."
            )
        )
        float32_logits = self.compare_float32(base, live)
        self.say(story.agreement(logits, float32_logits))
        return answers, logits, float32_logits

    def compare_float32(self, base: Base, live: _Live) -> LogitComparison:
        """Merge once more without the rounding to the base's dtype, compare, and remove it."""
        from regraft.demo.steps.answers import Asker

        out = self.folder.path / "merged-float32.tmp"
        run_merge(base.path, self.adapter, out, "--dtype", "float32")
        comparison = compare_logits(live.logits, Asker(out).logits(MERGED.held_out()))
        shutil.rmtree(out)
        return comparison

    def take_back(self, base: Base, merging: Measured) -> tuple[bool, Measured]:
        """Get the base out of the merged model, compare it, and remove it."""
        self.say(story.heading(8, "The merge on files taken back, without the base"))
        out = self.folder.path / "base-again.tmp"
        self.say(
            story.indented(f"$ regraft unmerge {shlex.join([str(self.folder.merged)])} -o ...")
        )
        measured = run_unmerge(self.folder.merged, out)
        identical = same_files(base.path, out)
        shutil.rmtree(out)
        undo_bytes = merging.answer["totals"]["undo_bytes"]
        self.say(story.taken_back(identical, measured.seconds, undo_bytes))
        return identical, measured

    def score(self, answers: dict[str, list[str]]) -> str:
        """Return how many answers are right; of the base, those right in any form."""
        right = {name: _same(texts, self.right[name]) for name, texts in answers.items()
                 if name in self.right}  # fmt: skip
        if "base" in answers:
            of_base = [_same(answers["base"], texts) for texts in self.right.values()]
            right = {"base": sum(of_base), **right}
        return story.score(right, len(self.sentences))


def _same(texts: Sequence[str], others: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(texts, others, strict=True))
