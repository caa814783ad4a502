"""The receipt says what was read, what was done and what came out, and every figure is true."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

import regraft
from merging import toys
from merging.processes import command_here
from merging.toys import (
    EMBED,
    HIDDEN,
    PREFIX,
    Q0,
    VOCAB,
    attention,
    draw,
    write_adapter,
    write_base,
)
from regraft.merging.files.receipt import read_receipt, receipt_bytes, sealed
from regraft.merging.files.side_files import json_bytes

RECEIPT = Path("regraft") / "receipt.json"


def digest(array: np.ndarray) -> str:
    """Return the blake3 of an array's bytes."""
    return blake3(array.tobytes()).hexdigest()


def records(receipt: regraft.Receipt) -> dict[str, Any]:
    """Return a receipt's records by name."""
    return {record.name: record for record in receipt.tensors}


def mixed_adapter(folder: Path) -> Path:
    """Write an adapter that merges, replaces, adds and patches."""
    tensors = {
        **attention(),
        f"{PREFIX}lm_head.weight": draw(VOCAB, HIDDEN, seed=7),
        f"{PREFIX}score.weight": draw(4, HIDDEN, seed=8),
        f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": draw(2, HIDDEN, seed=9),
    }
    return write_adapter(
        folder, tensors, modules_to_save=["lm_head", "score"],
        trainable_token_indices={"embed_tokens": [3, 30]}, base_model_name_or_path="org/base",
    )  # fmt: skip


def test_every_tensor_read_and_written_is_there_with_its_digest(base: Path, tmp_path: Path) -> None:
    adapter, out = mixed_adapter(tmp_path / "mixed"), tmp_path / "out"
    receipt = regraft.merge(base, adapter, out)
    before, after = toys.load(base), toys.load(out)
    assert [record.name for record in receipt.tensors] == [*before, "score.weight"]
    for record in receipt.tensors:
        assert record.blake3 == digest(after[record.name])
        assert (record.file, record.shape) == ("model.safetensors", after[record.name].shape)
    assert receipt.base.tensors == {name: digest(array) for name, array in before.items()}
    factors = _read_adapter(adapter)
    assert receipt.adapters[0].tensors == {name: digest(a) for name, a in factors.items()}


def test_without_an_undo_a_replaced_tensor_of_the_base_is_not_read(
    base: Path, tmp_path: Path
) -> None:
    receipt = regraft.merge(base, mixed_adapter(tmp_path / "m"), tmp_path / "out", undo=False)
    assert toys.load(base).keys() - receipt.base.tensors.keys() == {"lm_head.weight"}
    assert receipt.totals.undo_bytes == 0
    assert [path.name for path in (tmp_path / "out" / "regraft").iterdir()] == ["receipt.json"]


def test_the_undo_patch_is_counted(base: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    patch = tmp_path / "out" / "regraft" / "undo" / "patch.safetensors"
    assert receipt.totals.undo_bytes == patch.stat().st_size


def _read_adapter(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_each_tensor_says_what_was_done_to_it(base: Path, tmp_path: Path) -> None:
    found = records(regraft.merge(base, mixed_adapter(tmp_path / "mixed"), tmp_path / "out"))
    assert {name: record.action for name, record in found.items() if record.action != "copy"} == {
        **{f"model.layers.{i}.self_attn.{n}_proj.weight": "merge" for i in (0, 1) for n in "qv"},
        f"{EMBED}.weight": "merge",
        "lm_head.weight": "replace",
        "score.weight": "add",
    }
    q0 = found[f"{Q0}.weight"]
    assert (q0.features, q0.scales, q0.adapters) == (("lora",), (2.0,), (0,))
    assert (q0.source, q0.source_dtype, q0.dtype) == (f"{Q0}.weight", "BF16", "BF16")
    rows, head = found[f"{EMBED}.weight"], found["lm_head.weight"]
    assert (rows.features, rows.scales) == (("token-rows",), ())
    assert (head.source, head.source_dtype) == (f"{PREFIX}lm_head.weight", "F32")
    assert head.dtype == "BF16"  # as the base's was
    norm = found["model.norm.weight"]
    assert (norm.changed, norm.delta_norm, norm.source_blake3) == (0, None, norm.blake3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_how_far_a_tensor_moved_is_what_numpy_says(tmp_path: Path, dtype: str) -> None:
    shapes = {"a.weight": (70, 600), "b.weight": (300, 40), "c.weight": (3, 5)}
    weights = {name: draw(*shape, dtype=toys.BF16) for name, shape in shapes.items()}
    factors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        factors |= toys.lora(name.removesuffix(".weight"), *shape, 8, seed=10 * number + 1)
    base = write_base(tmp_path / "base", weights, None)
    adapter = write_adapter(tmp_path / "a", factors, r=8, target_modules=["a", "b", "c"])
    receipt = regraft.merge(base, f"{adapter}=0.3", tmp_path / "out", dtype=dtype)
    after, squares = toys.load(tmp_path / "out"), np.zeros(2)
    for name, record in records(receipt).items():
        key = f"{PREFIX}{name.removesuffix('.weight')}"
        b, a = (factors[f"{key}.lora_{side}.weight"].astype(np.float64) for side in "BA")
        weight, delta = weights[name].astype(np.float64), 0.3 * 6 / 8 * (b @ a)
        assert record.weight_norm == pytest.approx(np.linalg.norm(weight), rel=1e-6)
        assert record.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        moved = after[name].astype(np.float64) != weight
        assert record.changed == np.count_nonzero(moved)
        assert record.changed > 0
        squares += [np.sum(weight**2), np.sum(delta**2)]
    totals = receipt.totals
    assert totals.relative_delta == pytest.approx(math.sqrt(squares[1] / squares[0]), rel=1e-6)
    changed = sum(record.changed for record in receipt.tensors)
    assert totals.changed_share == pytest.approx(changed / sum(map(np.size, weights.values())))


def test_rows_and_whole_tensors_move_too(base: Path, tmp_path: Path) -> None:
    found = records(regraft.merge(base, mixed_adapter(tmp_path / "mixed"), tmp_path / "out"))
    table = toys.load(base)[f"{EMBED}.weight"].astype(np.float64)
    rows = draw(2, HIDDEN, seed=9).astype(toys.BF16).astype(np.float64)
    record = found[f"{EMBED}.weight"]
    assert record.delta_norm == pytest.approx(np.linalg.norm(rows - table[[3, 30]]), rel=1e-6)
    assert record.changed == np.count_nonzero(rows != table[[3, 30]])
    assert found["lm_head.weight"].changed == VOCAB * HIDDEN
    assert found["score.weight"].changed == 4 * HIDDEN


@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("dtype", [toys.BF16, np.float32])
def test_the_figures_hold_for_numbers_whose_squares_float32_has_not(
    tmp_path: Path, size: float, dtype: Any
) -> None:
    weight = (size * draw(40, 300)).astype(dtype)
    base = write_base(tmp_path / "base", {"m.weight": weight}, None)
    factors = toys.lora("m", 40, 300)
    factors[f"{PREFIX}m.lora_B.weight"] *= np.float32(size)
    adapter = write_adapter(tmp_path / "a", factors, target_modules=["m"])
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    (record,) = receipt.tensors
    delta = 2 * factors[f"{PREFIX}m.lora_B.weight"].astype(float) @ factors[
        f"{PREFIX}m.lora_A.weight"]  # fmt: skip
    norms = np.linalg.norm(weight.astype(float)), np.linalg.norm(delta)
    assert (record.weight_norm, record.delta_norm) == pytest.approx(norms, rel=1e-6, abs=0)


@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_a_base_that_holds_infinity_or_nan_has_a_receipt_in_json(
    tmp_path: Path, odd: float
) -> None:
    weight = draw(4, 5)
    weight[2, 3] = odd
    base = write_base(tmp_path / "base", {"m.weight": weight}, None)
    adapter = write_adapter(tmp_path / "a", toys.lora("m", 4, 5), target_modules=["m"])
    regraft.merge(base, adapter, tmp_path / "out")
    json.loads((tmp_path / "out" / RECEIPT).read_text(), parse_constant=_not_json)


def test_the_totals_add_up(base: Path, tmp_path: Path) -> None:
    adapter, out = mixed_adapter(tmp_path / "mixed"), tmp_path / "out"
    totals = regraft.merge(base, adapter, out, threads=2).totals
    counts = (totals.tensors, totals.merged, totals.replaced, totals.added, totals.copied)
    assert counts == (22, 5, 1, 1, 15)
    after = toys.load(out).values()
    assert totals.parameters == sum(map(np.size, after))
    assert totals.bytes_written == sum(array.nbytes for array in after)
    replaced = toys.load(base)["lm_head.weight"].nbytes
    read = [*toys.load(base).values(), *_read_adapter(adapter).values()]
    assert totals.bytes_read == sum(array.nbytes for array in read) - replaced
    assert totals.threads == 2
    assert totals.seconds > 0
    assert 50 * 2**20 < totals.peak_memory < 8 * 2**30


def test_a_change_of_dtype_is_counted_apart(base: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, adapter, tmp_path / "out", dtype="float32", shard_size="4KB")
    assert (receipt.totals.converted, receipt.totals.copied) == (17, 0)
    assert dict(receipt.options) == {"dtype": "float32", "shard_size": 4000, "undo": True}
    found = records(receipt)["model.norm.weight"]
    assert (found.action, found.changed, found.dtype) == ("convert", 0, "F32")


def test_inputs_and_adapters_are_named_in_order(base: Path, tmp_path: Path) -> None:
    one, two = (write_adapter(tmp_path / n, attention(seed=s)) for n, s in (("one", 1), ("two", 9)))
    receipt = regraft.merge(base, [(two, -0.5), str(one), f"{two}=2"], tmp_path / "out")
    assert receipt.base.source == str(base)
    assert receipt.base.weight is None
    given = [(adapter.source, adapter.weight) for adapter in receipt.adapters]
    assert given == [(str(two), -0.5), (str(one), 1.0), (str(two), 2.0)]
    record = records(receipt)[f"{Q0}.weight"]
    assert (record.scales, record.adapters) == ((-1.0, 2.0, 4.0), (0, 1, 2))


def test_it_is_written_as_it_is_returned_and_survives_json(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    text = (tmp_path / "out" / RECEIPT).read_text()
    written = json.loads(text, parse_constant=_not_json)
    returned = json.loads(json.dumps(receipt.to_json()))
    digest = written.pop("digest")
    assert digest == blake3(json_bytes(written)).hexdigest()
    assert written == returned
    assert (written["receipt"], written["arithmetic"]) == (1, 1)
    assert written["regraft"] == regraft.__version__
    assert written["output"] == str(tmp_path / "out")
    created = datetime.fromisoformat(written["created"])
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=5)


def test_every_other_byte_of_the_output_has_its_digest(tmp_path: Path) -> None:
    base = toys.write_sharded_base(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (base / "tokenizer.json").write_text("{}")
    adapter, out = write_adapter(tmp_path / "adapter"), tmp_path / "out"
    receipt = regraft.merge(base, adapter, out)
    weights = {path.name: path for path in out.glob("*.safetensors")}
    others = [p for p in out.rglob("*") if p.is_file() and p not in weights.values()]
    names = {p.relative_to(out).as_posix(): p for p in others if p.name != "receipt.json"}
    assert {"README.md", "config.json", "additional_chat_templates/tool.jinja"} < names.keys()
    assert receipt.files == {n: blake3(p.read_bytes()).hexdigest() for n, p in names.items()}
    assert receipt.headers == {n: blake3(_header(p)).hexdigest() for n, p in weights.items()}


def _header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_it_is_read_back_as_it_was(base: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, mixed_adapter(tmp_path / "mixed"), tmp_path / "out")
    read = read_receipt(tmp_path / "out" / RECEIPT)
    assert read == receipt
    assert receipt_bytes(read) == (tmp_path / "out" / RECEIPT).read_bytes()


def test_one_of_the_first_version_is_read_too(base: Path, adapter: Path, tmp_path: Path) -> None:
    regraft.merge(base, adapter, tmp_path / "out")
    path = tmp_path / "out" / RECEIPT
    value = json.loads(path.read_text())
    old = {k: v for k, v in value.items() if k not in ("digest", "files", "headers")}
    path.write_bytes(json_bytes(old))
    assert read_receipt(path).files == {}
    path.write_bytes(json_bytes(old).replace(b": ", b":  ", 1))
    with pytest.raises(regraft.FormatError, match="not as it was written"):
        read_receipt(path)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda receipt: [receipt],
    "a key missing": lambda receipt: receipt.pop("totals") and receipt,
    "a key more": lambda receipt: receipt | {"more": 1},
    "no digest": lambda receipt: receipt.pop("digest") and receipt,
    "a digest of another type": lambda receipt: receipt | {"digest": 3},
    "a string for a number": lambda receipt: receipt | {"arithmetic": "1"},
    "a truth for a number": lambda receipt: receipt | {"arithmetic": True},
    "a later version": lambda receipt: receipt | {"receipt": 2},
    "null": lambda receipt: receipt | {"command": None},
    "a list for a mapping": lambda receipt: receipt | {"files": []},
    "a number among strings": lambda receipt: receipt | {"warnings": [3]},
    "an unknown action": lambda r: r | {"tensors": [r["tensors"][0] | {"action": "guess"}]},
    "a list for an action": lambda r: r | {"tensors": [r["tensors"][0] | {"action": []}]},
    "a tensor that is none": lambda receipt: receipt | {"tensors": [None]},
    "another content": lambda receipt: receipt | {"command": "other"},
}


@pytest.mark.parametrize("what", BROKEN)
def test_one_that_is_not_as_it_was_written_is_refused(
    base: Path, adapter: Path, tmp_path: Path, what: str
) -> None:
    regraft.merge(base, adapter, tmp_path / "out")
    path = tmp_path / "out" / RECEIPT
    path.write_bytes(json_bytes(BROKEN[what](json.loads(path.read_text()))))
    with pytest.raises(regraft.FormatError, match=r"receipt\.json: "):
        read_receipt(path)


def _not_json(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_the_call_from_python_is_recorded(base: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, (adapter, 0.5), tmp_path / "out", dtype="float16")
    where = f"'{base}', [('{adapter}', 0.5)], '{tmp_path / 'out'}'"
    assert receipt.command == f"regraft.merge({where}, dtype='float16')"


def test_a_token_is_recorded_nowhere(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = command_here("merge", base, adapter, "-o", tmp_path / "out", "--token", "hf_secret")
    assert done.returncode == 0, done.stderr
    contents: Iterable[bytes | None] = toys.tree(tmp_path / "out").values()
    assert not any(b"hf_secret" in content for content in contents if content)


# An adapter that changes nothing


def untrained(folder: Path) -> Path:
    """Write an adapter as it is before training: B is zero."""
    tensors = {key: a * ("lora_A" in key) for key, a in attention().items()}
    return write_adapter(folder, tensors)


def test_an_untrained_adapter_is_quiet_and_said_to_be(base: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, untrained(tmp_path / "untrained"), tmp_path / "out")
    assert receipt.quiet
    assert receipt.totals.changed_share == 0
    assert receipt.totals.relative_delta == 0
    assert any("nothing" in warning or "NEARLY" in warning for warning in receipt.warnings)
    before, after = toys.load(base), toys.load(tmp_path / "out")
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_a_trained_one_is_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    assert not receipt.quiet
    assert receipt.warnings == ()


def test_a_delta_below_the_dtypes_step_is_quiet_in_it_and_not_in_float32(
    base: Path, tmp_path: Path
) -> None:
    faint = {key: a * (1e-4 if "lora_B" in key else 1) for key, a in attention().items()}
    adapter = write_adapter(tmp_path / "faint", faint, r=3, lora_alpha=0.003)
    coarse = regraft.merge(base, adapter, tmp_path / "coarse")
    fine = regraft.merge(base, adapter, tmp_path / "fine", dtype="float32")
    assert (coarse.quiet, fine.quiet) == (True, False)
    assert coarse.totals.changed_share < 1e-3 < fine.totals.changed_share


def test_one_quiet_adapter_of_two_is_not_a_quiet_merge(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    both = [untrained(tmp_path / "untrained"), adapter]
    assert not regraft.merge(base, both, tmp_path / "out").quiet


def test_a_receipt_of_many_tensors_is_the_json_of_all_and_a_digest(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """It is written some records at a time; its bytes are those of one piece."""
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    names = [f'tensor \u00e9 {number} "x"\n' for number in range(300)]
    records = [replace(each, name=name) for name in names for each in receipt.tensors]
    for tensors in ((), receipt.tensors[:1], tuple(records)):
        made = replace(receipt, tensors=tensors)
        assert receipt_bytes(made) == sealed(json_bytes(made.to_json()))
    told = json.loads(receipt_bytes(made))["digest"]
    assert told == blake3(json_bytes(made.to_json())).hexdigest()
