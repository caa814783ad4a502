"""``regraft chat``: a conversation, line by line, and the commands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import regraft
from cli.speakers import TEMPLATE, write_adapter, write_speaker
from regraft.cli.app import app
from regraft.cli.commands.live.chat import COMMANDS, parse_choice
from regraft.runtime import generating


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_speaker(tmp_path_factory.mktemp("talker") / "base", TEMPLATE)
    write_adapter(base, base.parent / "sql", 1)
    write_adapter(base, base.parent / "json", 2)
    return base


def chat(base: Path, *lines: str, options: tuple[str, ...] = ("--json",)) -> Result:
    """Type lines into a chat."""
    arguments = ["chat", str(base), "--max-new-tokens", "5", *options]
    runner = CliRunner(catch_exceptions=False)
    return runner.invoke(app, arguments, input="".join(f"{line}\n" for line in lines))


def answers(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def with_both(base: Path) -> tuple[str, ...]:
    root = base.parent
    return ("--adapter", str(root / "sql"), "--adapter", f"{root / 'json'}=0.5", "--json")


def test_adapters_are_switched_mixed_and_left_out(base: Path) -> None:
    lines = ["w7", "/clear", "/adapter sql", "w7", "/clear", "/adapter none", "w7"]
    lines += ["/clear", "/adapter sql, json=0.5", "w7", "/clear", "/adapter json", "w7"]
    found = answers(chat(base, *lines, options=with_both(base)))
    assert [each["adapters"] for each in found] == [
        {"sql": 1.0}, {"sql": 1.0}, {}, {"sql": 1.0, "json": 0.5}, {"json": 1.0},
    ]  # fmt: skip
    texts = [each["text"] for each in found]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_of_several_adapters_the_first_answers_and_the_others_are_named(base: Path) -> None:
    root = base.parent
    options = ("--adapter", f"{root / 'json'}=0.5", "--adapter", str(root / "sql"))
    first = chat(base, options=options).stderr.splitlines()[0]
    assert first.startswith("With json=0.5. There is sql too: ")
    assert "/adapter sql switches, /adapter json,sql mixes" in first
    assert "too:" not in chat(base, options=options[:2]).stderr


def test_what_was_said_before_counts_until_it_is_cleared(base: Path) -> None:
    first, again, anew = answers(chat(base, "w7", "w7", "/clear", "w7"))
    assert first["text"] == anew["text"] != again["text"]


def test_a_system_prompt_can_be_set_and_taken_back(base: Path) -> None:
    lines = ["w7", "/clear", "/system w30", "w7", "/clear", "/system", "w7"]
    without, given, back = answers(chat(base, *lines))
    assert without["text"] == back["text"] != given["text"]


def test_an_adapter_is_loaded_meanwhile(base: Path) -> None:
    sql = base.parent / "sql"
    result = chat(base, f"/load {sql} mine", f"/load {sql}", "/adapter mine", "/adapters", "w7")
    assert [each["adapters"] for each in answers(result)] == [{"mine": 1.0}]
    assert f"* mine  {sql}" in result.stderr
    assert f"  sql  {sql}" in result.stderr


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/adapter nobody", "expected sql, json"),
        ("/adapter nobody", "/load PATH loads another"),
        ("/load ./somewhere sql", "/load PATH NAME"),
        ("/adapter", "/adapter needs a name"),
        ("/adapter sql=much", "'much' is not a weight"),
        ("/load", "/load needs a path"),
        ("/load ./nowhere", "no such"),
        ("/dance", "there is no command /dance"),
    ],
)
def test_a_line_that_is_wrong_is_told_and_the_chat_goes_on(
    base: Path, line: str, told: str
) -> None:
    result = chat(base, line, "w7", options=with_both(base))
    assert told in result.stderr
    error, answer = answers(result)
    assert set(error) == {"error"}
    assert answer["adapters"] == {"sql": 1.0}
    assert not any(word in result.stderr for word in ("load_adapter", "delete_adapter", "(source"))


def test_quitting_leaves_the_rest_unread(base: Path) -> None:
    assert answers(chat(base, "/quit", "w7")) == []


def test_help_lists_every_command(base: Path) -> None:
    told = chat(base, "/help").stderr
    assert [word for word in COMMANDS if f"{word} " not in told] == []


def test_answers_are_on_stdout_and_all_else_on_stderr(base: Path) -> None:
    told = answers(chat(base, "w7"))[0]["text"]
    plain = chat(base, "w7", options=())
    assert plain.stdout == f"{told}\n"
    assert plain.stderr.startswith("The base answers")


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken = []

    def interrupted(*arguments: Any) -> Any:
        streamer = made(*arguments)
        put = streamer.put

        def count(value: Any) -> None:
            spoken.append(value)
            if len(spoken) == 4:  # the prompt, and three tokens
                raise KeyboardInterrupt
            put(value)

        streamer.put = count
        return streamer

    made = generating._streamer
    monkeypatch.setattr(generating, "_streamer", interrupted)
    first, second = answers(chat(base, "w7", "w7"))
    assert (first["stopped"], first["tokens"]) == (True, 2)
    assert first["text"].split() != []
    assert (second["stopped"], second["tokens"] > 2) == (False, True)


def test_a_choice_is_names_with_weights() -> None:
    assert parse_choice("a, b=0.5,c=d=-1") == {"a": 1.0, "b": 0.5, "c=d": -1.0}
    with pytest.raises(regraft.UsageError):
        parse_choice(" , ")
