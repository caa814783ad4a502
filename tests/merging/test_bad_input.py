"""Bad input is a typed error that says everything, with its exit code, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging import toys
from merging.mishaps import MISHAPS, Mishap, config_of
from merging.processes import COMMAND, command_here, environment, errors, regraft_command
from merging.toys import write_adapter, write_base, write_json
from regraft.errors import ChangedError, RegraftError

Command = Callable[..., subprocess.CompletedProcess[str]]


def prepared(folder: Path, mishap: Mishap) -> tuple[Path, Path]:
    """Write a sound base and adapter, spoil them, and return what to name as such."""
    write_base(folder / "base")
    write_adapter(folder / "adapter")
    mishap.spoil(folder)
    return folder / mishap.base, folder / mishap.adapter


def listing(folder: Path) -> dict[str, Any]:
    """Return everything below a folder, with sizes, without reading any of it."""
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", MISHAPS)
def test_bad_input_is_explained_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    mishap = MISHAPS[name]
    base, adapter = prepared(tmp_path, mishap)
    before = listing(tmp_path)
    with pytest.raises(RegraftError) as caught:
        regraft.merge(base, str(adapter), tmp_path / "out")
    error = caught.value
    assert (type(error).__name__, error.exit_code) == (mishap.error, mishap.exit_code)
    assert len(error.problems) == mishap.count
    for words in mishap.says:
        assert words in str(error)
    for problem in error.problems:
        assert problem.what
        assert problem.where
        assert mishap.hint in problem.hint
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", MISHAPS)
def test_check_finds_what_headers_show(name: str, tmp_path: Path) -> None:
    mishap = MISHAPS[name]
    base, adapter = prepared(tmp_path, mishap)
    try:
        report = regraft.check(base, str(adapter))
    except RegraftError as error:
        found: tuple[Any, ...] = error.problems
    else:
        assert report.ok is not bool(report.problems)
        found = report.problems
    assert len(found) == (mishap.count if mishap.checked else 0)


PROCESSES = [
    "base truncated", "adapter duplicated", "base overlapping", "adapter out of bounds",
    "NaN in A", "A without B", "another base", "no tensors", "config of the wrong types",
    "a folder that is neither, as adapter", "index that leaves the folder", "no such base",
    "a weight that is no number", "A too wide", "another rank than the config's",
]  # fmt: skip
"""Mishaps that are also tried as a user meets them, one of each exit code as a whole process."""


@pytest.mark.parametrize(
    ("name", "command"),
    [
        *((name, command_here) for name in PROCESSES),
        ("base truncated", regraft_command), ("NaN in A", regraft_command),
    ],
)  # fmt: skip
def test_a_process_says_the_same_and_ends_with_its_exit_code(
    name: str, command: Command, tmp_path: Path
) -> None:
    mishap = MISHAPS[name]
    base, adapter = prepared(tmp_path, mishap)
    before = listing(tmp_path)
    done = command("merge", base, adapter, "-o", tmp_path / "out", "--json")
    error = errors(done)
    assert (done.returncode, error["type"]) == (mishap.exit_code, mishap.error)
    assert len(error["problems"]) == mishap.count
    for words in mishap.says:
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert all(mishap.hint in problem["hint"] for problem in error["problems"])
    assert listing(tmp_path) == before


def test_problems_of_all_adapters_are_listed_together(base: Path, tmp_path: Path) -> None:
    folders = []
    for number in range(2):
        tensors = toys.lora(f"model.layers.{number}.attention.q_proj", 16, 16)
        folders.append(write_adapter(tmp_path / f"a{number}", tensors))
    wrong = write_adapter(tmp_path / "a2", {**toys.attention()}, r=5)
    with pytest.raises(regraft.MismatchError) as caught:
        regraft.merge(base, [*folders, wrong], tmp_path / "out")
    assert len(caught.value.problems) == 6
    assert {problem.where.partition(":")[0] for problem in caught.value.problems} == {
        str(tmp_path / f"a{number}") for number in range(3)
    }


def test_a_file_that_shrinks_while_it_is_merged_is_an_error(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    weights = base / "model.safetensors"

    def progress(event: regraft.ProgressEvent) -> None:
        if event.stage == "merge":
            os.truncate(weights, 3000)

    with pytest.raises(ChangedError, match="was changed while it was being read") as caught:
        regraft.merge(base, adapter, tmp_path / "out", threads=1, progress=progress)
    assert "ends inside a tensor" in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()


# Permissions


WITHOUT_PRIVILEGE = (
    "setpriv", "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)  # fmt: skip
"""Root without the right to pass over a file's mode."""


SERVE = """
import json, sys
from click.testing import CliRunner
from regraft.cli.app import app

for line in sys.stdin:
    done = CliRunner().invoke(app, json.loads(line))
    print(json.dumps([done.exit_code, done.stdout, done.stderr]), flush=True)
"""
"""The command line, as often as it is asked for."""


def through_setpriv() -> tuple[str, ...]:
    """Return what to run a command through so that modes of files count for it."""
    if os.geteuid() != 0:
        return ()
    try:
        probe = subprocess.run([*WITHOUT_PRIVILEGE, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("root, and no setpriv to give its privileges up")
    if probe.returncode:
        pytest.skip("root, and not allowed to give its privileges up")
    return WITHOUT_PRIVILEGE


@pytest.fixture(scope="module")
def command_of_a_user() -> Iterator[Command]:
    """The command line in a process for which modes of files count."""
    process = subprocess.Popen(
        [*through_setpriv(), COMMAND[0], "-c", SERVE], env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([*map(str, arguments)]) + "\n")
        process.stdin.flush()
        return subprocess.CompletedProcess(arguments, *json.loads(process.stdout.readline()))

    yield run
    process.communicate()


LOCKED = {
    "the base's weights": ("base/model.safetensors", 0o000),
    "the base's config": ("base/config.json", 0o000),
    "the base's folder": ("base", 0o000),
    "a side file": ("base/tokenizer.json", 0o000),
    "the adapter's weights": ("adapter/adapter_model.safetensors", 0o000),
    "the adapter's config": ("adapter/adapter_config.json", 0o000),
    "the folder of the output": ("place", 0o555),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LOCKED)
def test_what_may_not_be_read_or_written_is_exit_code_4(
    base: Path, adapter: Path, tmp_path: Path, command_of_a_user: Command, what: str
) -> None:
    (tmp_path / "place").mkdir()
    write_json(base / "tokenizer.json", {})
    name, mode = LOCKED[what]
    before = listing(tmp_path)
    usual = (tmp_path / name).stat().st_mode
    (tmp_path / name).chmod(mode)
    out = tmp_path / "place" / "out"
    done = command_of_a_user("merge", base, adapter, "-o", out, "--json")
    (tmp_path / name).chmod(usual)
    error = errors(done)
    assert (done.returncode, error["type"]) == (4, "AccessError"), done.stderr
    (problem,) = error["problems"]
    assert str(tmp_path / name) in problem["where"]
    assert problem["found"] == os.strerror(errno.EACCES)
    assert "ermissions" in problem["hint"]
    assert listing(tmp_path) == before


def test_an_out_below_a_folder_that_may_not_be_entered(
    base: Path, adapter: Path, tmp_path: Path, command_of_a_user: Command
) -> None:
    (tmp_path / "locked" / "inner").mkdir(parents=True)
    (tmp_path / "locked").chmod(0o000)
    out = tmp_path / "locked" / "inner" / "out"
    done = command_of_a_user("merge", base, adapter, "-o", out, "--json")
    (tmp_path / "locked").chmod(0o755)
    error = errors(done)
    assert (done.returncode, error["type"]) == (4, "AccessError"), done.stderr
    assert str(tmp_path / "locked") in error["problems"][0]["where"]
    assert error["problems"][0]["found"] == os.strerror(errno.EACCES)


# Configs of any content at all

JUNK: tuple[Any, ...] = (
    None, True, -1, 1e308, "x", "(", "(?i)x", [], [None], ["("], {}, {"x": 1}, {"(": 1},
    {"q_proj": 2.5}, 10**400, [10**30], "../../x", ["\x1b[31m"], {"quant_method": "\x1b[31m"},
)  # fmt: skip

ADAPTER_FIELDS = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "r",
    "target_modules", "exclude_modules", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_pattern", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "use_dora", "lora_bias", "target_parameters", "ensure_weight_tying",
    "layers_to_transform",
)  # fmt: skip
BASE_FIELDS = (
    "architectures", "model_type", "vocab_size", "num_hidden_layers", "tie_word_embeddings",
    "dtype", "torch_dtype", "quantization_config", "compression_config", "text_config",
    "vision_config", "auto_map", "id2label", "num_local_experts", "transformers_weights",
)  # fmt: skip


@pytest.mark.parametrize(
    ("which", "field"),
    [*(("adapter", field) for field in ADAPTER_FIELDS), *(("base", f) for f in BASE_FIELDS)],
)
def test_a_config_of_any_content_is_merged_or_refused(
    tmp_path: Path, which: str, field: str
) -> None:
    base = write_base(tmp_path / "base", {f"{toys.Q0}.weight": toys.draw(6, 5)})
    adapter = write_adapter(tmp_path / "adapter", toys.lora(toys.Q0, 6, 5))
    for number, junk in enumerate(JUNK):
        config_of(which, **{field: junk})(tmp_path)
        out = tmp_path / f"out{number}"
        error = refusal(base, adapter, out)
        assert (error is None) is (out / "regraft" / "receipt.json").exists()
        assert "\x1b" not in str(error)
        for problem in error.problems if error else ():
            assert problem.what
            assert problem.where


def refusal(base: Path, adapter: Path, out: Path) -> RegraftError | None:
    """Merge; return the error if it is refused. Anything but an error of ours passes."""
    try:
        regraft.merge(base, adapter, out)
    except RegraftError as error:
        return error
    return None
