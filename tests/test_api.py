"""The verbs from Python: how they are called, what they tell on the way, what they answer."""

from __future__ import annotations

import dataclasses
import inspect
import json
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import regraft
from measuring import seconds_of_cpu, work_to_compare
from merging import toys
from merging.test_memory import write_sparse
from merging.toys import Q0, lora, tree, write_adapter, write_base, write_json
from regraft.cli.app import COMMANDS
from regraft.errors import RegraftError, UsageError
from regraft.formats.files.reading import FilePool
from regraft.merging.inputs.opening import parse_adapters
from regraft.merging.options import MergeOptions


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An untied llama of two layers in bfloat16."""
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA on every q_proj and v_proj of :func:`base`."""
    return write_adapter(tmp_path / "adapter")


# How adapters may be given


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", [("a", 1.0)]),
        (Path("a"), [("a", 1.0)]),
        ("a=0.5", [("a", 0.5)]),
        ("a=-2", [("a", -2.0)]),
        ("a=1e-3", [("a", 0.001)]),
        ("org/a@main=0.25", [("org/a@main", 0.25)]),
        ("x=1/a=0.5", [("x=1/a", 0.5)]),
        (("a", 0.5), [("a", 0.5)]),
        ((Path("a"), 2), [("a", 2.0)]),
        (["a", "b=0.5"], [("a", 1.0), ("b", 0.5)]),
        (("a", "b"), [("a", 1.0), ("b", 1.0)]),
        ([("a", 0.5), Path("b"), "c=3"], [("a", 0.5), ("b", 1.0), ("c", 3.0)]),
        ([("a=0.5", 2.0)], [("a=0.5", 2.0)]),
    ],
)
def test_adapters_are_given_in_many_forms(given: Any, expected: list[tuple[str, float]]) -> None:
    assert parse_adapters(given) == expected


@pytest.mark.parametrize("given", ["a=", "a=much", "a=nan", "a=inf", "a=1=x", ("a", float("nan"))])
def test_a_weight_has_to_be_a_finite_number(given: Any) -> None:
    with pytest.raises(UsageError, match="has to be a number") as caught:
        parse_adapters(given)
    assert caught.value.exit_code == 2
    assert "=0.5" in caught.value.problems[0].hint


def test_at_least_one_adapter_is_needed(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter was given"):
        regraft.merge(base, [], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"dtype": "int8"}, "--dtype"),
        ({"dtype": "float64"}, "--dtype"),
        ({"shard_size": "many"}, "--shard-size"),
        ({"shard_size": 0}, "--shard-size"),
        ({"max_memory": "-1GB"}, "--max-memory"),
        ({"max_memory": ""}, "--max-memory"),
        ({"threads": 0}, "--threads"),
    ],
)
def test_an_option_that_cannot_be_is_wrong_usage(
    tmp_path: Path, options: dict[str, Any], where: str
) -> None:
    """Options are looked at before any input is."""
    with pytest.raises(UsageError) as caught:
        regraft.merge(tmp_path / "nowhere", tmp_path / "nothing", tmp_path / "out", **options)
    assert [problem.where for problem in caught.value.problems] == [where]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", "F16", "fp16", "torch.float16"])
def test_a_dtype_has_many_names(base: Path, adapter: Path, dtype: str) -> None:
    plan = regraft.plan(base, adapter, dtype=dtype)
    assert {step.dtype for step in plan.steps} == {"F16"}
    assert plan.options["dtype"] == "float16"


# Progress


def test_progress_is_told_in_stages_and_adds_up(base: Path, adapter: Path, tmp_path: Path) -> None:
    events: list[regraft.ProgressEvent] = []
    inside = threading.Semaphore(1)

    def progress(event: regraft.ProgressEvent) -> None:
        assert inside.acquire(blocking=False), "two threads at once"
        events.append(event)
        time.sleep(0.001)
        inside.release()

    receipt = regraft.merge(base, adapter, tmp_path / "out", threads=4, progress=progress)
    stages = [event.stage for event in events]
    assert stages == sorted(stages, key=["read", "merge", "finish"].index)
    assert set(stages) == {"read", "merge", "finish"}
    merging = [event for event in events if event.stage == "merge"]
    total = receipt.totals.bytes_written
    assert {event.total for event in merging} == {total}
    done = [event.done for event in merging]
    assert done == sorted(done)
    assert done[-1] == total
    assert {event.tensor for event in merging} - {""} == toys.llama_tensors().keys()
    assert (events[-1].done, events[-1].total) == (total, total)


# plan and check read headers alone


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whoever reads a tensor fail."""

    def read_into(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(FilePool, "read_into", read_into)


def test_a_plan_says_what_a_merge_does_and_reads_no_tensor(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        plan = regraft.plan(base, f"{adapter}=0.5", tmp_path / "out", shard_size="4KB", threads=2)
        with pytest.raises(AssertionError, match="a tensor was read"):
            regraft.merge(base, adapter, tmp_path / "out")
    assert tree(tmp_path) == before
    receipt = regraft.merge(base, f"{adapter}=0.5", tmp_path / "out", shard_size="4KB", threads=2)
    told = json.loads(json.dumps(plan.to_json()))
    assert [step["name"] for step in told["steps"]] == [record.name for record in receipt.tensors]
    for step, record in zip(told["steps"], receipt.tensors, strict=True):
        assert (step["action"], step["dtype"]) == (record.action, record.dtype)
        assert tuple(step["scales"]) == record.scales
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert {shard["name"] for shard in told["shards"]} == files
    counted = {name: getattr(receipt.totals, name) for name in told["totals"]}
    assert told["totals"] == counted
    assert told["disk"]["needed"] > receipt.totals.bytes_written
    assert told["threads"] == 2


def test_a_plan_needs_no_output(base: Path, adapter: Path) -> None:
    plan = regraft.plan(base, adapter)
    assert (plan.out, dict(plan.disk)) == (None, {})
    assert 0 < plan.memory <= 512 * 2**20


def test_check_says_yes_with_what_would_be_done(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_reading(monkeypatch)
    report = regraft.check(base, [adapter, f"{adapter}=2"], dtype="float32")
    assert (report.ok, report.problems, report.warnings) == (True, (), ())
    assert report.summary["merged"] == 4
    assert report.summary["converted"] == 17
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_check_gathers_the_problems_of_adapters_and_of_matching(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    refused = write_adapter(tmp_path / "refused", use_qalora=True)
    unfit = write_adapter(tmp_path / "unfit", lora("nowhere.q_proj", 4, 4))
    report = regraft.check(base, [refused, adapter, unfit])
    assert not report.ok
    assert report.summary == {}
    assert [problem.what.partition(" ")[0] for problem in report.problems] == ["QALoRA", "the"]
    told = report.to_json()["problems"]
    assert told[1]["expected"] == "nowhere.q_proj.weight"


def test_check_of_a_cap_that_is_too_small_says_so(base: Path, adapter: Path) -> None:
    report = regraft.check(base, adapter, max_memory="64MiB")
    assert not report.ok
    assert "--max-memory" in report.problems[0].hint


def test_modules_that_are_targeted_and_stay_are_noted(base: Path, tmp_path: Path) -> None:
    half = {key: a for key, a in toys.attention().items() if "layers.0." in key}
    report = regraft.check(base, write_adapter(tmp_path / "half", half))
    assert report.ok
    (warning,) = report.warnings
    assert "2 more modules" in warning
    assert "model.layers.1.self_attn." in warning


LAYERS, SHARDS = 80, 30


def write_70b(folder: Path) -> tuple[Path, Path]:
    """Write the headers of a llama of 70 billion parameters, and an adapter for all its layers."""
    h, kv, inter = 8192, 1024, 28672
    shapes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
    mlp = {"gate": (inter, h), "up": (inter, h), "down": (h, inter)}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("BF16", (9, h))
    }
    factors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(LAYERS):
        for part, modules in (("self_attn", shapes), ("mlp", mlp)):
            for name, (out, inputs) in modules.items():
                module = f"model.layers.{layer}.{part}.{name}_proj"
                tensors[f"{module}.weight"] = ("BF16", (out, inputs))
                factors[f"{toys.PREFIX}{module}.lora_A.weight"] = ("BF16", (16, inputs))
                factors[f"{toys.PREFIX}{module}.lora_B.weight"] = ("BF16", (out, 16))
        for norm in ("input", "post_attention"):
            tensors[f"model.layers.{layer}.{norm}_layernorm.weight"] = ("BF16", (h,))
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        held = dict(list(tensors.items())[number::SHARDS])
        write_sparse(folder / f"shard{number}", held)
        (folder / "base").mkdir(exist_ok=True)
        (folder / f"shard{number}" / "model.safetensors").rename(folder / "base" / file)
        weight_map |= dict.fromkeys(held, file)
    write_json(folder / "base" / toys.INDEX, {"weight_map": weight_map})
    write_json(folder / "base" / "config.json", {**toys.CONFIG, "num_hidden_layers": LAYERS})
    adapter = write_sparse(folder / "adapter", factors)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    names = [f"{name}_proj" for name in (*shapes, *mlp)]
    config = toys.adapter_config(r=16, target_modules=names)
    write_json(adapter / "adapter_config.json", config)
    return folder / "base", adapter


@pytest.mark.slow
def test_checking_a_sharded_70b_takes_under_a_second(tmp_path: Path) -> None:
    """Held against other work of this process, as the clock tells more of what else is running."""
    base, adapter = write_70b(tmp_path)
    report = regraft.check(base, adapter)
    assert report.ok
    assert report.summary["merged"] == 7 * LAYERS
    assert report.summary["bytes_written"] > 130e9
    taken = seconds_of_cpu(lambda: regraft.check(base, adapter))
    assert taken < 3 * seconds_of_cpu(work_to_compare)  # it is 0.7 times


def test_numbers_written_are_numbers_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The shortest way through, as the documentation shows it."""
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    before, after = (toys.load(folder)[f"{Q0}.weight"] for folder in (base, tmp_path / "out"))
    moved = np.linalg.norm(after.astype(float) - before.astype(float))
    record = next(record for record in receipt.tensors if record.name == f"{Q0}.weight")
    assert record.delta_norm == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize("verb", [regraft.check, regraft.plan, regraft.merge])
def test_a_base_and_an_adapter_that_are_swapped_are_said_to_be(
    base: Path, adapter: Path, tmp_path: Path, verb: Any
) -> None:
    out = [tmp_path / "out"] if verb is regraft.merge else []
    with pytest.raises(regraft.UsageError, match="BASE and ADAPTER are swapped"):
        verb(adapter, base, *out)


def test_all_inputs_that_cannot_be_opened_are_told_at_once(base: Path, tmp_path: Path) -> None:
    bad, gone = write_adapter(tmp_path / "bad"), tmp_path / "gone"
    (bad / "adapter_config.json").write_text("{")
    for call in (regraft.check, regraft.plan):
        with pytest.raises(RegraftError) as caught:
            call(tmp_path / "no base", [bad, gone])
        where = " ".join(problem.where for problem in caught.value.problems)
        assert len(caught.value.problems) == 3
        assert all(name in where for name in ("no base", str(bad), str(gone)))
    with pytest.raises(RegraftError) as caught:
        regraft.merge(base, [bad, gone], tmp_path / "out")
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out").exists()


# One set of options, whoever asks for them


MERGES = (regraft.merge, regraft.plan, regraft.check, regraft.swap, regraft.convert,
          regraft.dequantize, regraft.quantize, regraft.unmerge)  # fmt: skip


@pytest.mark.parametrize("verb", MERGES, ids=lambda verb: str(verb.__name__))
def test_options_of_a_verb_are_those_of_a_merge_with_the_same_defaults(verb: Any) -> None:
    known = {field.name: field for field in dataclasses.fields(MergeOptions)}
    parameters = inspect.signature(verb).parameters
    taken = {name: each.default for name, each in parameters.items() if name in known}
    assert taken
    asked = {name: default for name, default in taken.items() if name not in ("undo",)}
    assert MergeOptions.of(**asked) == MergeOptions.of(
        **({"keep_adapter": True} if "keep_adapter" in taken else {})
    )
    assert taken.get("undo") is None


def test_a_merge_takes_every_option() -> None:
    known = {field.name for field in dataclasses.fields(MergeOptions)}
    for verb in (regraft.merge, regraft.swap):
        assert known <= set(inspect.signature(verb).parameters)


CALLED = {
    "merge": ["base", "adapter"], "swap": ["merged", "adapter"], "convert": ["model"],
    "dequantize": ["model"], "quantize": ["model", "--to", "nf4"], "unmerge": ["merged"],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_a_command_has_the_options_of_its_function_with_the_same_defaults(name: str) -> None:
    command: click.Command = import_module(COMMANDS[name]).command
    known = {field.name for field in dataclasses.fields(MergeOptions)}
    parameters = inspect.signature(getattr(regraft, name)).parameters
    asked = command.make_context(name, [*CALLED[name], "-o", "out"]).params
    found = {option: value for option, value in asked.items() if option in known}
    assert found == {n: each.default for n, each in parameters.items() if n in known}
