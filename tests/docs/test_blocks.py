"""Every block of the docs runs: Python as it stands, commands in this process.

The Python blocks of a page run in order in one namespace, its commands in order, each in a folder
that has the models and adapters of :mod:`docs.world`. What a line writes may be there from a line
before it, as pages show several ways to do one thing; it is removed then, unless it is replaced.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import regraft
from docs.world import write_world
from regraft.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]

CANNOT_RUN = {
    r"\borg/": "a name on the Hub, which is not asked",
    r"\bprobe http://localhost": "a server, which does not run here",
    r"^pip ": "installs into the environment",
    r"^make ": "the Makefile's targets make an environment of their own",
    r"^(PYTHONPATH=\S+ )?\.venv/": "the environment of the Makefile, and these tests themselves",
    r"^regraft demo": "trains a model for minutes, and is tested by tests/demo",
}
"""Commands that are not run, with the reason."""

DIFFERS = {
    "regraft diff ./base ./merged",
    "regraft diff ./adapter ./adapter-retrained --json",
    "regraft verify ./merged --base ./base-4bit --adapter ./adapter --prompts ./prompts.txt",
}
"""Commands that compare what is not the same, and say so with exit code 1."""

WRITES = {
    **dict.fromkeys(("merge", "swap", "extract"), 2),
    **dict.fromkeys(("unmerge", "convert", "dequantize", "quantize", "shrink", "combine"), 1),
}
"""Which argument of a function is the folder that it writes."""

SHELLS = "(?:console|bash|sh)"
TALK = "Hello\n/help\n/adapter none\nHello\n/quit\n"


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Yield the fenced blocks in a language (a pattern), each with the line it begins on."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, match.start(1)) + 1, match[1]


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """Yield every line of a page that begins with ``$``, with its number."""
    for start, block in blocks(page, SHELLS):
        for number, line in enumerate(block.splitlines(), start):
            if line.startswith("$ "):
                yield number, line[2:]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(blocks(page, language))]


def written_by(block: str) -> Iterator[str]:
    """Yield the folders that the functions in a block write."""
    for node in ast.walk(ast.parse(block)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        place = WRITES.get(node.func.attr)
        if place is None or len(node.args) <= place:
            continue
        out = node.args[place]
        if isinstance(out, ast.Constant) and isinstance(out.value, str):
            yield out.value


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a copy of the world, with a home of one's own."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
@pytest.mark.usefixtures("here")
def test_python_blocks_run_in_order(page: Path) -> None:
    names: dict[str, object] = {"__name__": "docs_page"}
    for line, block in blocks(page, "python"):
        for out in written_by(block):
            shutil.rmtree(out, ignore_errors=True)
        lines_before = "\n" * (line - 1)  # so that a traceback has the page's line numbers
        exec(compile(lines_before + block, str(page), "exec"), names)


@pytest.mark.usefixtures("here")
def test_after_unmerging_what_was_chosen_answers_as_the_page_says() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained("./base"), torch.arange(3, 20)[None]
    base = model(ids).logits
    adapters = regraft.attach(model, "./sql-adapter", "sql")
    adapters.load_adapter("./json-adapter", "json")
    sql = model(ids).logits
    adapters.merge_adapter("sql")
    adapters.swap_adapter("sql", "json")
    adapters.unmerge_adapter()
    assert torch.equal(model(ids).logits, sql)
    assert not torch.equal(sql, base)
    adapters.set_adapter(None)
    assert torch.equal(model(ids).logits, base)


def words_to_run(command: str) -> list[str]:
    """Return the arguments of a regraft command, its answers cut short."""
    words = shlex.split(command.partition(">")[0], comments=True)[1:]
    if words[0] in ("generate", "chat"):
        words += ["--max-new-tokens", "4"]
    return words


def reason_not_to_run(command: str) -> str | None:
    """Return why a command is not run here, None for one that is."""
    return next((why for what, why in CANNOT_RUN.items() if re.search(what, command)), None)


def test_every_reason_not_to_run_is_needed() -> None:
    written = [command for page in PAGES for _, command in commands(page)]
    assert [p for p in CANNOT_RUN if not any(re.search(p, each) for each in written)] == []
    assert set(written) >= DIFFERS


@pytest.mark.parametrize("page", pages_with(SHELLS), ids=lambda page: page.name)
@pytest.mark.usefixtures("here")
def test_commands_run_in_order(page: Path) -> None:
    failed = []
    for line, command in commands(page):
        if reason_not_to_run(command):
            continue
        assert command.startswith("regraft "), f"{page.name}:{line}: {command}"
        words = words_to_run(command)
        if "-o" in words and "--overwrite" not in words:
            shutil.rmtree(words[words.index("-o") + 1], ignore_errors=True)
        result = CliRunner().invoke(app, words, input=TALK)
        if result.exit_code != (1 if command in DIFFERS else 0):
            failed.append(f"{page.name}:{line}: {command}\n{result.output}{result.exception!r}")
    assert not failed, "\n".join(failed)
