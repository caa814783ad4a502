"""``regraft generate``: one answer."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

import regraft
from cli.kinds import Run
from cli.speakers import TEMPLATE, write_adapter, write_speaker, write_square
from regraft.cli.app import app
from regraft.runtime import generating

PROMPT = "w7 w8 w9"
SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaker(tmp_path_factory.mktemp("speaker") / "base")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    return write_speaker(tmp_path_factory.mktemp("talker") / "base", TEMPLATE)


@pytest.fixture(scope="module")
def adapters(base: Path) -> tuple[Path, Path]:
    """Two adapters, of which each makes the model say something else."""
    root = base.parent
    return write_adapter(base, root / "sql", 1), write_adapter(base, root / "json", 2)


def said(result: Result) -> dict[str, Any]:
    """Return what a command printed with ``--json``."""
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def expected(model: Any, prompt: str = PROMPT, count: int = 6) -> str:
    """Return the likeliest words, as transformers generates them."""
    ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
    made = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=2)
    return " ".join(f"w{token}" for token in made[0, ids.shape[1] :].tolist() if token != 2)


def test_a_base_says_what_transformers_lets_it_say(run: Run, base: Path) -> None:
    report = said(run("generate", base, "--prompt", PROMPT, "--json", *SHORT))
    assert report["text"] == expected(AutoModelForCausalLM.from_pretrained(base))
    assert (report["prompt"], report["adapters"]) == (PROMPT, [])
    assert 1 <= report["tokens"] <= 6
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["seconds"])


def test_without_json_the_answer_alone_is_on_stdout(run: Run, base: Path) -> None:
    result = run("generate", base, "--prompt", PROMPT, *SHORT)
    assert result.stdout == expected(AutoModelForCausalLM.from_pretrained(base)) + "\n"
    assert result.stderr == ""


@pytest.mark.slow
def test_adapters_speak_as_the_merged_model(
    run: Run, base: Path, adapters: tuple[Path, Path]
) -> None:
    sql, other = adapters
    options = ("--prompt", PROMPT, "--json", *SHORT)
    alone = said(run("generate", base, *options))["text"]
    one = said(run("generate", base, "--adapter", sql, *options))
    both = said(run("generate", base, "--adapter", sql, "--adapter", f"{other}=-0.5", *options))
    assert one["text"] == expected(regraft.load_merged(base, sql)) != alone
    assert both["text"] == expected(regraft.load_merged(base, [sql, (other, -0.5)]))
    assert both["text"] not in (alone, one["text"])
    assert both["adapters"] == [
        {"name": "sql", "source": str(sql), "weight": 1.0},
        {"name": "json", "source": str(other), "weight": -0.5},
    ]


def test_base_adapter_and_merged_model_are_named_alike(
    run: Run, base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    regraft.merge(base, adapters[0], merged, undo=False)
    texts = {
        said(run("generate", source, "--prompt", PROMPT, "--json", *SHORT))["text"]
        for source in (adapters[0], merged)
    }
    assert texts == {expected(AutoModelForCausalLM.from_pretrained(merged))}


def test_a_prompt_is_read_from_stdin(base: Path) -> None:
    arguments = ["generate", str(base), "--prompt", "-", "--json", *SHORT]
    result = CliRunner(catch_exceptions=False).invoke(app, arguments, input=PROMPT)
    report = said(result)
    assert report["text"] == expected(AutoModelForCausalLM.from_pretrained(base))


def test_a_chat_template_is_used_unless_it_is_switched_off(run: Run, talker: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(talker)
    options = ("--prompt", PROMPT, "--json", *SHORT)
    told = said(run("generate", talker, "--system", "w9", *options))
    plain = said(run("generate", talker, "--no-chat-template", *options))
    assert told["text"] == expected(model, f"w4 w9 w5 {PROMPT} w6")
    assert plain["text"] == expected(model)
    assert told["text"] != plain["text"]


def test_an_answer_ends_where_the_generation_config_says(run: Run, talker: Path) -> None:
    options = ("--prompt", PROMPT, "--json", "--no-chat-template", "--max-new-tokens", "20")
    words = said(run("generate", talker, *options))["text"].split()
    end = next(i for i, word in enumerate(words) if i and word not in words[:i])
    config = talker / "generation_config.json"
    before = config.read_text()
    config.write_text(json.dumps({"eos_token_id": [int(words[end][1:])], "pad_token_id": 0}))
    try:
        report = said(run("generate", talker, *options))
    finally:
        config.write_text(before)
    assert report["text"].split() == words[: end + 1]


@pytest.mark.slow
def test_sampling_depends_on_the_seed(run: Run, base: Path) -> None:
    def text(*options: str) -> str:
        chosen = ("--json", "--max-new-tokens", "24", *options)
        return str(said(run("generate", base, "--prompt", PROMPT, *chosen))["text"])

    hot = ("--temperature", "3", "--top-p", "0.99")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1")
    assert len({text(*hot, "--seed", str(seed)) for seed in range(3)}) == 3
    assert text("--seed", "1") == text("--seed", "2")


def test_a_base_is_loaded_in_four_bits(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear4bit

    base = write_square(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    seen = []
    answer = generating.Speaker.answer
    monkeypatch.setattr(
        generating.Speaker, "answer", lambda s, *a, **k: (seen.append(s), answer(s, *a, **k))[1]
    )
    options = ("--prompt", PROMPT, "--json", *SHORT)
    report = said(run("generate", base, "--adapter", adapter, "--load-in-4bit", *options))
    layer = seen[0].model.model.layers[0].mlp.up_proj
    assert report["tokens"] > 0
    assert isinstance(layer, Linear4bit)
    assert (layer.weight.quant_type, layer.weight.quant_state.nested) == ("nf4", False)
    assert layer.compute_dtype == torch.bfloat16


# -- what goes wrong -------------------------------------------------------------------------------


def test_top_p_alone_is_refused(run: Run, base: Path) -> None:
    result = run("generate", base, "--prompt", "w1", "--top-p", "0.5")
    assert (result.exit_code, "--temperature" in result.stderr) == (2, True)


def test_a_missing_package_is_named_with_what_to_install(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.libraries.find_spec", missing("bitsandbytes"))
    result = run("generate", base, "--prompt", "w1", "--load-in-4bit")
    assert result.exit_code == 4
    assert "pip install bitsandbytes" in result.stderr


def missing(name: str) -> Any:
    return lambda wanted: None if wanted == name else importlib.util.find_spec(wanted)


def test_a_folder_without_a_model_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("generate", tmp_path / "empty", "--prompt", "w1", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["type"] == "InputError"


def test_a_model_without_a_tokenizer_is_refused(run: Run, base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((base / name).read_bytes())
    result = run("generate", bare, "--prompt", "w1")
    assert (result.exit_code, "tokenizer" in result.stderr) == (3, True)


def test_an_adapter_that_names_no_base_is_refused(
    run: Run, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in adapters[0].iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    result = run("generate", alone, "--prompt", "w1")
    assert (result.exit_code, "does not name its base" in result.stderr) == (3, True)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "garbage"), ("tokenizer.json", "[1]"), ("tokenizer.json", '{"a": 5}'),
     ("generation_config.json", "[1]"), ("tokenizer_config.json", "[" * 5000)],
)  # fmt: skip
def test_side_files_that_cannot_be_read_are_refused_by_type(
    run: Run, base: Path, tmp_path: Path, name: str, content: str
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    (odd / name).write_text(content)
    result = run("generate", odd, "--prompt", "w1", "--max-new-tokens", "1")
    assert result.exit_code == 3
    assert str(odd) in result.stderr
