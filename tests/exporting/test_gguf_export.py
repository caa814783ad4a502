"""Types, sources, and bad input of an export to GGUF; whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import regraft
from asking_llama_cpp import ask
from exporting.models import ROWS, own_logs, save_model
from regraft.errors import (
    AccessError,
    BusyError,
    DiskSpaceError,
    FormatError,
    MissingExtraError,
    NumericError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from regraft.exporting.verb import export
from regraft.formats.gguf import open_gguf
from regraft.progress import ProgressEvent

PROMPT = [1, 70, 300, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("export") / "model", "llama")


def edited(model: Path, out: Path, **config: Any) -> Path:
    """Return a copy of a model with another config."""
    out.mkdir()
    for path in model.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    own = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(own | config))
    return out


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_blocks_are_those_of_the_gguf_package(kind: str, model: Path, tmp_path: Path) -> None:
    report = export(model, tmp_path / "out.gguf", type=kind)
    weights = load_file(model / "model.safetensors")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    down = weights["model.layers.1.mlp.down_proj.weight"].numpy()
    found = tensors["blk.1.ffn_down.weight"]
    wanted = gguf.quants.quantize(down, gguf.GGMLQuantizationType[kind.upper()])
    assert found.tensor_type.name == kind.upper()
    assert np.asarray(found.data).tobytes() == wanted.tobytes()
    head = {"q5_1": "Q8_0", "q5_0": "Q8_0", "q4_1": "Q8_0", "q4_0": "Q8_0"}.get(kind, kind.upper())
    assert tensors["output.weight"].tensor_type.name == head
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    assert sum(report.types.values()) == len(tensors)


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_llama_cpp_reads_every_type(kind: str, model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out.gguf", type=kind)
    logs = ask(tmp_path / "out.gguf", tmp_path, prompts=[PROMPT], vocab=ROWS)["logs"][0]
    answer, expected = [logs[str(token)] for token in range(ROWS)], own_logs(model, [PROMPT])[0]
    bound = {"bf16": 0.05, "q8_0": 0.05, "q4_0": 0.5}[kind]  # of a model of random weights
    error = np.abs(np.array(answer) - expected).max() / np.ptp(expected)
    assert 1e-6 < error <= bound


def test_rows_that_are_no_whole_blocks_are_f16(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2", intermediate_size=90)
    report = export(model, tmp_path / "out.gguf", type="q8_0")
    assert report.types["F16"] == 2
    assert open_gguf(tmp_path / "out.gguf").tensors["blk.0.ffn_down.weight"].type == "F16"


def test_pieces_do_not_show_in_the_bytes(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one = export(model, tmp_path / "one.gguf", type="q8_0")
    monkeypatch.setattr("regraft.exporting.gguf._LEAST_ROOM", 1)
    other = export(model, tmp_path / "other.gguf", type="q8_0", max_memory="1MiB")
    assert one.blake3 == other.blake3


@pytest.mark.parametrize("kind", ["q4_k_m", "Q6_K", "iq4_xs", "f8"])
def test_other_types_are_refused(kind: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write type") as caught:
        export(model, tmp_path / "out.gguf", type=kind)
    assert ("llama-quantize" in str(caught.value)) == (kind != "f8")


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_blocks_whose_scale_would_be_infinite_are_refused(
    kind: str, model: Path, tmp_path: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e7
    big = edited(model, tmp_path / "big")
    save_file(weights, big / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=r"blk.0.ffn_up.weight.*1e\+07"):
        export(big, tmp_path / "out.gguf", type=kind)


def test_what_f16_cannot_hold_is_refused(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    big = edited(model, tmp_path / "big")
    save_file(weights, big / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=r"blk.0.ffn_up.weight.*1e\+06"):
        export(big, tmp_path / "out.gguf", type="f16")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, big / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match="finite"):
        export(big, tmp_path / "out.gguf", type="q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]


# -- sources ---------------------------------------------------------------------------------------


def test_bin_files_and_shards_give_the_same_file(model: Path, tmp_path: Path) -> None:
    plain = export(model, tmp_path / "plain.gguf")
    regraft.convert(model, tmp_path / "shards" / "model", shard_size="100KB")
    sharded = export(tmp_path / "shards" / "model", tmp_path / "sharded.gguf")
    weights = load_file(model / "model.safetensors")
    torchy = edited(model, tmp_path / "model")
    (torchy / "model.safetensors").unlink()
    torch.save(weights, torchy / "pytorch_model.bin")
    of_bin = export(torchy, tmp_path / "bin.gguf")
    assert plain.blake3 == of_bin.blake3 == sharded.blake3


def test_a_quantized_model_is_exported_as_what_its_codes_stand_for(
    model: Path, tmp_path: Path
) -> None:
    regraft.quantize(model, tmp_path / "codes" / "model", "nf4")
    regraft.dequantize(tmp_path / "codes" / "model", tmp_path / "plain" / "model")
    one = export(tmp_path / "codes" / "model", tmp_path / "one.gguf")
    other = export(tmp_path / "plain" / "model", tmp_path / "other.gguf")
    assert one.blake3 == other.blake3


def test_progress_and_the_summary_add_up(model: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    report = export(model, tmp_path / "out.gguf", progress=events.append)
    told = [event for event in events if event.stage == "export"]
    size = (tmp_path / "out.gguf").stat().st_size
    assert told[-1].done == told[-1].total == report.nbytes == size
    assert {event.stage for event in events} == {"read", "export", "finish"}


# -- bad input -------------------------------------------------------------------------------------


REFUSED: dict[str, dict[str, Any]] = {
    "models of this kind": {"model_type": "mamba"},
    "another activation": {"hidden_act": "gelu"},
    "rotary embedding": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "factor for linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_not_do_is_refused(what: str, model: Path, tmp_path: Path) -> None:
    odd = edited(model, tmp_path / "model", **REFUSED[what])
    with pytest.raises(UnsupportedError, match=what):
        export(odd, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "scales queries otherwise": ("gemma2", {"query_pre_attn_scalar": 20}),
    "heads that make up the width": ("qwen2", {"head_dim": 8}),
    "no bias of o_proj": ("qwen3", {"attention_bias": True}),
    "norms of its heads": ("stablelm", {"qk_layernorm": True}),
    "wants biases": ("starcoder2", {"use_bias": False}),
}


@pytest.mark.parametrize("what", FAMILIES)
def test_what_a_family_lacks_is_refused(what: str, tmp_path: Path) -> None:
    architecture, changes = FAMILIES[what]
    whole = save_model(tmp_path / "whole", architecture)
    with pytest.raises(UnsupportedError, match=what):
        export(edited(whole, tmp_path / "model", **changes), tmp_path / "out.gguf")


def test_missing_and_misshapen_tensors_are_all_named(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    odd = edited(model, tmp_path / "model")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    save_file(weights, odd / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="a tensor is missing") as caught:
        export(odd, tmp_path / "out.gguf")
    assert len(caught.value.problems) == 2
    with pytest.raises(FormatError, match=r"contradicts the config.*\(100, 64\)") as caught:
        export(edited(model, tmp_path / "wide", intermediate_size=100), tmp_path / "out.gguf")
    assert len(caught.value.problems) == 6
    weights = load_file(model / "model.safetensors") | {"extra.weight": torch.zeros(2)}
    save_file(weights, odd / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"no name for this tensor|extra.weight"):
        export(odd, tmp_path / "out.gguf")


def test_a_head_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2")
    plain = export(model, tmp_path / "plain.gguf")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert export(model, tmp_path / "same.gguf").blake3 == plain.blake3
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="output head of its own"):
        export(model, tmp_path / "other.gguf")


@pytest.mark.parametrize("value", [0, -1, "64", None, True, 1.5])
def test_a_config_without_a_number_is_refused(value: Any, model: Path, tmp_path: Path) -> None:
    odd = edited(model, tmp_path / "model", num_hidden_layers=value)
    with pytest.raises(FormatError, match="num_hidden_layers: a positive number"):
        export(odd, tmp_path / "out.gguf")


@pytest.mark.parametrize("rope", ["text", [1], {"rope_type": "linear", "factor": "x"}, 3])
def test_a_config_of_garbage_is_refused(rope: Any, model: Path, tmp_path: Path) -> None:
    odd = edited(model, tmp_path / "model", rope_parameters=rope)
    with pytest.raises((FormatError, UnsupportedError)):
        export(odd, tmp_path / "out.gguf")


def test_a_gguf_model_and_a_lone_file_are_refused(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "out.gguf")
    with pytest.raises(UnsupportedError, match="in GGUF already"):
        export(tmp_path / "out.gguf", tmp_path / "again.gguf")
    (tmp_path / "lone.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedError, match="cannot be told"):
        export(tmp_path / "lone.safetensors", tmp_path / "again.gguf")


def test_without_the_package_its_name_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="gguf"):
        export(model, tmp_path / "out.gguf")


# -- the output ------------------------------------------------------------------------------------


def test_what_is_there_is_replaced_when_asked_for_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = export(model, out)
    with pytest.raises(OutputExistsError, match="exists already"):
        export(model, out, type="q8_0")
    assert out.stat().st_size == report.nbytes
    assert export(model, out, type="q8_0", overwrite=True).nbytes == out.stat().st_size
    for make in (Path.mkdir, lambda path: path.symlink_to(out)):
        other = tmp_path / "other.gguf"
        make(other)
        with pytest.raises(OutputExistsError, match="only GGUF files"):
            export(model, other, overwrite=True)
        other.rmdir() if other.is_dir() else other.unlink()
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        export(model, tmp_path / "out.bin")
    with pytest.raises(UsageError, match="over\\) an input"):
        export(model, out, like=out, overwrite=True)


def test_a_full_disk_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.merging.files.publish.free_bytes", lambda _out: 1000)
    with pytest.raises(DiskSpaceError, match="not enough disk space"):
        export(model, tmp_path / "new" / "out.gguf")
    monkeypatch.undo()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("regraft.merging.files.publish.sync_file", full)
    with pytest.raises(DiskSpaceError, match="the disk is full"):
        export(model, tmp_path / "new" / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_place_that_may_not_be_written_to_is_an_error(model: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(AccessError):
        export(model, tmp_path / "out.gguf")


_SLOW = """
import sys, time
import regraft.exporting.gguf as g
from regraft.exporting.verb import export
pieces = g.tensor_bytes
def slow(*args):
    for piece in pieces(*args):
        print("piece", flush=True)
        time.sleep(0.05)
        yield piece
g.tensor_bytes = slow
export(sys.argv[1], sys.argv[2])
"""


def test_killed_half_way_leaves_no_output_and_the_next_try_makes_it(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    run = subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(model), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    run.stdout.readline()
    with pytest.raises(BusyError):
        export(model, out)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".out.gguf.regraft"]
    assert [left.output for left in regraft.clean(tmp_path, dry_run=True)] == [str(out)]
    export(model, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_interrupted_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def interrupt(event: ProgressEvent) -> None:
        if event.stage == "export" and event.done > event.total // 2:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "out.gguf", progress=interrupt)
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - started < 60
