"""Tied embeddings: what becomes of both sides, of the vocabulary, and of what the config says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from merging.toys import BF16, HIDDEN, VOCAB, draw, lora

HEAD, EMBED = "lm_head.weight", f"{toys.EMBED}.weight"
TIED = toys.CONFIG | {"tie_word_embeddings": True}
GROWN = VOCAB + 6


def tied_tensors(*, twice: bool) -> dict[str, np.ndarray]:
    """Return a tied llama's tensors: the one that two parameters share is there once or twice."""
    tensors = toys.llama_tensors()
    tensors[HEAD] = tensors[EMBED]
    return tensors if twice else {n: t for n, t in tensors.items() if n != HEAD}


def merged(
    folder: Path, tensors: toys.Tensors, config: Mapping[str, Any], factors: toys.Tensors,
    **settings: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:  # fmt: skip
    """Merge an adapter into a base; return the output's tensors and its config."""
    base = toys.write_base(folder / "base", tensors, config)
    adapter = toys.write_adapter(folder / "adapter", factors, **settings)
    regraft.merge(base, adapter, folder / "out")
    return toys.load(folder / "out"), toys.read_json(folder / "out" / "config.json")


def on_head(rows: int = VOCAB) -> dict[str, Any]:
    return lora("lm_head", rows, HIDDEN)


def delta_of(factors: toys.Tensors) -> np.ndarray:
    """Return what a pair of factors adds."""
    a, b = factors.values()
    return np.asarray(toys.ALPHA / toys.RANK * b @ a)


# -- a tie whose tensor the base stores twice ------------------------------------------------------


@pytest.mark.parametrize("changed", [HEAD, EMBED])
def test_a_base_that_stores_both_sides_comes_out_untied_where_one_is_changed(
    tmp_path: Path, changed: str
) -> None:
    tensors = tied_tensors(twice=True)
    factors: toys.Tensors = on_head()
    if changed == EMBED:
        factors = toys.embedding(toys.EMBED, VOCAB, HIDDEN)
    targets = ["lm_head"] if changed == HEAD else ["embed_tokens"]
    found, config = merged(tmp_path, tensors, TIED, factors, target_modules=targets)
    assert config["tie_word_embeddings"] is False
    same = EMBED if changed == HEAD else HEAD
    assert found[same].tobytes() == tensors[same].tobytes()
    assert found[changed].tobytes() != tensors[changed].tobytes()


def test_a_base_that_stores_both_sides_stays_tied_where_neither_is_changed(tmp_path: Path) -> None:
    found, config = merged(tmp_path, tied_tensors(twice=True), TIED, toys.attention())
    assert config["tie_word_embeddings"] is True
    assert found[HEAD].tobytes() == found[EMBED].tobytes()


# -- configs that hold the text model's in them ----------------------------------------------------

LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "text_config": {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": VOCAB,
                    "hidden_size": HIDDEN},
    "vision_config": {"model_type": "clip_vision_model"},
}  # fmt: skip
"""Of a model that sees."""


def seeing_tensors() -> dict[str, np.ndarray]:
    """Return the embedding and a layer of a model that sees."""
    body = "model.language_model"
    return {
        f"{body}.embed_tokens.weight": draw(VOCAB, HIDDEN, dtype=BF16),
        f"{body}.layers.0.self_attn.q_proj.weight": draw(HIDDEN, HIDDEN, dtype=BF16),
    }


def test_a_tie_that_parts_is_said_in_the_text_models_config_too(tmp_path: Path) -> None:
    tensors = seeing_tensors()
    found, config = merged(tmp_path, tensors, LLAVA, on_head(), target_modules=["lm_head"])
    assert set(found) == {*tensors, HEAD}
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == LLAVA["text_config"] | {"tie_word_embeddings": False}


def test_a_vocabulary_that_grew_is_said_in_the_text_models_config(tmp_path: Path) -> None:
    table = draw(GROWN, HIDDEN, seed=4)
    whole = {f"{toys.PREFIX}model.language_model.embed_tokens.weight": table}
    found, config = merged(
        tmp_path, seeing_tensors(), LLAVA, whole, modules_to_save=["embed_tokens"],
        target_modules=["q_proj"], ensure_weight_tying=True,
    )  # fmt: skip
    assert found["model.language_model.embed_tokens.weight"].shape == (GROWN, HIDDEN)
    assert config["text_config"] == LLAVA["text_config"] | {"vocab_size": GROWN}
    assert "vocab_size" not in config  # where it was not


def test_a_vocabulary_is_said_where_both_configs_had_it(tmp_path: Path) -> None:
    table = draw(GROWN, HIDDEN, seed=4)
    whole = {f"{toys.PREFIX}model.language_model.embed_tokens.weight": table}
    _, config = merged(
        tmp_path, seeing_tensors(), LLAVA | {"vocab_size": VOCAB}, whole,
        modules_to_save=["embed_tokens"], target_modules=["q_proj"], ensure_weight_tying=True,
    )  # fmt: skip
    assert (config["vocab_size"], config["text_config"]["vocab_size"]) == (GROWN, GROWN)


# -- an adapter's copies of the base's embeddings --------------------------------------------------


@pytest.mark.parametrize("order", [1, -1], ids=["copy first", "copy last"])
def test_a_copy_of_the_embedding_stands_for_the_bases_wherever_it_is_in_the_file(
    tmp_path: Path, order: int
) -> None:
    """The copy has the rows of new tokens, and so has the tied head that the delta is for."""
    copy = draw(GROWN, HIDDEN, seed=4, dtype=BF16)
    head, norm = on_head(GROWN), draw(HIDDEN, seed=6, dtype=BF16)
    whole = {f"{toys.PREFIX}{EMBED}": copy, f"{toys.PREFIX}model.norm.weight": norm,
             f"{toys.PREFIX}model.layers.0.input_layernorm.weight": norm}  # fmt: skip
    factors = dict([*whole.items(), *head.items()][::order])
    found, config = merged(
        tmp_path, tied_tensors(twice=False), TIED, factors, target_modules=["lm_head"],
        modules_to_save=["norm", "input_layernorm"],
    )  # fmt: skip
    assert found[EMBED].tobytes() == copy.tobytes()
    assert found["model.norm.weight"].tobytes() == norm.tobytes()
    expected = (copy.astype(np.float32) + delta_of(head)).astype(BF16)
    np.testing.assert_allclose(
        found[HEAD].astype(np.float32), expected.astype(np.float32), rtol=2.0**-7
    )
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (False, GROWN)


def test_a_trained_head_is_measured_against_the_copy_of_the_embedding_it_is_tied_to(
    tmp_path: Path,
) -> None:
    copy, head = (draw(GROWN, HIDDEN, seed=seed, dtype=BF16) for seed in (4, 5))
    whole = {f"{toys.PREFIX}{HEAD}": head, f"{toys.PREFIX}{EMBED}": copy}
    found, config = merged(
        tmp_path, tied_tensors(twice=False), TIED, whole, target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )  # fmt: skip
    assert (found[EMBED].tobytes(), found[HEAD].tobytes()) == (copy.tobytes(), head.tobytes())
    assert (config["tie_word_embeddings"], config["vocab_size"]) == (False, GROWN)


def test_what_peft_writes_along_or_twice_hides_nothing_that_comes_after_it(tmp_path: Path) -> None:
    """It writes the base's own embeddings along, and trained ones twice, when rows were added."""
    tables = {name: draw(GROWN, HIDDEN, seed=n) for n, name in enumerate([EMBED, HEAD])}
    whole = {f"{toys.PREFIX}model.norm.modules_to_save.weight": draw(HIDDEN, seed=7)}
    for name, table in tables.items():
        module = f"{toys.PREFIX}{name.removesuffix('.weight')}"
        whole |= {f"{module}.original_module.weight": draw(VOCAB, HIDDEN, seed=8)}
        whole |= {f"{module}.modules_to_save.weight": table, f"{module}.weight": table}
    found, config = merged(
        tmp_path, toys.llama_tensors(), toys.CONFIG, whole, target_modules=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens", "norm"],
    )  # fmt: skip
    for name, table in tables.items():
        assert found[name].tobytes() == table.astype(BF16).tobytes()
    assert found["model.norm.weight"].tobytes() == draw(HIDDEN, seed=7).astype(BF16).tobytes()
    assert config["vocab_size"] == GROWN


# -- tensors that the base lacks -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_head_that_the_base_lacks_gets_the_dtype_of_most_weights(
    tmp_path: Path, dtype: str | None
) -> None:
    tensors = toys.llama_tensors()
    del tensors[HEAD]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    config = toys.CONFIG | {"architectures": ["LlamaModel"]}
    base = toys.write_base(
        tmp_path / "base", {n.removeprefix("model."): t for n, t in tensors.items()}, config
    )
    head = draw(3, HIDDEN, seed=8)  # float32, as training has it
    adapter = toys.write_adapter(
        tmp_path / "adapter", {f"{toys.PREFIX}score.weight": head, **toys.attention()},
        modules_to_save=["score"], task_type="SEQ_CLS",
    )  # fmt: skip
    regraft.merge(base, adapter, tmp_path / "out", dtype=dtype)
    found = next(t for n, t in toys.load(tmp_path / "out").items() if n == "score.weight")
    wanted: Any = np.float16 if dtype else BF16
    assert found.dtype == wanted
    assert found.tobytes() == head.astype(wanted).tobytes()
