"""Byte-level BPE tokenizers in GGUF: llama.cpp makes the same tokens of texts."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from asking_llama_cpp import ask
from exporting.models import byte_level, digits, save_model, save_tokenizer, split
from exporting.texts import texts
from regraft.errors import FormatError, MismatchError, UnsupportedError
from regraft.exporting.tokens.pretokenizers import _LLAMA3, _QWEN2, _QWEN35, KNOWN
from regraft.exporting.verb import export
from regraft.formats.gguf import GgufArray, open_gguf

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "smollm": (digits(), {}),
    "starcoder": (digits(), {"clean_up_tokenization_spaces": True}),
    "llama-bpe": (split(_LLAMA3), {"ignore_merges": True, "bos": True}),
    "dbrx": (split(_LLAMA3), {}),
    "qwen2": (split(_QWEN2), {}),
    "stablelm2": (split(_QWEN2), {"clean_up_tokenization_spaces": True}),
    "qwen35": (split(_QWEN35), {}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tokens") / "model", "llama")


def with_tokenizer(model: Path, kind: str, **more: Any) -> Tokenizer:
    pre, settings = KINDS[kind]
    settings = dict(settings) | more
    saved = {k: settings.pop(k) for k in ("clean_up_tokenization_spaces",) if k in settings}
    tokenizer = byte_level(pre, **settings)
    save_tokenizer(model, tokenizer, **saved)
    return tokenizer


def test_every_pre_tokenizer_is_tried() -> None:
    assert KINDS.keys() == {each.name for each in KNOWN}


def test_the_texts_tell_all_that_split_in_other_ways_apart() -> None:
    told: dict[tuple[Any, ...], Any] = {}
    for known in KNOWN:
        pre, settings = KINDS[known.name]
        tokenizer = byte_level(pre, ignore_merges=settings.get("ignore_merges", False))
        told[known.steps, known.ignores_merges] = [tokenizer.encode(text).ids for text in texts()]
    assert all(one != other for one, other in combinations(told.values(), 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_makes_the_same_tokens(kind: str, model: Path, tmp_path: Path) -> None:
    tokenizer = with_tokenizer(model, kind)
    report = export(model, tmp_path / "out.gguf")
    assert report.tokenizer == f"gpt2 ({kind})"
    asked = texts()
    found = ask(tmp_path / "out.gguf", tmp_path, texts=asked)["tokens"]
    expected = [tokenizer.encode(text).ids for text in asked]
    wrong = [(text, f, e) for text, f, e in zip(asked, found, expected, strict=True) if f != e]
    assert not wrong, (len(wrong), wrong[:5])


def test_special_tokens_and_templates_go_along(model: Path, tmp_path: Path) -> None:
    with_tokenizer(model, "llama-bpe")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir(exist_ok=True)
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    export(model, tmp_path / "out.gguf")
    keys = open_gguf(tmp_path / "out.gguf").metadata
    named = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    assert named == {"bos": 631, "eos": 632, "padding": 0}
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.chat_template.tools"] == "{{ tools }}"
    kinds = keys["tokenizer.ggml.token_type"]
    assert isinstance(kinds, tuple)
    assert [kinds[row] for row in (0, 5, 631, 633, 634)] == [3, 1, 3, 4, 5]
    (model / "chat_template.jinja").unlink()


def changed(model: Path, change: Any) -> None:
    """Change the saved ``tokenizer.json``."""
    with_tokenizer(model, "gpt-2")
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


REFUSED = {
    "splits": lambda c: c.update(pre_tokenizer=json.loads(split("[a-z]+").__getstate__())),
    "normalize": lambda c: c.update(normalizer=json.loads(normalizers.NFKC().__getstate__())),
    "no such byte-level BPE": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "kind of tokenizer": lambda c: c["model"].update(type="WordPiece"),
    "other tokens around": lambda c: c.update(post_processor={
        "type": "TemplateProcessing", "special_tokens": {"a": {"ids": [7]}},
        "single": [{"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}],
    }),
    "put around": lambda c: c.update(post_processor={"type": "BertProcessing"}),
    "space in it": lambda c: c["model"]["merges"].append(["a b", "c"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_engine_would_not_follow_is_refused(
    what: str, model: Path, tmp_path: Path
) -> None:
    changed(model, REFUSED[what])
    with pytest.raises(UnsupportedError, match=what) as caught:
        export(model, tmp_path / "out.gguf")
    assert "--like" in str(caught.value)
    assert not list(tmp_path.iterdir())


GARBAGE = {
    "no vocabulary": lambda c: c["model"].pop("vocab"),
    "a list of tokens": lambda c: c["model"].update(vocab=["a", "b"]),
    "merges of numbers": lambda c: c["model"].update(merges=[1, 2]),
    "a token of no number": lambda c: c["model"]["vocab"].update(zz="x"),
    "added tokens of text": lambda c: c.update(added_tokens=["a"]),
    "rules of a list": lambda c: c.update(post_processor=[1]),
}  # fmt: skip


@pytest.mark.parametrize("what", GARBAGE)
def test_files_that_describe_no_tokenizer_are_refused(
    what: str, model: Path, tmp_path: Path
) -> None:
    changed(model, GARBAGE[what])
    with pytest.raises(FormatError, match="do not describe a tokenizer"):
        export(model, tmp_path / "out.gguf")


def test_a_token_without_a_row_is_refused(model: Path, tmp_path: Path) -> None:
    changed(model, lambda c: c["model"]["vocab"].update(zz=700))
    with pytest.raises(FormatError, match=r"without a row of the embedding.*700 for 'zz'"):
        export(model, tmp_path / "out.gguf")


def test_nfc_is_told(model: Path, tmp_path: Path) -> None:
    save_tokenizer(model, byte_level(split(_QWEN2), normalizers.NFC()))
    report = export(model, tmp_path / "out.gguf")
    assert "NFC" in " ".join(report.notes)


def test_the_tokenizer_of_another_file_is_copied(model: Path, tmp_path: Path) -> None:
    with_tokenizer(model, "llama-bpe")
    export(model, tmp_path / "base.gguf")
    changed(model, REFUSED["splits"])
    report = export(model, tmp_path / "out.gguf", like=tmp_path / "base.gguf")
    assert report.tokenizer == "gpt2 (llama-bpe), of base.gguf"
    one, other = (open_gguf(tmp_path / f"{name}.gguf").metadata for name in ("base", "out"))
    assert _plain(one) == _plain(other)


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    return {k: v.values() if isinstance(v, GgufArray) else v for k, v in own.items()}


def test_another_models_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    with_tokenizer(model, "gpt-2")
    export(model, tmp_path / "base.gguf")
    changed(model, _swap)
    with pytest.raises(MismatchError, match="a token is another one") as caught:
        export(model, tmp_path / "out.gguf", like=tmp_path / "base.gguf")
    assert len(caught.value.problems) == 2
    small = save_model(tmp_path / "small", "llama", vocab_size=635)
    with pytest.raises(MismatchError, match="635 tokens, one for each row"):
        export(small, tmp_path / "out.gguf", like=tmp_path / "base.gguf")


def _swap(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]
