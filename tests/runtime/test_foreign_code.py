"""Python code that lies with a model is not run, whatever answers when transformers asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging import toys

pytest.importorskip("transformers")

from regraft.runtime.generating import open_speaker


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toys.write_base(tmp_path / "base")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the code of :func:`with_code` makes; whoever is asked says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def with_code(folder: Path, file: str, ran: Path, **changes: Any) -> Path:
    """Let a JSON file of a model name classes of a module beside it."""
    path = folder / file
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(fields | changes))
    (folder / "added.py").write_text(f"open({str(ran)!r}, 'w')\n")
    return folder


OWN_MODEL = {
    "model_type": "added",
    "auto_map": {"AutoConfig": "added.C", "AutoModelForCausalLM": "added.M"},
}


def test_a_model_of_its_own_class_is_refused_by_name(base: Path, ran: Path) -> None:
    folder = with_code(base, "config.json", ran, **OWN_MODEL)
    with pytest.raises(regraft.UnsupportedError, match=r"Python code.*merging needs no code"):
        open_speaker(str(folder))
    assert not ran.exists()


def test_a_model_of_its_own_class_is_not_loaded_merged(
    base: Path, tmp_path: Path, ran: Path
) -> None:
    adapter = toys.write_adapter(tmp_path / "a")
    folder = with_code(base, "config.json", ran, **OWN_MODEL)
    with pytest.raises(regraft.UnsupportedError, match="Python code"):
        regraft.load_merged(folder, adapter)
    assert not ran.exists()


def test_a_kind_of_model_that_is_not_known_is_said_to_be(base: Path, ran: Path) -> None:
    folder = with_code(base, "config.json", ran, model_type="added")
    with pytest.raises(regraft.UnsupportedError, match="does not know this kind of model"):
        open_speaker(str(folder))


def test_a_tokenizer_of_its_own_class_is_refused_by_name(tmp_path: Path, ran: Path) -> None:
    folder = toys.write_base(tmp_path / "m")
    own = {"AutoTokenizer": ["added.T", None]}
    with_code(folder, "tokenizer_config.json", ran, tokenizer_class="T", auto_map=own)
    with pytest.raises(regraft.RegraftError):
        open_speaker(str(folder))
    assert not ran.exists()
