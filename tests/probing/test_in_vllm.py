"""A probe of vLLM's own server, where REGRAFT_VLLM_PYTHON names the Python of its environment.

``make engines`` makes such an environment: ``.engines/vllm/bin/python``. Starting the server takes
some minutes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

import regraft
from regraft.cli.app import app

ROOT = Path(__file__).parents[2]
VARIABLE = "REGRAFT_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason=f"vLLM: {VARIABLE} names no Python that has it"),
]

START = 900
"""Seconds that the server may take to start."""

ACTS, IS_BASE = "acts", "is-base"
"""The server's names of two adapters: one as PEFT saved it, one whose names belong to nothing."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and its tokenizer, two adapters, the merged model, prompts."""
    pytest.importorskip("peft")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        fixtures = import_module("engines.fixtures")
    root = tmp_path_factory.mktemp("served")
    base = fixtures.make_base("llama", root / "base")
    words = {f"w{number}": number for number in range(fixtures.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
    by_name = {fixture.name: fixture for fixture in fixtures.FIXTURES}
    fixtures.make(by_name["as PEFT saves it"], base, root / ACTS)
    fixtures.make(by_name["names of another class"], base, root / IS_BASE)
    regraft.merge(base, root / ACTS / "adapter", root / "merged")
    (root / "prompts.jsonl").write_text('{"prompt": "w5 w7 w9"}\n{"prompt": "w44 w3"}\n')
    return root


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            pass
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(1)
    raise AssertionError(f"vLLM did not start in {START} seconds: {log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def url(files: Path) -> Iterator[str]:
    """Run vLLM's server with both adapters."""
    port = _free_port()
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
             "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
             "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(files / "base"),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "2",
        "--enable-lora", "--lora-modules", f"{ACTS}={files / ACTS / 'adapter'}",
        f"{IS_BASE}={files / IS_BASE / 'renamed'}",
    ]  # fmt: skip
    log = files / "server.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env=os.environ | small
        )
    try:
        found = f"http://127.0.0.1:{port}"
        _wait(found, process, log)
        yield found
    finally:
        process.terminate()
        process.wait(60)


def test_an_adapter_that_acts_and_one_that_is_the_base(url: str, files: Path) -> None:
    """vLLM lists both, and says of neither that it does nothing."""
    prompts = files / "prompts.jsonl"
    acts = regraft.probe(url, adapter=ACTS, prompts=prompts)
    assert (acts.verdict, acts.base, acts.adapter) == ("acts", "base", ACTS)
    assert all(each.base != each.adapter for each in acts.prompts)
    is_base = regraft.probe(url, adapter=IS_BASE, prompts=prompts)
    assert (is_base.verdict, is_base.base) == ("acts as the base", "base")
    foretold = regraft.check(files / "base", files / IS_BASE / "renamed", engine="vllm").engine
    assert foretold is not None
    assert {finding.effect for finding in foretold.findings} == {"leaves out"}


def test_what_regraft_computes_is_held_against_its_answers(url: str, files: Path) -> None:
    base, adapter, prompts = files / "base", files / ACTS / "adapter", files / "prompts.jsonl"
    for expect in ([files / "merged"], [base, adapter]):
        report = regraft.probe(url, adapter=ACTS, prompts=prompts, expect=expect)
        assert report.verdict == "acts"
        assert all(each.from_expected is not None for each in report.prompts)
        assert max(each.from_expected or 0 for each in report.prompts) < 1e-3
    report = regraft.probe(url, adapter=ACTS, prompts=prompts, expect=base)
    assert report.verdict == "otherwise than expected"


def test_the_command(url: str, files: Path) -> None:
    prompts = ["--prompts", str(files / "prompts.jsonl")]
    for adapter, code in ((ACTS, 0), (IS_BASE, 1), ("nobody", 3)):
        found = CliRunner().invoke(app, ["probe", url, "--adapter", adapter, *prompts])
        assert found.exit_code == code, found.output


def test_more_tokens_than_it_takes_are_said(url: str, files: Path) -> None:
    """It answers with 400 and a reason, which is passed on."""
    with pytest.raises(regraft.errors.InputError, match=r"refused \(400\)"):
        regraft.probe(url, adapter=ACTS, prompts=files / "prompts.jsonl", tokens=4096)
