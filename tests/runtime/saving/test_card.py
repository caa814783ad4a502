"""The card of a saved adapter: what configs name stays words."""

from __future__ import annotations

import ast
import os
import shlex
from pathlib import Path

import pytest
import yaml

from regraft.errors import UsageError
from regraft.runtime.saving.card import adapter_card
from regraft.runtime.saving.files import config_bytes
from regraft.runtime.saving.saved import with_base
from regraft.tensors import TensorSpec

EVIL = "x`|y\n```\nimport os\nos.system('id')\n\"\"\"$(id);'\x1b[2J<script>"
SPEC = TensorSpec("a.q|`\nproj.lora_A.weight", "F32", (1, 1), Path(), 0, 4)


def card(name: str, base: object, revision: object = None) -> str:
    config = {
        "base_model_name_or_path": base, "revision": revision, "task_type": "CAUSAL_LM", "r": 1,
        "lora_alpha": 1, "modules_to_save": [EVIL],
    }  # fmt: skip
    return adapter_card(name, config, [SPEC])


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of code of a language, each between fences of one length."""
    found = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.lstrip("`") == language and line.startswith("```"):
            fence = line.removesuffix(language)
            end = lines.index(fence, number)
            found.append("\n".join(lines[number + 1 : end]))
    return found


@pytest.mark.parametrize(
    ("name", "base", "revision"),
    [(EVIL.replace("/", ""), EVIL, EVIL), ("-rf", "-rf", "--x"), ("a b", "some base", "a\nb"),
     (os.fsdecode(b"x\xff"), os.fsdecode(b"y\xff"), None)],
)  # fmt: skip
def test_what_a_config_names_stays_in_its_literal_and_its_word(
    name: str, base: str, revision: str | None
) -> None:
    text = card(name, base, revision)
    text.encode()
    assert text.replace("\n", "").isprintable()
    for code in blocks(text, "python"):
        tree = ast.parse(code)
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert words == {name, Path(base).name, *([revision] if revision else [])}
        assert len(tree.body) == 4
    (line,) = blocks(text, "console")
    words = shlex.split(line.removeprefix("$ "))
    assert words[:2] + words[4:] == ["regraft", "merge", "-o", "merged"]
    assert not words[2].startswith("-")
    assert not words[3].startswith("-")
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"


def test_a_hub_id_is_named_and_a_usual_card_needs_no_quotes() -> None:
    text = card("mine", "org/base", "main")
    assert 'from_pretrained("org/base", revision="main")' in text
    assert "$ regraft merge org/base mine -o merged\n" in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/base"


@pytest.mark.parametrize("base", ["org/base\n", 5, ["org/base"], None])
def test_what_is_no_hub_id_is_not_in_the_metadata(base: object) -> None:
    assert "base_model" not in yaml.safe_load(card("mine", base).split("---")[1])


def test_a_token_in_a_bases_address_is_not_in_the_card() -> None:
    secret = "hf_" + "a1" * 17
    assert secret not in card("mine", f"https://huggingface.co/org/name?token={secret}")


def test_a_base_that_json_cannot_name_is_left_unnamed() -> None:
    config = with_base(
        {"base_model_name_or_path": os.fsdecode(b"/x\xff"), "task_type": "A"}, None, None
    )
    assert config["base_model_name_or_path"] is None
    assert b"null" in config_bytes(config)
    with pytest.raises(UsageError):
        config_bytes({"a": object()})
