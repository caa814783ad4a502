"""Without a base, the one that the adapters name is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import regraft
from merging import toys
from regraft.cli.app import app
from regraft.errors import InputError, UsageError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base")


def naming(folder: Path, base: str | None) -> Path:
    return toys.write_adapter(folder, base_model_name_or_path=base)


def test_the_named_base_is_merged_into(base: Path, tmp_path: Path) -> None:
    adapter = naming(tmp_path / "adapter", str(base))
    receipt = regraft.merge(None, adapter, tmp_path / "out")
    assert receipt.base.source == str(base)
    regraft.merge(base, adapter, tmp_path / "usual")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "usual")]
    assert weights[0] == weights[1]
    assert regraft.check(None, adapter).ok
    assert regraft.plan(None, adapter).base.source == str(base)


def test_a_relative_path_starts_here_or_at_the_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    assert regraft.plan(None, naming(tmp_path / "a", "base")).base.source == "base"
    monkeypatch.chdir("/")
    beside = naming(tmp_path / "b", f"../{base.name}")
    assert Path(regraft.plan(None, beside).base.source).resolve() == base.resolve()


def test_a_named_path_that_is_not_here_is_told_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./gone", "../gone/base", "/gone/base"):
        adapter = naming(tmp_path / "adapter", name)
        with pytest.raises(InputError, match="the base that the adapter names is not here") as said:
            regraft.plan(None, adapter)
        (problem,) = said.value.problems
        assert name in problem.found
        places = [name] if name.startswith("/") else [str(tmp_path), str(adapter)]
        assert all(place in problem.expected for place in places)
        assert problem.hint == "Name the base before the adapters"


def test_the_command_line_says_which(base: Path, tmp_path: Path) -> None:
    adapter = naming(tmp_path / "adapter", str(base))
    out = str(tmp_path / "out")
    for words in (["merge", f"{adapter}=0.5", "-o", out], ["check", str(adapter)]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert f"base: {base}, which the adapter names" in result.stderr
    alone = CliRunner().invoke(app, ["merge", str(base), "-o", str(tmp_path / "other")])
    assert alone.exit_code == 2
    assert "Missing argument 'ADAPTER" in alone.output


def test_adapters_that_name_no_base_or_several_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="do not name one base"):
        regraft.merge(None, naming(tmp_path / "none", None), tmp_path / "out")
    both = [naming(tmp_path / "a", str(base)), naming(tmp_path / "b", "org/other")]
    with pytest.raises(UsageError, match=r"org/other.*Name the base before the adapters"):
        regraft.check(None, both)
