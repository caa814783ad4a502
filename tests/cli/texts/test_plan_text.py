"""A dry run's plan as text."""

from __future__ import annotations

from typing import Any

from regraft.cli.texts.plan import group, pattern, render


def step(name: str, action: str = "copy", **parts: Any) -> dict[str, Any]:
    """Return one step of a plan's JSON."""
    plain = {"features": [], "scales": [], "dtype": "BF16", "shape": [4, 8], "bytes": 64}
    return {"name": name, "action": action, "source": name, "memory": 0, **plain, **parts}


def lora(name: str, scale: float = 2.0) -> dict[str, Any]:
    """Return one step that merges."""
    return step(name, "merge", features=["lora"], scales=[scale])


def plan(steps: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    """Return a plan's JSON around ``steps``."""
    merged = sum(s["action"] == "merge" for s in steps)
    totals = {
        "tensors": len(steps),
        "merged": merged,
        "copied": len(steps) - merged,
        "converted": 0,
        "replaced": 0,
        "added": 0,
        "parameters": 32 * len(steps),
        "bytes_read": 70 * len(steps),
        "bytes_written": 64 * len(steps),
    }
    return {
        "base": "base",
        "quantized": [],
        "adapters": [],
        "out": "out",
        "dtype": None,
        "shards": [{"name": "model.safetensors", "bytes": 64 * len(steps), "tensors": len(steps)}],
        "steps": steps,
        "totals": totals,
        "memory": 100 * 2**20,
        "disk": {"needed": 1_000_000, "free": 5_000_000},
        "warnings": [],
        **parts,
    }


def test_layers_that_are_treated_alike_share_a_line() -> None:
    steps = [lora(f"model.layers.{n}.q.weight") for n in range(28)]
    text = render(plan([*steps, step("model.norm.weight")]), verbose=False)
    lines = text.splitlines()
    assert [" ".join(line.split()) for line in lines[1:3]] == [
        "model.layers.{0..27}.q.weight merge lora x 2 BF16 4x8 1.79 kB x28",
        "model.norm.weight copy BF16 4x8 64 B",
    ]


def test_every_tensor_has_a_line_when_verbose() -> None:
    steps = [lora(f"model.layers.{n}.q.weight") for n in range(3)]
    text = render(plan(steps), verbose=True)
    assert all(f"model.layers.{n}.q.weight" in text for n in range(3))


def test_another_scale_shape_action_or_dtype_is_another_line() -> None:
    steps = [
        lora("l.0.w"),
        lora("l.1.w", scale=1.0),
        step("l.2.w"),
        step("l.3.w", shape=[8, 4]),
        step("l.4.w", dtype="F32"),
        lora("l.5.w"),
    ]
    names = [[s["name"] for s in members] for members in group(steps)]
    assert names == [["l.0.w", "l.5.w"], ["l.1.w"], ["l.2.w"], ["l.3.w"], ["l.4.w"]]


def test_a_pattern_counts_every_number_that_varies() -> None:
    names = [f"layers.{n}.experts.{e}.w1.weight" for n in range(2) for e in range(4)]
    assert pattern(names) == ("layers.{0..1}.experts.{0..3}.w1.weight", "x8")


def test_a_pattern_with_holes_says_out_of_how_many() -> None:
    assert pattern(["l.0.e.0", "l.0.e.1", "l.1.e.0"]) == ("l.{0..1}.e.{0..1}", "x3 of 4")
    assert pattern(["l.0.w", "l.2.w", "l.3.w"]) == ("l.{0,2..3}.w", "x3")


def test_numbers_inside_words_do_not_vary() -> None:
    assert pattern(["h.7.w1.mlp2"]) == ("h.7.w1.mlp2", "")
    assert pattern(["0.w1", "1.w1"]) == ("{0..1}.w1", "x2")
    assert len(group([step("a.w1"), step("a.w2")])) == 2


def test_sizes_memory_and_disk_are_told() -> None:
    text = render(plan([lora("a"), step("b")]), verbose=False)
    assert "2: 1 merged, 1 copied" in text
    assert "100 MiB at most" in text
    assert "1.00 MB needed, 5.00 MB free" in text
    assert text.endswith("Nothing was written: this is a dry run.")


def test_a_plan_without_an_output_tells_no_disk() -> None:
    text = render(plan([lora("a")], out=None, disk={}), verbose=False)
    assert "disk" not in text
    assert "\nout " not in text
