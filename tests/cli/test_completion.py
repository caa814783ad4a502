"""The completion scripts, and what they call."""

from __future__ import annotations

import json

import pytest

from cli.kinds import Launch, Run


@pytest.mark.parametrize(
    ("shell", "line"),
    [("bash", "complete -o nosort"), ("zsh", "#compdef regraft"), ("fish", "complete --no-files")],
)
def test_each_shell_has_its_script(run: Run, shell: str, line: str) -> None:
    result = run("completion", shell)
    assert (result.exit_code, result.stderr) == (0, "")
    assert line in result.stdout
    assert f"_REGRAFT_COMPLETE={shell}_complete" in result.stdout


def test_the_script_as_json(run: Run) -> None:
    answer = json.loads(run("completion", "fish", "--json").stdout)
    assert answer["shell"] == "fish"
    assert answer["script"].strip() == run("completion", "fish").stdout.strip()


@pytest.mark.slow
def test_tab_completes_commands_and_values(launch: Launch) -> None:
    program = "import sys; sys.argv = ['regraft']; from regraft.cli import main; main()"
    settings = {"_REGRAFT_COMPLETE": "bash_complete", "COMP_CWORD": "1", "COMP_WORDS": "regraft m"}
    assert launch("-c", program, **settings).stdout == "plain,merge\n"
    settings |= {"COMP_WORDS": "regraft un"}
    assert launch("-c", program, **settings).stdout == "plain,unmerge\n"
    settings |= {"COMP_CWORD": "3", "COMP_WORDS": "regraft merge --dtype b"}
    assert launch("-c", program, **settings).stdout == "plain,bfloat16\n"
    settings |= {"COMP_CWORD": "2", "COMP_WORDS": "regraft swap --no"}
    assert launch("-c", program, **settings).stdout == (
        "plain,--no-digest-cache\nplain,--no-undo\nplain,--no-keep-adapter\n"
    )
