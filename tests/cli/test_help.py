"""Every command explains itself."""

from __future__ import annotations

import json
import re

import click
import pytest

from cli.kinds import Run
from regraft import __version__
from regraft.cli.app import COMMANDS, app


def commands() -> list[tuple[str, click.Command]]:
    """Return every command by walking the group, as --help does."""
    context = click.Context(app)
    return [(name, app.get_command(context, name)) for name in app.list_commands(context)]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_description_and_examples_that_name_it(run: Run, name: str) -> None:
    text = run(name, "--help").stdout
    description, examples = text.split("Examples:")
    assert len(re.findall(r"\w+", description)) > 20
    assert re.search(rf"^ +regraft {name}\b", examples, re.MULTILINE)


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_option_is_documented(name: str, command: click.Command) -> None:
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert [o.opts for o in options if not o.help] == [], name


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_takes_json(name: str, command: click.Command) -> None:
    assert any("--json" in p.opts for p in command.params), name


def test_help_lists_all_commands_with_whole_sentences(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = result.stdout.split("Commands:")[1]
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w.*[.]$", listed, re.MULTILINE)
        assert "..." not in listed


def test_the_help_begins_with_the_way_there_and_back(run: Run) -> None:
    examples = run("--help").stdout.split("Options:")[0]
    for name in ("demo", "inspect", "merge", "verify", "unmerge"):
        assert re.search(rf"^ +regraft {name}\b", examples, re.MULTILINE)


@pytest.mark.parametrize("name", ["merge", "swap"])
def test_both_spellings_of_keeping_an_undo_are_shown(run: Run, name: str) -> None:
    text = run(name, "--help").stdout
    assert "--undo / --no-undo" in text
    assert "--keep-adapter / --no-keep-adapter" in text


def test_no_arguments_print_the_help(run: Run) -> None:
    result = run()
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_the_version_is_told(run: Run) -> None:
    assert run("--version").stdout == f"regraft {__version__}\n"


def test_completion_help_says_where_to_put_the_script(run: Run) -> None:
    text = run("completion", "--help").stdout
    assert "bash-completion/completions/regraft" in text
    assert "_regraft" in text
    assert "fish/completions" in text


@pytest.mark.parametrize("name", ["merge", "shrink", "help"])
def test_help_explains_a_command_as_its_option_does(run: Run, name: str) -> None:
    assert run("help", name).stdout == run(name, "--help").stdout
    assert json.loads(run("help", name, "--json").stdout)["command"] == name


def test_help_alone_is_the_list_and_knows_what_was_meant(run: Run) -> None:
    assert run("help").stdout == run("--help").stdout
    result = run("help", "merg")
    assert result.exit_code == 2
    assert "did you mean 'merge'?" in result.stderr


def test_the_version_has_a_short_option(run: Run) -> None:
    assert run("-V").stdout == run("--version").stdout


@pytest.mark.parametrize("name", ["merge", "swap", "check", "shrink", "generate", "chat"])
def test_a_dtype_goes_by_its_short_names(name: str) -> None:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    (option,) = [p for p in command.params if "--dtype" in p.opts]
    context = click.Context(command)
    for short, long in (("bf16", "bfloat16"), ("half", "float16"), ("FP32", "float32")):
        assert option.type_cast_value(context, short) == long
