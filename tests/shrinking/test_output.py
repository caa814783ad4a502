"""What else goes along, what is refused, and how the output comes into place."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from merging.processes import python
from regraft.errors import (
    AdapterError,
    DiskSpaceError,
    InputError,
    NumericError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from regraft.formats.safetensors import read_header
from regraft.shrinking import verb
from shrinking.small import (
    MODULES,
    OUT,
    RANK,
    STACK,
    WIDTH,
    config_of,
    lowrank,
    stack,
    with_copies,
    write_adapter,
)

# -- what else is in the folder


def test_everything_but_the_state_of_training_goes_along(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    along = {
        "README.md": b"---\nbase_model: x\n---\n# card\xc3\xa9",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"chat_template": "x"}',
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "LICENSE": b"mine",
        "additional_chat_templates/tool.jinja": b"{{ y }}",
    }
    behind = ("optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "runs/x")
    for name, content in {**along, **dict.fromkeys(behind, b"z")}.items():
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_bytes(content)
    report = regraft.shrink(adapter, tmp_path / "s")
    found = toys.tree(tmp_path / "s")
    assert found.pop("README.md").startswith(along.pop("README.md"))
    assert {n: c for n, c in found.items() if n in along} == along
    written = {"adapter_config.json", "adapter_model.safetensors", "additional_chat_templates"}
    assert found.keys() == along.keys() | written
    assert report.files == tuple(sorted([*along, "README.md"]))
    assert report.left_out == tuple(sorted([*behind[:-1], "runs/"]))


def test_a_weights_file_may_be_named(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    regraft.shrink(adapter, tmp_path / "one" / "s")
    regraft.shrink(adapter / "adapter_model.safetensors", tmp_path / "two" / "s")
    assert toys.tree(tmp_path / "one") == toys.tree(tmp_path / "two")


def test_the_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    for name in ("one", "two"):
        regraft.shrink(adapter, tmp_path / name / "s", energy=0.95)
    assert toys.tree(tmp_path / "one") == toys.tree(tmp_path / "two")


def test_the_report_is_told_as_json(tmp_path: Path) -> None:
    report = regraft.shrink(write_adapter(tmp_path / "a"), tmp_path / "s", rank=2)
    found = json.loads(json.dumps(report.to_json()))
    assert found["rank"] == 2
    assert found["modules"][0]["error"] == report.modules[0].error
    assert found["bytes_after"] == (tmp_path / "s" / "adapter_model.safetensors").stat().st_size
    assert report.tensors == len(read_header(tmp_path / "s" / "adapter_model.safetensors").tensors)


@pytest.mark.parametrize("rank", [None, 2])
def test_progress_reaches_its_total(tmp_path: Path, rank: int | None) -> None:
    events: list[regraft.ProgressEvent] = []
    adapter = write_adapter(tmp_path / "a")
    regraft.shrink(adapter, tmp_path / "s", rank=rank, progress=events.append)
    assert [e.stage for e in events][:: len(events) - 1] == ["read", "finish"]
    told = [e for e in events if e.stage == "shrink"]
    assert [e.done for e in told] == sorted(e.done for e in told)
    assert told[-1].done == told[-1].total > 0
    assert {e.tensor for e in told} - {""} == lowrank().keys()


# -- refusals


def refused(kind: type[regraft.RegraftError], folder: Path, **options: Any) -> str:
    """Return what a shrink is refused with; nothing may come of it."""
    out = folder.parent / "refused"
    with pytest.raises(kind) as error:
        regraft.shrink(folder, out, **options)
    assert not list(out.parent.glob("*refused*"))
    return str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 2, "energy": 0.5},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": math.nan},
        {"dtype": "int8"},
    ],
)
def test_calls_that_contradict_themselves(tmp_path: Path, options: dict[str, Any]) -> None:
    refused(UsageError, write_adapter(tmp_path / "a"), **options)


def test_every_tensor_with_nan_or_infinity_is_named(tmp_path: Path) -> None:
    tensors = lowrank()
    bad = [f"{toys.PREFIX}{MODULES[0]}.lora_A.weight", f"{toys.PREFIX}{MODULES[2]}.lora_B.weight"]
    tensors[bad[0]][0, 0], tensors[bad[1]][3, 1] = np.nan, np.inf
    for options in ({}, {"rank": 2}, {"energy": 0.9}):
        text = refused(AdapterError, write_adapter(tmp_path / "a", tensors), **options)
        assert all(name in text for name in bad)
        assert "NaN or infinity" in text


def test_values_that_the_dtype_cannot_hold_are_refused_by_tensor(tmp_path: Path) -> None:
    name = f"{toys.PREFIX}{MODULES[1]}.lora_B.weight"
    score = f"{toys.PREFIX}score.weight"
    tensors = lowrank() | {score: toys.draw(2, 2)}
    tensors[name][0, 0], tensors[score][1, 1] = 1e5, -1e6
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["score"])
    text = refused(NumericError, adapter, dtype="float16")
    assert name in text
    assert score in text
    regraft.shrink(adapter, tmp_path / "s", dtype="bfloat16")


def test_a_lower_rank_can_bring_a_value_into_the_range_of_the_dtype(tmp_path: Path) -> None:
    name = f"{toys.PREFIX}{MODULES[1]}.lora_"
    tensors = lowrank()
    tensors[f"{name}B.weight"] *= 1e5
    tensors[f"{name}A.weight"] *= 1e-5
    adapter = write_adapter(tmp_path / "a", tensors)
    refused(NumericError, adapter, dtype="float16")
    report = regraft.shrink(adapter, tmp_path / "s", dtype="float16", rank=7)
    assert report.error < 0.01


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_rank_that_the_base_is_computed_from_stays(tmp_path: Path, init: str) -> None:
    adapter = write_adapter(tmp_path / "a", init_lora_weights=init)
    for options in ({"rank": 4}, {"energy": 0.9}):
        assert init in refused(UnsupportedError, adapter, **options)
    regraft.shrink(adapter, tmp_path / "s")
    assert config_of(tmp_path / "s") == config_of(adapter)
    assert regraft.shrink(adapter, tmp_path / "t", rank=8).modules[0].rank_after == 8


def test_what_a_merge_refuses_is_refused(tmp_path: Path) -> None:
    assert "loftq" in refused(
        UnsupportedError, write_adapter(tmp_path / "a", init_lora_weights="loftq")
    )
    stray = lowrank() | {f"{toys.PREFIX}stray.weight": toys.draw(3)}
    assert "stray" in refused(AdapterError, write_adapter(tmp_path / "b", stray))
    half = lowrank()
    del half[f"{toys.PREFIX}{MODULES[0]}.lora_A.weight"]
    assert MODULES[0] in refused(AdapterError, write_adapter(tmp_path / "c", half))


def test_factors_that_contradict_each_other_or_the_config_are_all_named(tmp_path: Path) -> None:
    tensors = lowrank()
    tensors[f"{toys.PREFIX}{MODULES[0]}.lora_B.weight"] = toys.draw(WIDTH, 5)
    tensors |= toys.lora(MODULES[3], WIDTH, WIDTH, rank=3)
    text = refused(AdapterError, write_adapter(tmp_path / "a", tensors))
    assert MODULES[0] in text
    assert MODULES[3] in text


def test_dora_on_a_stack_is_refused(tmp_path: Path) -> None:
    tensors = stack() | {f"{toys.PREFIX}{STACK}.lora_magnitude_vector": toys.draw(OUT)}
    adapter = write_adapter(
        tmp_path / "a", tensors, r=RANK, target_modules=None,
        target_parameters=["experts.down_proj"],
    )  # fmt: skip
    assert "stack" in refused(AdapterError, adapter, rank=2)


def test_parameters_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "a", stack(), r=RANK, target_modules=None,
        target_parameters=["experts.mine", "experts.yours"], rank_pattern={"experts.mine": 3},
    )  # fmt: skip
    assert "'mine', 'yours'" in refused(AdapterError, adapter, rank=2)


def test_what_is_no_adapter_or_no_base_is_refused(tmp_path: Path) -> None:
    refused(InputError, toys.write_base(tmp_path / "base"))
    refused(InputError, with_copies(tmp_path / "a"), base=tmp_path / "nothing")


# -- the output folder


def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    out = write_adapter(tmp_path / "out", toys.attention(), r=toys.RANK)
    before = toys.tree(out)
    with pytest.raises(OutputExistsError, match="exists already"):
        regraft.shrink(adapter, out)
    assert toys.tree(out) == before
    regraft.shrink(adapter, out, overwrite=True)
    assert toys.load(out).keys() == lowrank().keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_an_empty_folder_may_be_replaced_and_a_model_may_not(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    regraft.shrink(adapter, tmp_path / "empty", overwrite=True)
    model = toys.write_base(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, said in ((model, "hold an adapter"), (tmp_path / "other", "hold an adapter"),
                      (tmp_path / "link", "is a link")):  # fmt: skip
        with pytest.raises(OutputExistsError, match=said):
            regraft.shrink(adapter, out, overwrite=True)
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_a_merge_still_replaces_no_adapter(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "a")
    out = toys.write_adapter(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="hold a model"):
        regraft.merge(base, adapter, out, overwrite=True)


def test_the_output_is_not_an_input(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), with_copies(tmp_path / "a")
    for out in (adapter, adapter / "small", base / "small"):
        with pytest.raises(UsageError, match="an input"):
            regraft.shrink(adapter, out, base=base, overwrite=True)
    assert not (base / "small").exists()


def test_too_little_room_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.merging.files.publish.free_bytes", lambda _: 10)
    refused(DiskSpaceError, write_adapter(tmp_path / "a"))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "full"), ValueError])
def test_an_interruption_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: Any
) -> None:
    adapter = write_adapter(tmp_path / "a")
    out = write_adapter(tmp_path / "out", toys.attention(), r=toys.RANK)
    before, whole = toys.tree(out), verb.content

    def stopped(*arguments: Any) -> Any:
        pieces = whole(*arguments)
        yield next(pieces)
        yield next(pieces)
        raise interruption

    monkeypatch.setattr(verb, "content", stopped)
    with pytest.raises((KeyboardInterrupt, DiskSpaceError, ValueError)):
        regraft.shrink(adapter, out, overwrite=True)
    assert toys.tree(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


KILLED = """
import os, signal, sys
import regraft
from regraft.shrinking import verb
whole, at = verb.content, int(sys.argv[3])
def stopped(*arguments):
    for number, piece in enumerate(whole(*arguments)):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece
verb.content = stopped
if at < 0:
    verb.tell = lambda _, stage, total: stage == "finish" and os.kill(os.getpid(), signal.SIGKILL)
regraft.shrink(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 5, -1])
def test_after_a_kill_the_old_one_is_there_and_the_next_try_is_whole(
    tmp_path: Path, at: int
) -> None:
    adapter = write_adapter(tmp_path / "a")
    out = write_adapter(tmp_path / "out", toys.attention(), r=toys.RANK)
    before = toys.tree(out)
    assert python(KILLED, adapter, out, str(at)).returncode == -signal.SIGKILL
    assert toys.tree(out) == before
    assert (tmp_path / ".out.regraft").is_dir()
    regraft.shrink(adapter, out, overwrite=True)
    regraft.shrink(adapter, tmp_path / "undisturbed" / "out")
    assert toys.tree(out) == toys.tree(tmp_path / "undisturbed" / "out")
    assert not (tmp_path / ".out.regraft").exists()


@pytest.mark.slow
def test_what_a_killed_one_left_can_be_cleaned(tmp_path: Path) -> None:
    python(KILLED, write_adapter(tmp_path / "a"), tmp_path / "out", "3")
    (leftover,) = regraft.clean(tmp_path)
    assert leftover.output == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
