"""Prompts through base + adapter and through the merged model."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import regraft
from merging.processes import errors, python
from regraft.adapters.dialects.peft import read_adapter
from regraft.cli.app import app
from regraft.formats.adapter_files import open_adapter
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.hub import locate
from regraft.merging.options import MergeOptions
from regraft.testing import zoo
from regraft.testing.adapters import make_adapter
from regraft.verifying.prompting import prompts
from regraft.verifying.prompting.file import read_prompts
from regraft.verifying.prompting.prompts import compare_prompts
from regraft.verifying.prompting.report import PromptReport, Tally, judged

OPTIONS = MergeOptions(threads=1)
PROMPTS = ("w3 w9 w12 w5 w40", "w7 w7 w8", "w11 w2 w30 w31 w32 w33 w50 w51")
TEMPLATE = (
    "{% for m in messages %}w5 {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w6{% endif %}"
)


@dataclass(frozen=True)
class Models:
    """A base, an adapter, and the right merge of the two."""

    base: Path
    adapter: Path
    merged: Path


def add_tokenizer(folder: Path, vocabulary: int = zoo.VOCAB, template: str | None = None) -> Path:
    """Write a tokenizer of whole words, w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def lora(**fields: Any) -> Any:
    """Return PEFT's config of a small adapter."""
    from peft import LoraConfig

    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(**{"r": 3, "target_modules": targets, "task_type": "CAUSAL_LM"} | fields)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Spare tiny models what only pays for large ones: threads, and looking for garbage."""
    import torch
    import transformers  # noqa: F401

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # for good: to undo it would undo all that the tests ever froze
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    base = add_tokenizer(zoo.make_base("llama", folder / "base"))
    adapter = make_adapter(base, folder / "adapter", lora())
    regraft.merge(base, adapter, folder / "merged", undo=False)
    return Models(base, adapter, folder / "merged")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


def compare(
    merged: Path, base: Path, adapters: Path | Sequence[tuple[Path, float]], file: Path,
    **options: Any,
) -> PromptReport:  # fmt: skip
    """Call what is tested, with everything opened as ``verify`` does."""
    pairs = [(adapters, 1.0)] if isinstance(adapters, Path) else adapters
    opened = [open_checkpoint(locate(path, kind="base")) for path in (merged, base)]
    read = [
        read_adapter(open_adapter(locate(path, kind="adapter")), weight) for path, weight in pairs
    ]
    return compare_prompts(*opened, read, file, OPTIONS, **options)


def test_a_right_merge_answers_the_same(models: Models, file: Path) -> None:
    events: list[regraft.ProgressEvent] = []
    report = compare(models.merged, models.base, models.adapter, file, progress=events.append)
    assert report.ok
    assert report.verdict == "same"
    assert (report.reference, report.dtype, report.truncated) == ("peft", "float32", 0)
    assert [(p.line, p.prompt, p.tokens) for p in report.prompts] == [
        (1, PROMPTS[0], 5), (3, PROMPTS[1], 3), (5, PROMPTS[2], 8),
    ]  # fmt: skip
    assert report.tokens == 16
    assert 0 < report.kl_mean <= report.kl_max < 1e-2
    assert report.base_kl_mean is not None
    assert report.base_kl_mean > 100 * report.kl_mean
    assert report.worst.kl_mean == max(prompt.kl_mean for prompt in report.prompts)
    assert (events[-1].stage, events[-1].done) == ("prompts", events[-1].total)
    assert events[-1].total == 3 * 16 * zoo.VOCAB * 4
    json.dumps(report.to_json(), allow_nan=False)


def test_the_figures_are_those_of_the_logits(models: Models, file: Path) -> None:
    import torch

    from regraft.testing.adapters import live_logits

    found = compare(models.merged, models.base, models.adapter, file).prompts[0]
    row = {"input_ids": torch.tensor([[3, 9, 12, 5, 40]])}
    live = torch.from_numpy(live_logits(models.base, models.adapter, row))[0].log_softmax(-1)
    has = torch.from_numpy(zoo.logits(zoo.load_base(models.merged), row))[0].log_softmax(-1)
    kl = torch.nn.functional.kl_div(has, live, reduction="none", log_target=True).sum(-1)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-3)
    assert found.top1_agreement == float((live.argmax(-1) == has.argmax(-1)).double().mean())


def test_without_rounding_nothing_is_left(models: Models, file: Path, tmp_path: Path) -> None:
    adapters = [(models.adapter, 0.7), (models.adapter, -1.6)]
    pairs = [(str(path), weight) for path, weight in adapters]
    regraft.merge(models.base, pairs, tmp_path / "out", dtype="float32", undo=False)
    report = compare(tmp_path / "out", models.base, adapters, file)
    assert report.top1_agreement == 1
    assert report.kl_max < 1e-9
    assert report.reference == "peft"


@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_a_wrong_merge_answers_differently(
    weight: float, models: Models, file: Path, tmp_path: Path
) -> None:
    merged = models.base
    if weight:
        merged = tmp_path / "out"
        regraft.merge(models.base, (models.adapter, weight), merged, undo=False)
    report = compare(merged, models.base, models.adapter, file)
    assert not report.ok
    assert report.verdict == "different"
    if not weight:
        assert report.kl_mean == report.base_kl_mean


def test_one_model_is_in_memory_at_a_time(
    models: Models, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = prompts.load_model

    def watched(*arguments: Any) -> Any:
        assert [model for model in loaded if model() is not None] == []
        model = load(*arguments)
        model.__dict__["part of a cycle"] = [model]
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(prompts, "load_model", watched)
    gc.disable()  # nothing is let go of by chance
    try:
        compare(models.merged, models.base, models.adapter, file)
    finally:
        gc.enable()
    assert len(loaded) == 3


def test_an_adapter_that_does_nothing_cannot_be_judged(models: Models, file: Path) -> None:
    report = compare(models.base, models.base, [(models.adapter, 1e-4)], file)
    assert not report.ok
    assert report.verdict == "unjudged"


def test_an_adapter_with_a_larger_vocabulary(models: Models, tmp_path: Path) -> None:
    def grow(model: Any) -> None:
        model.resize_token_embeddings(zoo.VOCAB + 4, mean_resizing=False)
        zoo.randomize(model)

    config = lora(modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    adapter = make_adapter(models.base, tmp_path / "adapter", config, prepare=grow)
    regraft.merge(models.base, adapter, tmp_path / "out", undo=False)
    add_tokenizer(tmp_path / "out", zoo.VOCAB + 4)
    (tmp_path / "prompts.txt").write_text("w3 w64 w5 w63 w62")
    report = compare(tmp_path / "out", models.base, adapter, tmp_path / "prompts.txt")
    assert report.ok
    assert report.base_kl_mean is None  # the base does not know the words


def test_long_prompts_are_cut(models: Models, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w1 " * 30 + "\nw2 w3")
    report = compare(
        models.merged, models.base, models.adapter, tmp_path / "prompts.txt", max_tokens=7
    )
    assert [prompt.tokens for prompt in report.prompts] == [7, 2]
    assert report.truncated == 1


def test_chats_and_prompts_of_json_lines(models: Models, tmp_path: Path) -> None:
    merged = add_tokenizer(shutil.copytree(models.merged, tmp_path / "out"), template=TEMPLATE)
    question = {"role": "user", "content": "w3 w4"}
    lines = [
        {"prompt": "w3 w4"},
        {"messages": [question]},
        {"messages": [question, {"role": "assistant", "content": "w8"}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    report = compare(merged, models.base, models.adapter, file)
    assert [(p.prompt, p.tokens) for p in report.prompts] == [("w3 w4", 2), ("w3 w4", 4), ("w8", 5)]
    with pytest.raises(regraft.InputError, match=r"line 2: .*no chat template") as caught:
        compare(models.merged, models.base, models.adapter, file)
    assert len(caught.value.problems) == 2


def raising(text: str) -> str:
    return "{{ raise_exception('" + text + "') }}"


def test_a_template_that_refuses_a_chat_names_the_line(models: Models, tmp_path: Path) -> None:
    merged = shutil.copytree(models.merged, tmp_path / "out")
    add_tokenizer(merged, template=raising("roles have to take turns"))
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "w1"}]}')
    with pytest.raises(regraft.InputError, match=r"line 1: .*roles have to take turns"):
        compare(merged, models.base, models.adapter, file)


# -- without PEFT, without torch -------------------------------------------------------------------


def test_without_peft_a_merge_that_is_not_rounded_answers(
    models: Models, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compare(models.merged, models.base, models.adapter, file)
    monkeypatch.setattr(
        "regraft.verifying.prompting.prompts.find_spec", lambda name: name != "peft" or None
    )
    found = compare(models.merged, models.base, models.adapter, file)
    assert found.reference == "float32 merge"
    assert "PEFT is not installed" in found.notes[0]
    assert found.verdict == "same"
    assert found.kl_mean == pytest.approx(expected.kl_mean, rel=1e-3)
    assert found.base_kl_mean == pytest.approx(expected.base_kl_mean, rel=1e-3)


@pytest.mark.parametrize("keys", ["missing_keys", "unexpected_keys"])
def test_an_adapter_that_peft_would_load_in_part(
    models: Models, file: Path, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    import peft

    load = peft.PeftModel.load_adapter

    def loads_in_part(*arguments: Any, **named: Any) -> Any:
        result = load(*arguments, **named)
        return result._replace(**{keys: ["score.weight"]})

    monkeypatch.setattr(peft.PeftModel, "load_adapter", loads_in_part)
    report = compare(models.merged, models.base, models.adapter, file)
    assert report.reference == "float32 merge"
    assert "(1 tensors do not fit, such as 'score.weight')" in report.notes[0]
    assert report.ok


def test_an_adapter_that_peft_does_not_load(
    models: Models, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("a feature of tomorrow\nand more")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", refuse)
    report = compare(models.merged, models.base, models.adapter, file)
    assert report.reference == "float32 merge"
    assert "(ValueError: a feature of tomorrow)" in report.notes[0]
    assert report.ok


@pytest.mark.slow
@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_named(package: str, models: Models, file: Path) -> None:
    command = "import sys; from regraft.cli import main; sys.argv[0] = 'regraft'; main()"
    given = ("--base", models.base, "--adapter", models.adapter, "--prompts", file, "--json")
    done = python(command, "verify", models.merged, *given, without=(package,))
    assert errors(done)["type"] == "MissingExtraError"
    assert done.returncode == 4
    assert f"needs {package}" in done.stderr
    assert "pip install 'regraft[torch]'" in done.stderr


# -- the verb --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify_takes_answers_into_account(models: Models, file: Path) -> None:
    wanted: dict[str, Any] = {"base": models.base, "adapters": models.adapter, "prompts": file}
    report = regraft.verify(models.merged, **wanted)
    assert report.ok
    assert report.verdict == "exact"
    assert report.prompts is not None
    assert report.prompts.verdict == "same"
    assert "answers to the prompts are those of base + adapter" in report.conclusions[-1]
    assert report.to_json()["prompts"]["worst"]["line"] == report.prompts.worst.line
    report = regraft.verify(models.base, **wanted)
    assert report.verdict == "different"
    assert report.prompts is not None
    assert report.prompts.verdict == "different"


def test_verify_says_so_if_answers_alone_differ(
    models: Models, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.verifying.prompting.report.KL_LIMIT", 0.0)
    monkeypatch.setattr("regraft.verifying.prompting.report.KL_SHARE", 0.0)
    report = regraft.verify(models.merged, base=models.base, adapters=models.adapter, prompts=file)
    assert not report.ok
    assert report.verdict == "different"
    assert {tensor.verdict for tensor in report.tensors} == {"exact"}
    assert "are not those of base + adapter" in report.conclusions[-2]
    assert "--dtype float32" in report.conclusions[-1]


def test_verify_keeps_what_it_found_if_there_are_no_answers(
    models: Models, file: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(models.base, tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    wanted: dict[str, Any] = {"base": base, "adapters": models.adapter, "prompts": file}
    report = regraft.verify(base, **wanted)
    assert report.verdict == "different"
    assert report.prompts is None
    assert "answers to prompts were not compared: " in report.warnings[-1]
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(regraft.InputError, match="no prompt in it"):
        regraft.verify(base, **wanted | {"prompts": tmp_path / "empty.txt"})


def test_prompts_need_a_base(models: Models, file: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(models.adapter)
    regraft.merge(models.base, tmp_path / "a", tmp_path / "out", keep_adapter=False)
    (tmp_path / "a").unlink()
    with pytest.raises(regraft.UsageError, match=r"need a base.*is not here"):
        regraft.verify(tmp_path / "out", prompts=file)


def test_prompts_are_compared_with_the_base_that_the_receipt_names(
    models: Models, file: Path
) -> None:
    report = regraft.verify(models.merged, prompts=file)
    assert report.prompts is not None
    assert report.prompts.verdict == "same"


@pytest.mark.slow
def test_the_command_line_shows_the_answers(models: Models, file: Path) -> None:
    given = ["--base", models.base, "--adapter", models.adapter, "--prompts", file]
    done = CliRunner().invoke(app, ["verify", str(models.merged), *map(str, given)])
    assert done.exit_code == 0, done.output
    assert "answers to the prompts are those of base + adapter" in done.stdout
    assert "by the base alone" in done.stdout
    assert "base + adapter by PEFT; float32 on" in done.stdout
    assert done.stderr == ""
    lines = CliRunner().invoke(app, ["verify", str(models.merged), *map(str, given), "-v"]).stdout
    assert all(f"line {n}: {prompt}" in lines for n, prompt in zip((1, 3, 5), PROMPTS, strict=True))
    done = CliRunner().invoke(app, ["verify", str(models.base), *map(str, given), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["prompts"]["verdict"] == "different"


# -- what cannot be judged -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bert_seqcls"])
def test_other_kinds_of_models_are_refused(name: str, file: Path, tmp_path: Path) -> None:
    base = zoo.make_base(name, tmp_path / "base")
    with pytest.raises(regraft.UnsupportedError, match="continues text"):
        compare(base, base, [], file)


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of a config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE: dict[str, tuple[Callable[[Path], object], type[regraft.InputError], str]] = {
    "code of its own": (
        lambda out: edit(out, model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"}),
        regraft.UnsupportedError, "continues text",
    ),
    "config": (lambda out: edit(out, hidden_size="many"), regraft.UnsupportedError, "cannot load"),
    "layers": (
        lambda out: edit(out, num_hidden_layers=3), regraft.InputError, "weights are missing",
    ),
    "no config": (lambda out: (out / "config.json").unlink(), regraft.InputError, "whole model"),
    "tokenizer": (
        lambda out: (out / "tokenizer.json").write_text("{}"),
        regraft.UnsupportedError, "cannot load its tokenizer",
    ),
    "vocabulary": (
        lambda out: add_tokenizer(out, 100), regraft.InputError, "tokens that the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_model_that_cannot_answer_is_refused(name: str, models: Models, tmp_path: Path) -> None:
    damage, kind, message = DAMAGE[name]
    merged = shutil.copytree(models.merged, tmp_path / "out")
    damage(merged)
    (tmp_path / "prompts.txt").write_text("w3 w99")
    with pytest.raises(kind, match=message):
        compare(merged, models.base, models.adapter, tmp_path / "prompts.txt")


def test_a_lone_file_is_no_whole_model(models: Models, file: Path) -> None:
    with pytest.raises(regraft.InputError, match="expected a folder"):
        compare(models.merged / "model.safetensors", models.base, models.adapter, file)


def test_a_base_without_tokenizers_cannot_be_asked(
    models: Models, file: Path, tmp_path: Path
) -> None:
    bare = []
    for path in (models.merged, models.base):
        bare.append(shutil.copytree(path, tmp_path / path.name))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (bare[-1] / name).unlink()
    with pytest.raises(regraft.UnsupportedError, match="no tokenizer"):
        compare(bare[0], bare[1], models.adapter, file)
    report = compare(bare[0], models.base, models.adapter, file)  # the base's will do
    assert report.ok


# -- files of prompts ------------------------------------------------------------------------------

BAD_LINES = {
    "not json": "w1 w2",
    "a list": '["w1"]',
    "neither": '{"text": "w1"}',
    "both": '{"prompt": "w1", "messages": [{"role": "user", "content": "w1"}]}',
    "twice": '{"prompt": "w1", "prompt": "w2"}',
    "no text": '{"prompt": 3}',
    "empty": '{"prompt": ""}',
    "no messages": '{"messages": []}',
    "no role": '{"messages": [{"content": "w1"}]}',
    "parts": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
    "half a pair": '{"prompt": "\\ud800"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w1"}\n\n' + BAD_LINES[name])
    with pytest.raises(regraft.InputError, match=r"prompts\.jsonl, line 3: is no prompt; expected"):
        read_prompts(file)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\xff\r\n")
    with pytest.raises(regraft.InputError, match=r"line 2: .*not UTF-8 at 0"):
        read_prompts(file)
    file.write_bytes(b"\xef\xbb\xbfone\r\n  \r\ntwo \r\n")
    assert [(p.line, p.text) for p in read_prompts(file)] == [(1, "one"), (3, "two ")]


def test_a_file_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(regraft.InputError, match="no such file"):
        read_prompts(tmp_path / "prompts.txt")
    for content in ("", "\n \n"):
        (tmp_path / "prompts.txt").write_text(content)
        with pytest.raises(regraft.InputError, match="no prompt in it"):
            read_prompts(tmp_path / "prompts.txt")


# -- the limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merged", "base", "verdict"),
    [
        ((100, 99, 0.02), (100, 79, 16.0), "same"),  # ordinary text, bfloat16
        ((767, 759, 1.73), (767, 400, 1940.0), "same"),  # sharp answers, bfloat16
        ((767, 714, 16.8), (767, 400, 1940.0), "different"),  # nine tenths of the adapter
        ((100, 90, 0.02), (100, 79, 16.0), "different"),
        ((4, 3, 0.001), (4, 2, 1.0), "same"),  # one of few positions says nothing
        ((100, 99, 0.02), (100, 97, 0.5), "unjudged"),
        ((100, 99, 0.02), None, "same"),
        ((100, 99, float("inf")), (100, 79, 16.0), "different"),
        ((100, 99, float("inf")), (100, 79, float("inf")), "different"),
    ],
)
def test_the_limits(
    merged: tuple[int, int, float], base: tuple[int, int, float] | None, verdict: str
) -> None:
    one = Tally(*merged, kl_max=merged[2])
    other = Tally(*base, kl_max=base[2]) if base else None
    assert judged(one, other) == verdict


def test_answers_that_are_no_numbers_are_infinitely_far() -> None:
    import torch

    from regraft.verifying.prompting.prompts import _tally

    kept = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 1.0, 2.0]])
    assert _tally(kept, kept.clone()) == Tally(2, 2, 0.0, 0.0)
    wider = torch.cat([kept, torch.full((2, 1), 9.0)], 1)  # padding that only one of them has
    assert _tally(kept, wider) == Tally(2, 2, 0.0, 0.0)
    broken = _tally(kept, torch.tensor([[1.0, 2.0, -torch.inf], [0.0, torch.nan, 2.0]]))
    assert broken.kl == broken.kl_max == float("inf")
