"""The card's metadata: only what can be a Hub id is named as one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

import regraft
from merging import toys
from regraft.merging.files.card import hub_id, repository_of


@pytest.mark.parametrize(
    ("claimed", "named"), [("org/base-1.5B", True), (".demo/base", False), ("../x/y", False)]
)
def test_the_base_is_named_only_if_it_can_be_a_hub_id(
    tmp_path: Path, claimed: str, named: bool
) -> None:
    base = toys.write_base(tmp_path / "base")
    adapter = toys.write_adapter(tmp_path / "a", base_model_name_or_path=claimed)
    regraft.merge(base, adapter, tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert (f"- {claimed}\n" in front) == named


def front_and_text(folder: Path) -> tuple[str, str]:
    """Return a card's metadata and the rest of it."""
    _, front, text = (folder / "README.md").read_text().split("---", 2)
    return front, text


def test_a_base_in_a_folder_is_named_as_its_config_does_if_that_is_a_hub_id(tmp_path: Path) -> None:
    adapter = toys.write_adapter(
        tmp_path / "a", base_model_name_or_path=str(tmp_path / "elsewhere")
    )
    for number, name in enumerate(("org/base", str(tmp_path / "elsewhere"))):
        base = toys.write_base(tmp_path / f"base{number}", config={"_name_or_path": name})
        regraft.merge(base, adapter, tmp_path / f"out{number}")
        front, text = front_and_text(tmp_path / f"out{number}")
        assert ("org/base" in front) == (name == "org/base")
        assert str(tmp_path) not in front + text
        assert f"| base | `base{number}` | |" in text


def test_a_base_in_the_hubs_cache_is_named_as_its_repository(tmp_path: Path) -> None:
    base = toys.write_base(tmp_path / "models--org--base" / "snapshots" / "0123abc")
    regraft.merge(base, toys.write_adapter(tmp_path / "a"), tmp_path / "out")
    front, text = front_and_text(tmp_path / "out")
    assert "- org/base\n" in front
    assert "| base | `org/base` | |" in text
    assert "0123abc" not in text


@pytest.mark.parametrize(
    ("name", "title"), [("m.tmp", "m"), (".m.tmp", "m"), ("tmp_m", "m"), ("tmpk3x_19ab", "merged")]
)
def test_a_card_does_not_name_a_folder_that_is_temporary(
    tmp_path: Path, name: str, title: str
) -> None:
    base = toys.write_base(tmp_path / "base")
    regraft.merge(base, toys.write_adapter(tmp_path / "a"), tmp_path / name)
    _, text = front_and_text(tmp_path / name)
    assert f"\n# {title}\n" in text
    assert f'from_pretrained("{title}")' in text
    assert ".tmp" not in text


@pytest.mark.parametrize(
    "line", ["license: 2001-99-99", "license: 0x_", "license: !!int abc", "license: " + "[" * 9000]
)
def test_a_card_of_the_base_that_cannot_be_read_hands_nothing_on(tmp_path: Path, line: str) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "a")
    for folder in (base, adapter):
        (folder / "README.md").write_text(f"---\n{line}\n---\n# Model Card for Model ID\n")
    regraft.merge(base, adapter, tmp_path / "out")
    regraft.shrink(adapter, tmp_path / "small")
    for name in ("out", "small"):
        assert "license" not in front_and_text(tmp_path / name)[0]


def test_a_base_by_a_name_that_no_file_can_have_is_merged(base: Path, tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a", base_model_name_or_path="a" * 300 + "/b")
    regraft.merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file()
    with pytest.raises(regraft.RegraftError):
        regraft.merge(None, adapter, tmp_path / "other")


EVIL = "x`|y\n```\nimport os\nos.system('id')\n\"\"\"$(id);'\x1b[2J<script>"


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Return the language and content of every block of code, as Markdown sees them."""
    found, fence, lines, language = [], "", list[str](), ""
    for line in text.splitlines():
        marks = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(marks) >= 3:
            fence, language, lines = marks, line.strip("`"), []
        elif fence and line == fence:
            found.append((language, "\n".join(lines)))
            fence = ""
        elif fence:
            lines.append(line)
    return found


def strings_in(code: str) -> set[object]:
    return {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)}


def test_names_of_strangers_stay_words_in_the_card_of_a_merge(tmp_path: Path) -> None:
    names = [EVIL.replace("/", ""), f"a{EVIL}", f"out{EVIL}"]
    base = toys.write_base(tmp_path / names[0], config={"_name_or_path": EVIL})
    adapter = toys.write_adapter(tmp_path / names[1], base_model_name_or_path=EVIL, revision=EVIL)
    regraft.merge(base, adapter, tmp_path / names[2], command=f"regraft merge {EVIL}")
    front, text = front_and_text(tmp_path / names[2])
    assert set(yaml.safe_load(front)) == {"library_name", "tags"}
    (_, python), (_, command) = blocks_of(text)
    assert strings_in(python) == {names[2]}
    assert python.count("\n") == 2
    assert command.startswith("regraft merge ")
    others = [line for line in text.splitlines() if line.startswith(("import", "os.", "<script"))]
    assert all(line in command for line in others)
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.startswith("| ") and line[-1] != "|"]


@pytest.mark.parametrize(
    "name", ["org/name\n", "org/na me", "org/a--b", "örg/name", "a/b/c", "x/.."]
)
def test_only_what_can_be_a_hub_id_is_one(name: str) -> None:
    assert hub_id(name) is None
    assert repository_of(name) is None


def test_a_config_may_name_anything_as_its_base() -> None:
    assert repository_of(5) is None  # type: ignore[arg-type]
    assert hub_id(["org/name"]) is None  # type: ignore[arg-type]


def test_a_command_has_folders_by_their_names_alone_in_their_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys.write_base(tmp_path / "base")
    toys.write_adapter(tmp_path / "my adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = "regraft merge ../base '../my adapter=1.0' -o new"
    regraft.merge("../base", "../my adapter", "new", command=command)
    assert "regraft merge base 'my adapter=1.0' -o new\n" in front_and_text(Path("new"))[1]
