"""SentencePiece tokenizers in GGUF: llama.cpp makes the same tokens of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from asking_llama_cpp import ask
from exporting.models import CORPUS, SPECIAL, save_model, save_tokenizer
from exporting.texts import texts
from regraft.errors import FormatError, UnsupportedError
from regraft.exporting.verb import export
from regraft.formats.gguf import open_gguf


def train(folder: Path, **more: Any) -> Path:
    """Train a small SentencePiece model as Llama 2's was; return its file."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in CORPUS * 4))
    settings: dict[str, Any] = {
        "vocab_size": 520, "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "character_coverage": 0.98, "allow_whitespace_only_pieces": True, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), **settings | more
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def merges(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs that make up pieces, piece by piece, as transformers converts them."""
    known = set(pieces)
    for text in pieces:
        for at in range(1, len(text)):
            if text[:at] in known and text[at:] in known:
                yield text[:at], text[at:]


def converted(path: Path, normalizer: Any, pre: Any) -> Tokenizer:
    """Return a SentencePiece model as a tokenizer of the ``tokenizers`` library."""
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [own.id_to_piece(row) for row in range(own.vocab_size())]
    normal = [text for row, text in enumerate(pieces) if row > 2 and not own.is_byte(row)]
    bpe = BPE(
        {text: row for row, text in enumerate(pieces)}, list(merges(normal)),
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIAL[1:3]])
    tokenizer.add_tokens([AddedToken(SPECIAL[3], normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def llama() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def gemma() -> Any:
    return normalizers.Replace(" ", "▁")


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (llama(), None),
    "gemma": (gemma(), pre_tokenizers.Split(" ", "merged_with_previous")),
    "never": (None, metaspace("never")),
    "always": (None, metaspace("always")),
    "first": (None, metaspace("first")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_makes_the_same_tokens(
    kind: str, trained: Path, model: Path, tmp_path: Path
) -> None:
    tokenizer = converted(trained, *KINDS[kind])
    save_tokenizer(model, tokenizer, bos_token="<s>")
    report = export(model, tmp_path / "out.gguf")
    assert report.tokenizer == "llama (SentencePiece)"
    asked = [text for text in texts() if text and _is_alike(kind, text)]
    assert len(asked) > 100
    found = ask(tmp_path / "out.gguf", tmp_path, texts=asked)["tokens"]
    expected = [tokenizer.encode(text).ids for text in asked]
    wrong = [(text, f, e) for text, f, e in zip(asked, found, expected, strict=True) if f != e]
    assert not wrong, (len(wrong), wrong[:5])
    assert len(report.notes) == {"always": 1, "first": 2}.get(kind, 0)


def _is_alike(kind: str, text: str) -> bool:
    """Whether a text is none of those that the notes say llama.cpp differs on."""
    after = [part for special in SPECIAL[1:] for part in text.split(special)[1:]]
    if kind == "always":
        return not any(part.startswith((" ", "▁")) for part in (text, *after))
    return kind != "first" or not (text.startswith(" ") or after)


def test_a_model_file_alone_gives_its_own_tokens(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    (model / "tokenizer.model").write_bytes(trained.read_bytes())
    settings = {
        "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
        "added_tokens_decoder": {"600": {"content": "<|im_start|>", "special": True}},
    }  # fmt: skip
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    export(model, tmp_path / "out.gguf")
    own = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    asked = [text for text in texts() if text and not any(each in text for each in SPECIAL)]
    found = ask(tmp_path / "out.gguf", tmp_path, texts=[*asked, "<|im_start|>"])["tokens"]
    expected = [[1, *own.encode(text)] for text in asked]
    wrong = [(t, f, e) for t, f, e in zip(asked, found, expected, strict=False) if f != e]
    assert not wrong, (len(wrong), wrong[:5])
    assert found[-1] == [1, 600]


def test_both_files_give_the_same_order_of_scores(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    save_tokenizer(model, converted(trained, *KINDS["llama"]), bos_token="<s>")
    export(model, tmp_path / "rules.gguf")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(trained.read_bytes())
    export(model, tmp_path / "model.gguf")
    rules, own = (_tokens(tmp_path / f"{name}.gguf") for name in ("rules", "model"))
    joined = [text for text, (kind, score) in rules.items() if kind == 1 and score > -1e6]
    assert len(joined) > 50
    by_rules = sorted(joined, key=lambda text: rules[text][1])
    assert by_rules == sorted(joined, key=lambda text: own[text][1])


def _tokens(path: Path) -> dict[str, tuple[int, float]]:
    keys = open_gguf(path).metadata
    texts, kinds, scores = (
        keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores")
    )
    assert isinstance(kinds, tuple)
    assert isinstance(scores, tuple)
    pairs = zip(kinds, scores, strict=True)
    return dict(zip(texts.values(), pairs, strict=True))  # type: ignore[union-attr]


ODD: dict[str, dict[str, Any]] = {
    "another kind than BPE": {"model_type": "unigram", "vocab_size": 450},
    "no bytes": {"byte_fallback": False, "vocab_size": 300},
    "characters that are replaced": {"normalization_rule_name": "nmt_nfkc"},
    "spaces that are removed": {"remove_extra_whitespaces": True},
    "spaces as suffixes": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("what", ODD)
def test_other_kinds_of_model_files_are_refused(what: str, model: Path, tmp_path: Path) -> None:
    train(tmp_path, **ODD[what])
    (model / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    with pytest.raises(UnsupportedError, match=what):
        export(model, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("cut", [1, 2, 50, 1000, 3001])
def test_a_model_file_cut_short_is_refused(
    cut: int, trained: Path, model: Path, tmp_path: Path
) -> None:
    (model / "tokenizer.model").write_bytes(trained.read_bytes()[:cut])
    with pytest.raises((FormatError, UnsupportedError)):
        export(model, tmp_path / "out.gguf")


def test_merges_that_no_scores_have_are_refused(trained: Path, model: Path, tmp_path: Path) -> None:
    for what, change in {
        "a merge is missing": lambda m: m.pop(40),
        "an order that no scores have": lambda m: m.append(m[0]),
    }.items():
        save_tokenizer(model, converted(trained, *KINDS["llama"]), bos_token="<s>")
        path = model / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content["model"]["merges"])
        path.write_text(json.dumps(content))
        with pytest.raises(UnsupportedError, match=what):
            export(model, tmp_path / "out.gguf")
