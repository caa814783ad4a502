"""A probe of servers that speak OpenAI's API, sound and faulty."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import regraft
from regraft.cli.app import app
from regraft.errors import InputError, UsageError

Reply = Callable[[dict[str, Any]], Any]

BASE_TOP = {" a": -0.5, " b": -1.5}
ADAPTER_TOP = {" a": -2.0, " b": -0.2}


def completion(text: str, top: dict[str, float] | None) -> dict[str, Any]:
    """Return an answer in the API's older form."""
    logprobs = None if top is None else {"top_logprobs": [top]}
    return {"choices": [{"text": text, "logprobs": logprobs}]}


def chat(text: str, top: dict[str, float]) -> dict[str, Any]:
    """Return an answer in the API's newer form."""
    listed = [{"token": token, "logprob": value} for token, value in top.items()]
    content = [{"token": text, "logprob": 0.0, "top_logprobs": listed}]
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}


def like_vllm(asked: dict[str, Any]) -> Any:
    """Answer as a server whose adapter acts."""
    acts = asked["model"] == "sql"
    answer = chat if "messages" in asked else completion
    return answer(" b" if acts else " a", ADAPTER_TOP if acts else BASE_TOP)


@contextmanager
def served(
    reply: Reply, models: Any = ("base", "sql"), adapters: Any = None, raw: bytes | None = None,
    owner: str | None = "vllm", parent: str | None = None, ready: Callable[[], bool] | None = None,
) -> Iterator[str]:  # fmt: skip
    """Run a server; ``reply`` gives an answer or a status, ``raw`` is sent in place of it.

    ``owner`` and ``parent`` are what its list says of each model. Until ``ready`` it says 503.
    """
    said = {"owned_by": owner, "parent": parent}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            if ready is not None and not ready():
                self.send(503)
            elif self.path == "/v1/models":
                self.send({"data": [{"id": name} | said for name in models]})
            elif self.path == "/lora-adapters" and adapters is not None:
                self.send(adapters)
            else:
                self.send(404)

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            self.send(reply(json.loads(self.rfile.read(size))), raw)

        def send(self, value: Any, raw: bytes | None = None) -> None:
            status, value = value if isinstance(value, tuple) else (200, value)
            status = value if isinstance(value, int) else status
            body = raw if raw is not None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (9 if raw else 0)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_adapter_that_acts() -> None:
    with served(like_vllm) as url:
        report = regraft.probe(url, adapter="sql")
    assert (report.verdict, report.ok) == ("acts", True)
    assert (report.base, report.adapter) == ("base", "sql")
    assert {each.apart for each in report.prompts} == {1.5}
    assert [(each.base, each.adapter) for each in report.prompts] == [(" a", " b")] * 3


def test_an_adapter_that_is_the_base() -> None:
    with served(lambda _: completion(" a", BASE_TOP)) as url:
        assert regraft.probe(f"{url}/v1", adapter="sql").verdict == "acts as the base"


def test_small_differences_show_in_log_probabilities_alone() -> None:
    def reply(asked: dict[str, Any]) -> Any:
        more = 0.01 if asked["model"] == "sql" else 0.0
        return completion(" a", {" a": -0.5 + more})

    with served(reply) as url:
        assert regraft.probe(url, adapter="sql").verdict == "acts"


def test_hidden_log_probabilities_are_said() -> None:
    def reply(asked: dict[str, Any]) -> Any:
        return completion(asked["model"], None)

    with served(reply) as url:
        report = regraft.probe(url, adapter="sql")
    assert report.verdict == "acts"
    assert "hides the log-probabilities" in report.notes[0]
    with served(lambda _: completion("same", None)) as url:
        assert regraft.probe(url, adapter="sql").verdict == "cannot be judged"


def test_chats_and_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"prompt": "Once"}\n')
    with served(like_vllm) as url:
        report = regraft.probe(url, adapter="sql", prompts=file)
    assert [each.prompt for each in report.prompts] == ["Hi", "Once"]
    assert [each.apart for each in report.prompts] == [1.5, 1.5]


@pytest.mark.parametrize("name", ["0", "sql", "/models/sql.gguf"])
def test_adapters_of_llama_cpp_are_switched_by_their_scale(name: str) -> None:
    def reply(asked: dict[str, Any]) -> Any:
        scales = {each["id"]: each["scale"] for each in asked["lora"]}
        assert scales[1] == 0.0
        return completion(" b", ADAPTER_TOP) if scales[0] else completion(" a", BASE_TOP)

    there = [{"id": 0, "path": "/models/sql.gguf"}, {"id": 1, "path": "/models/x.gguf"}]
    with served(reply, models=["model"], adapters=there, owner="llamacpp") as url:
        assert regraft.probe(url, adapter=name).verdict == "acts"


def test_adapters_of_llama_cpp_with_one_name_are_told_by_number() -> None:
    there = [{"id": 0, "path": "a/adapter.gguf"}, {"id": 1, "path": "b/adapter.gguf"}]
    with (
        served(like_vllm, models=["model"], adapters=there, owner="llamacpp") as url,
        pytest.raises(InputError, match=r"1: b/adapter.gguf.*give its number"),
    ):
        regraft.probe(url, adapter="adapter")


def test_llama_cpp_may_ask_for_a_key() -> None:
    with (
        served(like_vllm, models=["model"], adapters=401, owner="llamacpp") as url,
        pytest.raises(InputError, match=r"refused \(401\)"),
    ):
        regraft.probe(url, adapter="0")


def test_a_part_of_a_character_is_left_out_by_llama_cpp() -> None:
    """What it tells first is then the second token's."""

    def reply(asked: dict[str, Any]) -> Any:
        acts = asked["lora"][0]["scale"]
        told = chat("\ufffd", ADAPTER_TOP if acts else BASE_TOP)["choices"][0]["logprobs"]
        choice = {"text": "\ufffd\ufffd", "logprobs": told}
        return {"choices": [choice], "usage": {"completion_tokens": 2}}

    there = [{"id": 0, "path": "sql.gguf"}]
    with served(reply, models=["model"], adapters=there, owner="llamacpp") as url:
        report = regraft.probe(url, adapter="0")
    assert report.verdict == "cannot be judged"
    assert "hides the log-probabilities" in report.notes[0]


def test_sglang_is_given_an_adapter_beside_the_model() -> None:
    """With an adapter's name as the model it answers as the base."""

    def reply(asked: dict[str, Any]) -> Any:
        assert asked["model"] == "base"
        return like_vllm({"model": asked.get("lora_path")})

    with served(reply, owner="sglang") as url:
        report = regraft.probe(url, adapter="sql")
    assert (report.engine, report.verdict) == ("sglang", "acts")


def test_the_base_is_the_adapters_parent() -> None:
    with served(like_vllm, models=("other", "sql", "base"), parent="base") as url:
        assert regraft.probe(url, adapter="sql").base == "base"


def test_a_server_that_refuses_to_give_log_probabilities_is_asked_without() -> None:
    def reply(asked: dict[str, Any]) -> Any:
        return 400 if "logprobs" in asked else completion(asked["model"], None)

    with served(reply) as url, pytest.raises(InputError, match=r"refused \(400\)"):
        regraft.probe(url, adapter="sql")
    with served(lambda asked: (400, {"error": "logprobs are disabled"}) if "logprobs" in asked
                else completion(asked["model"], None)) as url:  # fmt: skip
        report = regraft.probe(url, adapter="sql")
    assert report.verdict == "acts"
    assert "hides" in report.notes[0]


def test_a_kind_of_server_can_be_named() -> None:
    with served(like_vllm, owner="me") as url:
        assert regraft.probe(url, adapter="sql").engine == "openai"
        assert regraft.probe(url, adapter="sql", engine="vllm").engine == "vllm"
    with served(like_vllm) as url:
        with pytest.raises(InputError, match="says that it is another one"):
            regraft.probe(url, adapter="sql", engine="sglang")
        with pytest.raises(UsageError, match="no server of that name"):
            regraft.probe(url, adapter="sql", engine="tgi")


def test_a_folder_is_given_to_mlx_lms_server(tmp_path: Path) -> None:
    def reply(asked: dict[str, Any]) -> Any:
        return like_vllm({"model": "sql" if asked.get("adapters") == str(tmp_path) else "base"})

    with served(reply, models=["model"], owner=None) as url:
        report = regraft.probe(url, adapter=str(tmp_path))
    assert (report.engine, report.verdict) == ("mlx", "acts")


# -- faults ----------------------------------------------------------------------------------------


def slowly(asked: dict[str, Any]) -> Any:
    """Answer after a second."""
    time.sleep(1)
    return like_vllm(asked)


@pytest.mark.parametrize(
    ("reply", "raw", "said"),
    [
        (lambda _: 404, None, r"refused \(404\)"),
        (lambda _: 500, None, r"refused \(500\)"),
        (slowly, None, "does not answer"),
        (like_vllm, b'{"choices": [', "does not answer|not OpenAI's"),
        (lambda _: {"choices": []}, None, "not OpenAI's"),
        (lambda _: ["?"], None, "not OpenAI's"),
    ],
)
def test_faults_are_typed_errors(reply: Reply, raw: bytes | None, said: str) -> None:
    with served(reply, raw=raw) as url, pytest.raises(InputError, match=said):
        regraft.probe(url, adapter="sql", timeout=0.5)


def test_no_server_no_model_and_no_address() -> None:
    with pytest.raises(InputError, match="does not answer"):
        regraft.probe("http://127.0.0.1:9", adapter="sql", timeout=2)
    with served(like_vllm) as url:
        with pytest.raises(InputError, match="no such model"):
            regraft.probe(url, adapter="nobody")
        with pytest.raises(InputError, match="no such model"):
            regraft.probe(url, adapter="sql", base="nobody")
    with pytest.raises(UsageError, match="no address"):
        regraft.probe("ftp://here", adapter="sql")
    with pytest.raises(UsageError, match="as one model"):
        regraft.probe("http://here", adapter="sql", expect=("a", "b", "c"))


# -- what is expected ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a base with a tokenizer, an adapter, and the merged model."""
    pytest.importorskip("peft")
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from regraft.testing.adapters import make_adapter
    from regraft.testing.zoo import VOCAB, make_base

    root = tmp_path_factory.mktemp("expected")
    base = make_base("llama", root / "base", "float32")
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    adapter = make_adapter(base, root / "adapter", config)
    regraft.merge(base, adapter, root / "merged")
    return base, adapter, root / "merged"


def answers_of(model: Path, prompt: str) -> dict[str, float]:
    """Return a model's log-probabilities of the next token, by its word."""
    import torch

    from regraft.testing.zoo import load_base

    ids = [int(word[1:]) for word in prompt.split()]
    with torch.no_grad():
        logits = load_base(model)(input_ids=torch.tensor([ids])).logits[0, -1]
    values = torch.log_softmax(logits.float(), -1).tolist()
    return {f"w{number}": value for number, value in enumerate(values)}


@pytest.mark.slow
def test_what_regraft_computes_is_held_against_the_answers(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, merged = files
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "w5 w7 w9"}\n')
    is_served = {"sql": merged, "base": base}

    def reply(asked: dict[str, Any]) -> Any:
        return completion("", answers_of(is_served[asked["model"]], asked["prompt"]))

    with served(reply) as url:
        for expect in ([merged], [base, adapter]):
            report = regraft.probe(url, adapter="sql", prompts=prompts, expect=expect)
            assert report.verdict == "acts"
            assert report.prompts[0].from_expected == pytest.approx(0, abs=1e-4)
        report = regraft.probe(url, adapter="sql", prompts=prompts, expect=base)
    assert report.verdict == "otherwise than expected"


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        (like_vllm, 0, "ok: the adapter acts"),
        (lambda _: completion(" a", BASE_TOP), 1, "answers as the base"),
        (lambda _: completion("same", None), 3, "cannot be judged"),
        (lambda _: 500, 3, ""),
    ],
)
def test_exit_codes(reply: Reply, code: int, said: str) -> None:
    with served(reply) as url:
        found = CliRunner().invoke(app, ["probe", url, "--adapter", "sql"])
    assert found.exit_code == code
    assert said in found.stdout


def test_as_json() -> None:
    with served(like_vllm) as url:
        found = CliRunner().invoke(app, ["probe", url, "--adapter", "sql", "--json"])
    told = json.loads(found.stdout)
    assert (told["ok"], told["verdict"], told["base"]) == (True, "acts", "base")
    assert told["prompts"][0]["apart"] == 1.5
