"""Wrong usage: exit code 2, and words that help."""

from __future__ import annotations

import json

import pytest

from cli.kinds import Run
from regraft.cli.app import COMMANDS, OTHER_WORDS


def test_a_mistyped_command_is_answered_with_the_one_meant(run: Run) -> None:
    result = run("mrege", "a", "b")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "did you mean 'merge'?" in result.stderr


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_another_word_for_a_command_is_answered_with_its_name(run: Run, word: str) -> None:
    assert word not in COMMANDS
    assert OTHER_WORDS[word] in COMMANDS
    assert f"did you mean '{OTHER_WORDS[word]}'?" in run(word, "a").stderr


def test_an_unlikely_command_is_answered_with_all_of_them(run: Run) -> None:
    result = run("qqqq")
    assert result.exit_code == 2
    assert f"(there is: {', '.join(COMMANDS)})" in result.stderr


def test_a_mistyped_option_is_answered_with_the_one_meant(run: Run) -> None:
    result = run("merge", "a", "b", "--shard-sise", "5GB")
    assert result.exit_code == 2
    assert "--shard-size" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "base"],
        ["merge", "base", "adapter"],  # no --out
        ["merge", "base", "adapter", "-o", "out", "--max-memory", "much"],
        ["merge", "base", "adapter", "-o", "out", "--max-memory", "inf"],
        ["merge", "base", "adapter", "-o", "out", "--shard-size", "0"],
        ["merge", "base", "adapter", "-o", "out", "--threads", "0"],
        ["merge", "base", "adapter", "-o", "out", "--dtype", "int3"],
        ["unmerge"],
        ["unmerge", "merged"],  # no --out
        ["unmerge", "merged", "-o", "out", "--max-memory", "much"],
        ["swap", "merged", "-o", "out"],  # no adapter
        ["swap", "merged", "adapter"],  # no --out
        ["clean", "--all"],
        ["shrink", "adapter"],  # no --out
        ["shrink", "adapter", "-o", "out", "--rank", "0"],
        ["shrink", "adapter", "-o", "out", "--energy", "1.5"],
        ["shrink", "adapter", "-o", "out", "--rank", "4", "--energy", "0.9"],
        ["shrink", "adapter", "-o", "out", "--dtype", "int3"],
        ["check"],
        ["inspect"],
        ["completion", "tcsh"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2_in_text_and_in_json(run: Run, arguments: list[str]) -> None:
    text = run(*arguments)
    assert (text.exit_code, text.stdout) == (2, "")
    assert text.stderr.count("error: ") == 1
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2
    error = json.loads(as_json.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("UsageError", 2)
    assert error["problems"][0]["what"] in as_json.stderr


def test_json_after_a_double_dash_is_an_argument(run: Run) -> None:
    assert run("merge", "--", "--json").stdout == ""
