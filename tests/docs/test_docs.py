"""The documentation keeps step with the code.

``python tests/docs/test_docs.py`` writes the table of tested cases into docs/faithfulness.md anew.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

import regraft

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README_LINES = 60

GENERATED = {DOCS / "benchmarks.md"}
"""Pages that a command of the Makefile writes; a link to one holds before it has run."""

BEGIN, END = "<!-- cases: begin -->", "<!-- cases: end -->"

DESCRIBED = {
    "regraft.engines.report": ("EngineReport", "Finding"),
    "regraft.errors": ("Problem",),
    "regraft.exporting.report": ("ExportReport",),
    "regraft.inspection": (
        *("Inspection", "ModelFacts", "MergeFacts", "AdapterFacts", "DTypeShare", "FileFacts"),
    ),
    "regraft.probing.report": ("ProbeReport", "PromptProbe"),
    "regraft.progress": ("ProgressEvent",),
    "regraft.merging.planning.plan": ("Plan",),
    "regraft.merging.files.receipt": ("Receipt", "InputRecord", "TensorRecord", "Totals"),
    "regraft.merging.files.leftovers": ("Leftover",),
    "regraft.merging.planning.report": ("CheckReport", "UnmergeReport"),
    "regraft.runtime.store.cache": ("CacheStats",),
    "regraft.runtime.in_place.merge": ("MergeReport",),
    "regraft.combining.report": ("CombineReport", "CombinedModule"),
    "regraft.extracting.report": ("ExtractReport", "ExtractedModule"),
    "regraft.shrinking.report": ("ShrinkReport", "ShrunkModule", "EmbeddingCopy"),
    "regraft.translating": ("AdapterConversion",),
    "regraft.verifying.report": ("VerifyReport", "Difference", "TensorVerdict"),
    "regraft.verifying.prompting.report": ("PromptReport", "PromptAgreement"),
    "regraft.verifying.diffing.report": (
        *("DiffReport", "DiffSide", "LoneTensor", "TensorChange", "ConfigChange", "FileChange"),
        "DeltaChange",
    ),
}
"""Classes whose every field docs/reference-python.md has to name."""

SHELLS = ("console", "bash", "sh")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of the languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
    return [body for language, body in blocks if language in languages]


def commands() -> dict[str, click.Command]:
    """Return every command by name."""
    from regraft.cli.app import app

    context = click.Context(app)
    names = app.list_commands(context)
    found = {name: app.get_command(context, name) for name in names}
    return {name: command for name, command in found.items() if command is not None}


def options_of(command: click.Command) -> set[str]:
    """Return every spelling of every option of a command."""
    parameters = command.get_params(click.Context(command))
    chosen = [p for p in parameters if isinstance(p, click.Option)]
    return {spelling for p in chosen for spelling in (*p.opts, *p.secondary_opts)}


def section(page: Path, title: str) -> str:
    """Return what stands under a heading of the second level."""
    match = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", read(page), re.M | re.DOTALL)
    assert match, f"{name_of(page)} has no section {title!r}"
    return match[1]


# -- reference pages -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", commands())
def test_every_option_is_in_the_reference(name: str) -> None:
    text = section(DOCS / "reference-cli.md", f"regraft {name}")
    assert [option for option in options_of(commands()[name]) if f"`{option}" not in text] == []


def test_every_exit_code_is_in_the_reference() -> None:
    from regraft.cli.app import READER_GONE
    from regraft.cli.failures import INTERNAL, INTERRUPTED

    errors = {getattr(regraft, name) for name in regraft.__all__ if name.endswith("Error")}
    codes = {kind.exit_code for kind in errors} | {READER_GONE, INTERNAL, INTERRUPTED, 0}
    text = section(DOCS / "reference-cli.md", "Exit codes")
    assert [code for code in codes if f"| {code} |" not in text] == []


def test_every_public_name_is_in_the_reference() -> None:
    text = read(DOCS / "reference-python.md")
    assert [name for name in regraft.__all__ if f"`{name}" not in text] == []


@pytest.mark.parametrize(
    ("module", "kind"), [(m, kind) for m, kinds in DESCRIBED.items() for kind in kinds]
)
def test_every_field_is_in_the_reference(module: str, kind: str) -> None:
    text = read(DOCS / "reference-python.md")
    names = [field.name for field in fields(getattr(importlib.import_module(module), kind))]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_method_of_the_handle_is_in_the_reference() -> None:
    text = section(DOCS / "reference-python.md", "Live models")
    public = [n for n in vars(regraft.Adapters) if not n.startswith("_") and n != "base"]
    assert [n for n in public if f"`{n}" not in text and f"`{n}(" not in text] == []


def test_every_documented_signature_has_all_parameters() -> None:
    import inspect

    text = read(DOCS / "reference-python.md")
    verbs = (
        *("merge", "unmerge", "swap", "plan", "check", "verify", "inspect", "diff", "shrink"),
        *("clean", "save", "load_merged", "attach", "convert", "probe", "combine", "extract"),
    )
    for verb in verbs:
        match = re.search(rf"^regraft\.{verb}\((.*?)\) ->", text, re.M | re.DOTALL)
        assert match, f"no signature of {verb}"
        names = re.findall(r"(\w+)(?=:)", re.sub(r'"[^"]*"', "", match[1]))
        assert names == list(inspect.signature(getattr(regraft, verb)).parameters)


# -- links and examples ----------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            yield target


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target in GENERATED and not target.exists():
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {link.partition("#")[0] for link in links(DOCS / "index.md")}
    assert [p.name for p in DOCS.glob("*.md") if p.name not in listed | {"index.md"}] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_compile_and_name_what_exists(page: Path) -> None:
    for block in fences(page, "python"):
        compile(block, name_of(page), "exec")
        nodes = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)]
        used = {n.attr for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "regraft"}
        assert used <= {*regraft.__all__, "Adapters"}


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command of a page's shell examples; output has no ``$``."""
    for block in fences(page, *SHELLS):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield shlex.split(line[2:], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_shell_examples_name_commands_and_options_that_exist(page: Path) -> None:
    known, targets = commands(), set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.M))
    for words in shell_lines(page):
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        if words[0] != "regraft" or len(words) == 1 or words[1].startswith("-"):
            continue
        assert words[1] in known, words
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("-")}
        assert used <= options_of(known[words[1]]) | {"--help", "-h"}, words


# -- README ----------------------------------------------------------------------------------------


def test_the_readme_fits_one_screen() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES


def test_the_readmes_test_command_is_what_ci_runs() -> None:
    run = read(ROOT / ".ci" / "run").splitlines()
    readme = [" ".join(words) for words in shell_lines(ROOT / "README.md")]
    assert "make test" in readme
    assert "make test" in run


def test_the_readme_has_the_place_for_the_figures() -> None:
    assert read(ROOT / "README.md").count("<!-- figures -->") == 2


# -- the table of tested cases ---------------------------------------------------------------------


def _groups() -> dict[str, list[Any]]:
    """Return the case lists of the faithfulness tests, by the title of their column."""
    from faithful import cases, embedding_cases

    return {
        "every layer": cases.everywhere(),
        "targets": cases.TARGETS,
        "inits": cases.INITS,
        "biases": [*cases.BIASES, *cases.LORA_BIASES],
        "experts": cases.EXPERTS,
        "convolutions": cases.CONVS,
        "several": cases.SEVERAL,
        "embeddings": embedding_cases.EMBEDDINGS,
        "ties": embedding_cases.TIED,
        "whole modules": embedding_cases.WHOLE_MODULES,
        "token rows": embedding_cases.TOKEN_ROWS,
        "grown": embedding_cases.GROWN_VOCABULARIES,
    }


def cases_table() -> str:
    """Return the number of cases per architecture and group as a Markdown table."""
    groups = {title: Counter(c.architecture for c in list_) for title, list_ in _groups().items()}
    rows = [["architecture", *groups], ["---", *(["---:"] * len(groups))]]
    for architecture in dict.fromkeys(name for counts in groups.values() for name in counts):
        counts = [str(group[architecture] or "") for group in groups.values()]
        rows.append([f"`{architecture}`", *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_of_cases_is_up_to_date() -> None:
    written = read(DOCS / "faithfulness.md").partition(BEGIN)[2].partition(END)[0].strip()
    assert written == cases_table(), "run: python tests/docs/test_docs.py"


def main() -> None:
    """Write the table anew."""
    sys.path.insert(0, str(ROOT / "tests"))
    page = DOCS / "faithfulness.md"
    head, _, rest = read(page).partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n{cases_table()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
