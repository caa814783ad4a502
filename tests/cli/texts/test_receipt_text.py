"""The summary a merge ends with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from regraft.cli.texts.receipt import render
from regraft.merging.files.receipt import InputRecord, Receipt, TensorRecord, Totals


def record(name: str, delta: float | None = None, changed: int = 0) -> TensorRecord:
    """Return the record of one 10 x 10 tensor of norm 1."""
    return TensorRecord(
        name=name,
        file="model.safetensors",
        action="copy" if delta is None else "merge",
        dtype="BF16",
        shape=(10, 10),
        source=name,
        source_dtype="BF16",
        source_blake3="00",
        blake3="11",
        weight_norm=None if delta is None else 1.0,
        delta_norm=delta,
        changed=changed,
    )


TOTALS = Totals(
    tensors=9,
    merged=7,
    copied=2,
    converted=0,
    replaced=0,
    added=0,
    parameters=900,
    bytes_read=1_900_000,
    bytes_written=1_800_000_000,
    relative_delta=0.0123,
    changed_share=0.5,
    seconds=2.0,
    peak_memory=300 * 2**20,
    threads=2,
    undo_bytes=7_200_000,
)


def receipt(output: str = "out") -> Receipt:
    """Return a receipt of seven merged tensors, the last of which moved most."""
    merged = [record(f"t{n}", delta=0.01 * n, changed=10 * n) for n in range(1, 8)]
    return Receipt(
        regraft="0.1.0",
        created="2025-01-01T00:00:00Z",
        command="regraft merge ...",
        output=output,
        base=InputRecord("org/base", "c" * 40, None, {}),
        adapters=(InputRecord("./a", None, 1.0, {}), InputRecord("./b", None, 0.5, {})),
        options={},
        tensors=(*merged, record("copied")),
        totals=TOTALS,
    )


def test_the_overview_names_inputs_counts_time_and_memory() -> None:
    lines = render(receipt(), cap="512MiB").splitlines()[:9]
    assert [" ".join(line.split()) for line in lines] == [
        f"base org/base at {'c' * 40}",
        "adapter ./a",
        "adapter ./b x 0.5",
        "tensors 9: 7 merged, 2 copied",
        "moved |delta|/|W| 1.23%, 50% of the adapted elements changed",
        "size 900 parameters, 1.80 GB in 1 file, 1.90 MB read",
        "undo 7.20 MB (0.4% of the model): `regraft unmerge out -o BASE`",
        "time 2.00 s on 2 threads, 900 MB/s written",
        "memory 300 MiB at peak, the cap is 512 MiB",
    ]


def test_without_an_undo_nothing_is_said_of_it() -> None:
    without = replace(receipt(), totals=replace(TOTALS, undo_bytes=0))
    assert "undo" not in render(without, cap=1)


def test_the_command_that_undoes_can_be_pasted() -> None:
    assert "`regraft unmerge 'my models/out' -o BASE`" in render(receipt("my models/out"), cap=1)


def test_the_five_tensors_that_moved_most_are_listed_in_order() -> None:
    lines = render(receipt(), cap=2**30).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("moved most"))
    assert [line.split() for line in lines[start + 1 : start + 7]] == [
        ["t7", "7%", "70%"],
        ["t6", "6%", "60%"],
        ["t5", "5%", "50%"],
        ["t4", "4%", "40%"],
        ["t3", "3%", "30%"],
        [],
    ]


def test_a_weight_of_zeros_has_no_share_to_sort_by() -> None:
    zeros = replace(record("zeros", delta=1.0), weight_norm=0.0)
    assert "moved most" not in render(replace(receipt(), tensors=(zeros,)), cap=1)


def test_the_last_line_loads_the_model(tmp_path: Path) -> None:
    def last_line(architecture: str) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        return render(receipt(str(tmp_path)), cap=1).splitlines()[-1]

    path = str(tmp_path)
    line = f"load it with: transformers.AutoModelForCausalLM.from_pretrained({path!r})"
    assert last_line("LlamaForCausalLM") == line
    line = f"load it with: transformers.BertForTokenClassification.from_pretrained({path!r})"
    assert last_line("BertForTokenClassification") == line


def test_without_a_config_the_files_are_named(tmp_path: Path) -> None:
    assert "safetensors" in render(receipt(str(tmp_path)), cap=1).splitlines()[-1]


def test_a_quiet_merge_is_said_loudly_with_its_likely_causes() -> None:
    totals = replace(TOTALS, changed_share=0.0, relative_delta=1e-7)
    quiet = replace(receipt(), totals=totals)
    assert quiet.quiet
    text = quiet.quiet_warning
    assert "(NEARLY) THE BASE" in text
    assert "0.000% of the adapted elements" in text
    assert "lora_B is still zero" in text
    assert "dtype float32" in text
