"""A probe of real servers: llama.cpp's, and mlx_lm.server.

They run where their Python is; see ``engine_python``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

import regraft
from probing import serving
from regraft.cli.app import app
from regraft.errors import InputError

pytest.importorskip("peft")
pytest.importorskip("gguf")

pytestmark = pytest.mark.slow

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


class Files(NamedTuple):
    """A base, an adapter that acts, one that does nothing, one of another scale, and prompts."""

    base: Path
    acts: Path
    nothing: Path
    other: Path
    prompts: Path


def never_parts_of_characters(file: Path, tokenizer: Any) -> None:
    """Have a model answer in whole characters: of others llama.cpp gives no log-probabilities."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    parts = [token for token in range(tokenizer.get_vocab_size())
             if "\ufffd" in tokenizer.decode([token], skip_special_tokens=False)]  # fmt: skip
    tensors["lm_head.weight"][parts] = 0.0
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    from peft import LoraConfig

    from exporting.models import byte_level, save_model, save_tokenizer
    from regraft.testing.adapters import make_adapter, rewrite_adapter

    root = tmp_path_factory.mktemp("served")
    theta = {"rope_type": "default", "rope_theta": 500.0}
    base = save_model(root / "base", "llama", attention_bias=False, rope_parameters=theta)
    save_tokenizer(base, byte_level(), chat_template=CHATML)
    never_parts_of_characters(base / "model.safetensors", byte_level())
    regraft.export(base, root / "base-mlx", engine="mlx")
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    acts = make_adapter(base, root / "acts", config)

    def scaled(by: float) -> Any:
        return lambda name, tensor: (name, tensor * by if "lora_B" in name else tensor)

    nothing = rewrite_adapter(acts, root / "nothing", scaled(0.0))
    other = rewrite_adapter(acts, root / "other", scaled(0.3))
    prompts = root / "prompts.jsonl"
    chat = [{"role": "user", "content": "How do you do?"}]
    lines: list[Any] = [{"prompt": "The quick brown fox"}, {"prompt": "return"}, {"messages": chat}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Files(base, acts, nothing, other, prompts)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["probe", *map(str, arguments), "--json"])


# -- llama.cpp -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give a server of four adapters, of which the last is applied at half its scale."""
    root = tmp_path_factory.mktemp("llama-cpp")
    regraft.export(files.base, root / "base.gguf", type="f32")
    served = {}
    for name, adapter in (("acts", files.acts), ("nothing", files.nothing), ("other", files.other),
                          ("half", files.acts)):  # fmt: skip
        regraft.convert(adapter, root / name, to="gguf", base=files.base)
        (root / name / "adapter.gguf").rename(root / f"{name}.gguf")
        served[root / f"{name}.gguf"] = 0.5 if name == "half" else 1.0
    with serving.llama_cpp(root / "base.gguf", served) as url:
        yield url


def test_llama_cpp_answers_as_expected(files: Files, llama_cpp: str) -> None:
    expect = [files.base, files.acts]
    report = regraft.probe(llama_cpp, adapter="acts", prompts=files.prompts, expect=expect)
    assert (report.engine, report.verdict) == ("llama.cpp", "acts")
    for each in report.prompts:
        assert each.from_expected == pytest.approx(0, abs=0.05)
        assert each.base_from_expected == pytest.approx(0, abs=0.05)
    assert "adapter 3 at 0.5" in report.notes[0]


def test_llama_cpp_knows_an_adapter_by_number_file_and_path(llama_cpp: str) -> None:
    for name in ("0", "acts", "acts.gguf"):
        assert regraft.probe(llama_cpp, adapter=name).verdict == "acts"
    with pytest.raises(InputError, match=r"0: .*acts\.gguf"):
        regraft.probe(llama_cpp, adapter="nobody")


def test_an_adapter_of_llama_cpp_that_does_nothing_is_told(llama_cpp: str) -> None:
    report = regraft.probe(llama_cpp, adapter="nothing")
    assert report.verdict == "acts as the base"
    assert {each.apart for each in report.prompts} == {0.0}


def test_an_adapter_is_asked_for_at_the_scale_at_which_it_is_served(
    files: Files, llama_cpp: str
) -> None:
    merged = files.base.parent / "half-merged"
    regraft.merge(files.base, f"{files.acts}=0.5", merged)
    report = regraft.probe(llama_cpp, adapter="half", expect=merged, prompts=files.prompts)
    assert report.verdict == "acts"


def test_what_llama_cpp_remembers_of_other_requests_is_no_matter(
    files: Files, llama_cpp: str
) -> None:
    """Its cache of prompts does not know which adapter a prompt was read with."""
    text = "The quick brown fox" + " does not jump" * 6
    prompts = files.base.parent / "long.txt"
    prompts.write_text(f"{text}\n")
    for scale, prompt in ((1.0, text), (0.0, "something else " * 8)):
        scales = [{"id": number, "scale": scale * (number == 0)} for number in range(4)]
        body = {"prompt": prompt, "max_tokens": 1, "lora": scales}
        serving.post(f"{llama_cpp}/v1/completions", body)
    expect = [files.base, files.acts]
    report = regraft.probe(llama_cpp, adapter="acts", prompts=prompts, expect=expect)
    assert report.prompts[0].base_from_expected == pytest.approx(0, abs=0.05)
    assert report.verdict == "acts"


def test_exit_codes_with_llama_cpp(files: Files, llama_cpp: str) -> None:
    expect = ("--expect", files.base, "--expect", files.acts)
    found = invoke(llama_cpp, "--adapter", "acts", *expect, "--prompts", files.prompts)
    assert (found.exit_code, json.loads(found.stdout)["engine"]) == (0, "llama.cpp")
    assert invoke(llama_cpp, "--adapter", "nothing").exit_code == 1
    other = invoke(llama_cpp, "--adapter", "other", *expect, "--prompts", files.prompts)
    assert other.exit_code == 1
    assert json.loads(other.stdout)["verdict"] == "otherwise than expected"
    assert invoke(llama_cpp, "--adapter", "9").exit_code == 3
    assert invoke(llama_cpp, "--adapter", "0", "--for", "vllm").exit_code == 3


# -- mlx-lm ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlx_adapters(files: Files) -> Path:
    """Return a folder of the adapters as mlx-lm reads them."""
    root = files.base.parent / "mlx"
    for adapter in (files.acts, files.nothing, files.other):
        regraft.convert(adapter, root / adapter.name, to="mlx")
    return root


@pytest.fixture(scope="module")
def mlx(
    files: Files, mlx_adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Give a server that was started with an adapter."""
    home = tmp_path_factory.mktemp("home")
    (home / "hub").mkdir()
    options = ("--adapter-path", str(mlx_adapters / "acts"))
    with serving.mlx(files.base.parent / "base-mlx", home, *options) as url:
        yield url


def test_mlx_answers_as_expected(files: Files, mlx: str, mlx_adapters: Path) -> None:
    for name in (str(mlx_adapters / "acts"), "default_model"):
        report = regraft.probe(
            mlx, adapter=name, prompts=files.prompts, expect=[files.base, files.acts]
        )
        assert (report.engine, report.verdict, report.notes) == ("mlx", "acts", ())
        for each in report.prompts:
            assert each.from_expected == pytest.approx(0, abs=1e-3)
            assert each.base_from_expected == pytest.approx(0, abs=1e-3)


def test_exit_codes_with_mlx(files: Files, mlx: str, mlx_adapters: Path) -> None:
    asked = ("--prompts", files.prompts, "--expect", files.base, "--expect", files.acts)
    assert invoke(mlx, "--adapter", mlx_adapters / "acts", *asked).exit_code == 0
    assert invoke(mlx, "--adapter", mlx_adapters / "nothing").exit_code == 1
    other = invoke(mlx, "--adapter", mlx_adapters / "other", *asked)
    assert other.exit_code == 1
    assert json.loads(other.stdout)["verdict"] == "otherwise than expected"
    assert invoke(mlx, "--adapter", files.base.parent / "none").exit_code == 3


def test_mlx_is_given_an_adapter_of_its_own_format(files: Files, mlx: str) -> None:
    with pytest.raises(InputError, match="regraft convert ADAPTER -o OUT --to mlx"):
        regraft.probe(mlx, adapter=str(files.acts))


def test_mlx_without_a_cache_does_not_say_what_it_serves(
    files: Files, mlx_adapters: Path, tmp_path: Path
) -> None:
    acts, model = str(mlx_adapters / "acts"), files.base.parent / "base-mlx"
    with serving.mlx(model, tmp_path / "none") as url:
        with pytest.raises(InputError, match="Name it with --base"):
            regraft.probe(url, adapter=acts)
        report = regraft.probe(url, adapter=acts, base=str(model))
    assert (report.engine, report.verdict) == ("mlx", "acts")
