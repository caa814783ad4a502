"""A model is held against the merge done again, whoever wrote it; what is wrong is told."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regraft
from merging import toys
from merging.toys import BF16
from regraft.testing import zoo
from regraft.testing.adapters import make_adapter

ROWS, COLUMNS, RANK, SCALE = 300, 256, 16, 2.0
NAMES = [f"layers.{layer}.{leaf}.weight" for layer in range(2) for leaf in ("q_proj", "v_proj")]
FREE = ["layers.0.o_proj.weight", "norm.weight", "embed.weight"]


# -- another tool's merge, by numpy ----------------------------------------------------------------


class Tool:
    """A base, an adapter of deltas of a given size, and a merge as some other tool makes it.

    Args:
        folder: where to work.
        dtype: the base's.
        size: norm of a delta over that of its weight.
        scale: what the adapter's scale comes to; ``config`` has to say the same.
        seed: of the adapter's numbers.
        config: fields of the adapter's config.
    """

    def __init__(
        self, folder: Path, dtype: Any = BF16, size: float = 0.01, scale: float = SCALE,
        seed: int = 1, **config: Any,
    ) -> None:  # fmt: skip
        self.folder, self.scale = folder, scale
        self._numbers = itertools.count()
        self.weights = {
            name: (0.02 * toys.draw(ROWS, COLUMNS, seed=number)).astype(dtype)
            for number, name in enumerate([*NAMES, FREE[0], FREE[2]])
        }
        self.weights[FREE[1]] = toys.draw(COLUMNS, seed=99).astype(dtype)
        self.base = toys.write_base(folder / "base", self.weights, None)
        self.factors, self.deltas = {}, {}
        for number, name in enumerate(NAMES):
            a = toys.draw(RANK, COLUMNS, seed=seed + 100 * number)
            b = toys.draw(ROWS, RANK, seed=seed + 100 * number + 1) * np.float32(
                size * 0.02 / (scale * RANK**0.5)
            )
            key = f"{toys.PREFIX}{name.removesuffix('.weight')}"
            self.factors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            self.deltas[name] = np.float32(scale) * (b @ a)
        fields = {"r": RANK, "lora_alpha": SCALE * RANK, **config}
        self.adapter = toys.write_adapter(folder / "adapter", self.factors, **fields)

    def merged(
        self, times: Mapping[str, float] | float = 1.0, stored: Any = None, coarse: bool = True
    ) -> dict[str, np.ndarray]:
        """Return every tensor, with the delta so many times (1 where not said).

        Args:
            times: by name, or for all.
            stored: dtype; the base's by default.
            coarse: whether the delta is rounded to that dtype before it is added, and twice.
        """
        return {name: self._tensor(name, times, stored, coarse) for name in self.weights}

    def _tensor(self, name: str, times: Any, stored: Any, coarse: bool) -> np.ndarray:
        weight = self.weights[name].astype(stored or self.weights[name].dtype)
        if name not in self.deltas:
            return weight
        factor = times if isinstance(times, float) else times.get(name, 1.0)
        delta = np.float32(factor) * self.deltas[name]
        if coarse:
            delta = (delta / self.scale).astype(weight.dtype).astype(np.float32)
            delta = (delta * self.scale).astype(weight.dtype).astype(np.float32)
        return (weight.astype(np.float32) + delta).astype(weight.dtype)

    def judge(self, tensors: Mapping[str, np.ndarray], **arguments: Any) -> regraft.VerifyReport:
        """Write tensors as a model, and judge it."""
        out = toys.write_base(self.folder / f"merged-{next(self._numbers)}", tensors, None)
        given = {"base": self.base, "adapters": self.adapter, "threads": 1} | arguments
        return regraft.verify(out, **given)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tool]:
    """Make each tool once."""

    @cache
    def make(dtype: Any = BF16, size: float = 0.01) -> Tool:
        return Tool(tmp_path_factory.mktemp("tool"), dtype, size)

    return make


def verdicts(report: regraft.VerifyReport) -> dict[str, str]:
    """Return the verdicts by tensor."""
    return {tensor.name: tensor.verdict for tensor in report.tensors}


SIZES = [0.3, 0.01, 0.001]
DTYPES = [BF16, np.float16, np.float32]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stored", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_right_merge_is_within_rounding(
    tools: Callable[..., Tool], dtype: Any, stored: Any, size: float
) -> None:
    tool = tools(dtype, size)
    for coarse in (True, False):
        report = tool.judge(tool.merged(stored=stored, coarse=coarse))
        assert report.ok, report.conclusions
        assert all(t.ulps is not None for t in report.tensors)
        if stored != np.float32:  # where the size of a delta counts, and not that of the weight
            assert all((t.ulps or 0) <= 2 for t in report.tensors)
        free = {n: v for n, v in verdicts(report).items() if n in FREE}
        assert set(free.values()) == {"exact"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(
    ("times", "kind"),
    [(0.0, "missing"), (2.0, "twice"), (4.0, "scale"), (0.25, "scale"), (-1.0, "scale"),
     (1.2, "scale")],
)  # fmt: skip
def test_a_delta_that_is_not_there_once_is_told(
    tools: Callable[..., Tool], dtype: Any, size: float, times: float, kind: str
) -> None:
    tool = tools(dtype, size)
    one = NAMES[1]
    report = tool.judge(tool.merged({one: times}))
    assert report.verdict == "different"
    told = {n: v for n, v in verdicts(report).items() if v not in ("exact", "rounding")}
    assert told == {one: kind}
    found = next(t for t in report.tensors if t.name == one)
    assert found.coefficient == pytest.approx(times, abs=0.1)


ALL = {
    0.0: "this is the base: there is no delta anywhere",
    2.0: "every delta was applied twice",
    4.0: "every delta is there 4",
}


@pytest.mark.parametrize("times", ALL)
def test_what_all_deltas_have_in_common_comes_first(
    tools: Callable[..., Tool], times: float
) -> None:
    tool = tools()
    report = tool.judge(tool.merged(times))
    assert report.conclusions[0].startswith(ALL[times])
    assert "every q_proj (2 tensors), every v_proj (2 tensors)" in report.conclusions[1]


def test_the_base_itself_has_no_delta(tools: Callable[..., Tool]) -> None:
    tool = tools()
    report = regraft.verify(tool.base, base=tool.base, adapters=tool.adapter)
    assert report.conclusions[0] == "this is the base: there is no delta anywhere"
    assert {t.coefficient for t in report.tensors if t.verdict == "missing"} == {0.0}


SCALES: dict[str, tuple[dict[str, Any], float, float]] = {
    "alpha/sqrt(r) was taken for alpha/r": ({}, 4.0, 1.0),
    "alpha/r was taken for alpha/sqrt(r)": ({"use_rslora": True}, 0.25, 1.0),
    "the scale was left out": ({}, 0.5, 1.0),
    "alpha was not divided by r": ({}, 16.0, 1.0),
    "the weight 0.3 was left out": ({}, 1 / 0.3, 0.3),
    "it was subtracted": ({}, -1.0, 1.0),
    "the config's r and alpha were taken for the patterns' own": (
        {"lora_alpha": 96, "alpha_pattern": {"q_proj": 32, "v_proj": 32}}, 3.0, 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("note", SCALES)
def test_it_says_what_was_probably_taken_for_the_scale(tmp_path: Path, note: str) -> None:
    fields, times, weight = SCALES[note]
    scale = weight * SCALE * (RANK**0.5 if fields.get("use_rslora") else 1.0)
    tool = Tool(tmp_path, size=0.05, scale=scale, **fields)
    report = tool.judge(tool.merged(times), adapters=(tool.adapter, weight))
    wrong = [tensor for tensor in report.tensors if tensor.verdict == "scale"]
    assert [tensor.name for tensor in wrong] == NAMES
    assert all(note in tensor.note for tensor in wrong), [tensor.note for tensor in wrong]


def test_another_base_is_told_from_another_adapter(tmp_path: Path) -> None:
    tool, other = Tool(tmp_path / "a"), Tool(tmp_path / "b", seed=7)
    report = tool.judge(other.merged())
    assert report.conclusions[0].startswith("another adapter was merged")
    assert set(verdicts(report).values()) == {"exact", "another-adapter"}
    strange = {name: 1.3 * weight.astype(np.float32) for name, weight in tool.merged().items()}
    report = tool.judge({name: weight.astype(BF16) for name, weight in strange.items()})
    assert report.conclusions[0] == (
        "it was made from another base: 3 of 3 tensors that no adapter touches are not the base's"
    )
    assert set(verdicts(report).values()) == {"another-base"}


@pytest.mark.parametrize("size", [0.001, 0.003, 0.01])
def test_another_adapter_shows_though_each_element_is_near(tmp_path: Path, size: float) -> None:
    tool = Tool(tmp_path / "a", size=size)
    other = Tool(tmp_path / "b", size=size, seed=7)
    report = tool.judge(other.merged())
    assert {verdicts(report)[name] for name in NAMES} == {"another-adapter"}
    tensors = tool.merged(coarse=False)
    for name in NAMES:
        both = tool.weights[name].astype(np.float32) + tool.deltas[name] + other.deltas[name]
        tensors[name] = both.astype(BF16)
    report = tool.judge(tensors)
    assert {verdicts(report)[name] for name in NAMES} == {"another-adapter"}
    assert all("and something else too" in t.note for t in report.tensors if t.name in NAMES)


def test_a_few_elements_that_are_off_are_counted(tools: Callable[..., Tool]) -> None:
    tool = tools()
    tensors = tool.merged()
    for at in (5, 700, 70000):
        tensors[NAMES[2]].reshape(-1)[at] += np.asarray(0.5, BF16)
    tensors[FREE[0]].reshape(-1)[3] = np.nan
    report = tool.judge(tensors)
    told = {t.name: (t.verdict, t.note) for t in report.tensors if t.note}
    total = ROWS * COLUMNS
    assert told[NAMES[2]] == ("elements", f"the merge, but for 3 of {total} elements")
    assert told[FREE[0]][0] == "changed"
    assert f"1 of {total} elements differ" in told[FREE[0]][1]


@pytest.mark.parametrize("bit", range(16))
def test_any_flipped_bit_in_an_exact_merge_shows(tools: Callable[..., Tool], bit: int) -> None:
    """Low bits of one element cannot be told from rounding, but they are never called exact."""
    tool = tools()
    out = tool.folder / f"flipped-{bit}"
    regraft.merge(tool.base, tool.adapter, out)
    tensors = toys.load(out)
    tensors[NAMES[0]].view(np.uint16).reshape(-1)[77] ^= np.uint16(1 << bit)
    report = tool.judge(tensors)
    assert verdicts(report)[NAMES[0]] in (("rounding",) if bit < 2 else ("rounding", "elements"))
    assert report.verdict != "exact"
    assert report.ok == (verdicts(report)[NAMES[0]] == "rounding")
    if bit >= 4:
        assert not report.ok


def test_swapped_tensors_are_told(tools: Callable[..., Tool]) -> None:
    tool = tools()
    tensors = tool.merged()
    a, b = NAMES[0], NAMES[2]
    tensors[a], tensors[b] = tensors[b], tensors[a]
    report = tool.judge(tensors)
    told = {t.name: t.note for t in report.tensors if t.verdict == "swapped"}
    assert told == {a: f"it holds what belongs to {b}", b: f"it holds what belongs to {a}"}
    tensors = tool.merged()
    tensors[a] = tensors[a][::-1]
    report = tool.judge(tensors)
    assert verdicts(report)[a] == "other"


def test_tensors_missing_added_or_misshapen_are_told(tools: Callable[..., Tool]) -> None:
    tool = tools()
    tensors = tool.merged()
    del tensors[NAMES[0]]
    tensors[NAMES[1]] = tensors[NAMES[1]].T.copy()
    tensors["layers.0.q_proj.lora_A.default.weight"] = toys.draw(2, 2)
    tensors["more"] = toys.draw(1)
    report = tool.judge(tensors)
    told = {t.name: (t.verdict, t.note) for t in report.tensors if t.note}
    assert told == {
        NAMES[0]: ("absent", "the merged model does not have it"),
        NAMES[1]: ("shape", f"it is [{COLUMNS}, {ROWS}], and the merge [{ROWS}, {COLUMNS}]"),
        "more": ("extra", "the merge has no such tensor"),
        "layers.0.q_proj.lora_A.default.weight": (
            "extra", "a factor of an adapter, which a merged model does not have",
        ),
    }  # fmt: skip


def test_what_was_rounded_on_the_way_is_within_rounding(tools: Callable[..., Tool]) -> None:
    tool = tools()
    tensors = {name: array.astype(np.float32) for name, array in tool.merged().items()}
    report = tool.judge(tensors)
    assert report.ok
    wide = next(t for t in report.tensors if t.name == NAMES[0])
    assert (wide.verdict, wide.note) == ("rounding", "rounded to bfloat16 before it was stored")


def test_a_delta_of_16_bits_in_a_wider_model_is_within_rounding(tools: Callable[..., Tool]) -> None:
    tool = tools(np.float32, 0.01)
    tensors = dict(tool.weights)
    for name, delta in tool.deltas.items():
        tensors[name] = tensors[name] + delta.astype(BF16).astype(np.float32)
    report = tool.judge(tensors)
    assert report.ok
    assert {t.note for t in report.tensors} == {"", "the delta was computed with 16 bits"}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32"])
def test_other_dtypes_cannot_be_judged(tools: Callable[..., Tool], dtype: str) -> None:
    tool = tools()
    tensors: dict[str, Any] = dict(tool.merged())
    kind = toys.ml_dtypes.float8_e4m3fn if dtype == "F8_E4M3" else np.int32
    tensors[FREE[2]] = tensors[FREE[2]].astype(kind)
    report = tool.judge(tensors)
    assert (report.ok, report.verdict) == (False, "unjudged")
    assert f"stored as {dtype}" in next(t.note for t in report.tensors if t.verdict == "unjudged")


def test_a_quantized_model_cannot_be_judged(tools: Callable[..., Tool]) -> None:
    tool = tools()
    tensors = tool.merged() | {"layers.0.q_proj.qweight": toys.draw(2, dtype=np.int32)}
    with pytest.raises(regraft.UnsupportedError, match="merged model is quantized"):
        tool.judge(tensors)


def test_inputs_that_do_not_fit_cannot_be_judged(
    tools: Callable[..., Tool], tmp_path: Path
) -> None:
    tool = tools()
    with pytest.raises(regraft.MismatchError):
        tool.judge(tool.merged(), adapters=toys.write_adapter(tmp_path / "of another"))


# -- several adapters ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tool, Tool]:
    """Two adapters for one base."""
    folder = tmp_path_factory.mktemp("pair")
    return Tool(folder / "one", size=0.05), Tool(folder / "two", size=0.03, seed=31)


@pytest.mark.parametrize(
    ("times", "kind", "said"),
    [
        ((1, 0.5), "", ""),
        ((0, 0.5), "adapter-missing", "one/adapter is missing"),
        ((1, 0), "adapter-missing", "two/adapter is missing"),
        ((1, 1), "scale", "two/adapter is in it twice"),
        ((-1, 0.5), "scale", "one/adapter is in it -1 times (subtracted)"),
        ((2, 1), "twice", "twice"),
        ((0, 0), "missing", "missing"),
    ],
)
def test_of_several_adapters_the_one_is_named(
    pair: tuple[Tool, Tool], times: tuple[float, float], kind: str, said: str
) -> None:
    one, two = pair
    tensors = one.merged(0.0)
    for name in NAMES:
        value = one.weights[name].astype(np.float32)
        for tool, factor in zip(pair, times, strict=True):
            value = (value + np.float32(factor) * tool.deltas[name]).astype(BF16).astype(np.float32)
        tensors[name] = value.astype(BF16)
    report = one.judge(tensors, adapters=[one.adapter, (two.adapter, 0.5)])
    if not kind:
        assert report.ok
        return
    touched = [t for t in report.tensors if t.name in NAMES]
    assert {t.verdict for t in touched} == {kind}
    assert all(said in t.note for t in touched), touched[0].note


# -- regraft's own merges --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for bases and adapters that PEFT makes."""
    return tmp_path_factory.mktemp("shop")


def made(shop: Path, architecture: str, config: Mapping[str, Any], dtype: str = "bfloat16",
         seed: int = 1) -> tuple[Path, Path]:  # fmt: skip
    """Return a base of the zoo and an adapter that PEFT made for it, once for the same arguments.

    Tests change copies of the two only.
    """
    from peft import LoraConfig

    base = shop / f"{architecture}-{dtype}"
    if not base.exists():
        zoo.make_base(architecture, base, dtype)
    key = hashlib.sha256(f"{sorted(config.items())} {seed}".encode()).hexdigest()[:12]
    adapter = shop / f"{base.name}-adapter-{key}"
    if not adapter.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_adapter(base, adapter, LoraConfig(**config), seed)
    return base, adapter


LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
OWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama", LLAMA, {}),
    "to float32": ("llama", LLAMA, {"dtype": "float32"}),
    "to float16": ("llama", LLAMA, {"dtype": "float16"}),
    "in shards": ("llama", LLAMA, {"shard_size": "4KB"}),
    "dora": ("llama", LLAMA | {"use_dora": True}, {}),
    "rslora": ("llama", LLAMA | {"use_rslora": True}, {}),
    "pissa": ("llama", LLAMA | {"init_lora_weights": "pissa"}, {}),
    "whole modules": ("llama", LLAMA | {"modules_to_save": ["lm_head"]}, {"dtype": "float32"}),
    "token rows": ("llama", LLAMA | {"trainable_token_indices": {"embed_tokens": [3, 9]}}, {}),
    "embeddings": ("llama", LLAMA | {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "tied": ("llama_tied", LLAMA, {}),
    "untied": ("llama_tied", LLAMA | {"target_modules": ["lm_head", "q_proj"]}, {}),
    "transposed": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, {}),
    "fused": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}, {}),
    "experts": ("mixtral", {"r": 4, "target_parameters": ["mlp.experts.gate_up_proj"]}, {}),
    "convolutions": ("toynet", {"r": 3, "target_modules": ["conv1d", "conv2d"]}, {}),
}


@pytest.mark.parametrize("feature", OWN)
def test_regrafts_own_merge_is_exact(shop: Path, tmp_path: Path, feature: str) -> None:
    architecture, config, options = OWN[feature]
    base, adapter = made(shop, architecture, config)
    regraft.merge(base, adapter, tmp_path / "out", **options)
    report = regraft.verify(tmp_path / "out", base=base, adapters=adapter)
    assert report.verdict == "exact", (report.conclusions, report.differences)
    assert report.conclusions[0] == "the files are those of the receipt"
    assert report.checked["judged"] == len(report.tensors) == report.checked["tensors"]


def test_several_adapters_with_weights_are_exact(shop: Path, tmp_path: Path) -> None:
    base, one = made(shop, "llama", LLAMA)
    _, two = made(shop, "llama", LLAMA | {"target_modules": ["q_proj", "o_proj"]}, seed=5)
    regraft.merge(base, [(one, 0.5), (two, -2)], tmp_path / "out")
    given = {"base": base, "max_memory": "300MiB", "threads": 2}
    assert regraft.verify(tmp_path / "out", adapters=[(one, 0.5), (two, -2)], **given).ok
    report = regraft.verify(tmp_path / "out", adapters=[(one, 0.5)], **given)
    told = {t.name.split(".")[-2] for t in report.tensors if t.verdict not in ("exact", "rounding")}
    assert {"q_proj", "o_proj"} == told


def test_damage_and_both_questions_at_once(shop: Path, tmp_path: Path) -> None:
    base, adapter = made(shop, "llama", LLAMA)
    out = tmp_path / "out"
    regraft.merge(base, adapter, out)
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    report = regraft.verify(out, base=base, adapters=adapter)
    assert report.verdict == "different"
    assert [str(d) for d in report.differences] == ["config.json: its bytes have changed"]
    assert set(verdicts(report).values()) == {"exact"}
    (out / "regraft" / "receipt.json").write_text("{}")
    report = regraft.verify(out, base=base, adapters=adapter)
    assert [d.file for d in report.differences] == ["regraft/receipt.json"]
    (out / "model.safetensors").write_bytes(b"")
    report = regraft.verify(out, base=base, adapters=adapter)
    assert any("was not done again" in warning for warning in report.warnings)


# -- PEFT's merges ---------------------------------------------------------------------------------


def peft_merge(base: Path, adapters: list[Path], out: Path, dtype: str = "bfloat16") -> Path:
    """Merge as PEFT does, into a model of a dtype, and save it."""
    import torch
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_pefts_merge_is_within_rounding(
    shop: Path, tmp_path: Path, architecture: str, dtype: str, stored: str
) -> None:
    targets = {"gpt2": ["c_attn", "c_proj"]}.get(architecture, ["q_proj", "v_proj", "o_proj"])
    for extra in ({}, {"use_rslora": True}, {"use_dora": True}):
        config = {"r": 4, "lora_alpha": 8, "target_modules": targets, **extra}
        base, adapter = made(shop, architecture, config, dtype)
        out = peft_merge(base, [adapter], tmp_path / "-".join(["out", *extra]), stored)
        report = regraft.verify(out, base=base, adapters=adapter)
        assert report.verdict in ("exact", "rounding"), report.conclusions
        assert max(t.ulps or 0 for t in report.tensors) <= 8


def test_pefts_merge_of_experts_is_within_rounding(shop: Path, tmp_path: Path) -> None:
    base, adapter = made(shop, *OWN["experts"][:2])
    out = peft_merge(base, [adapter], tmp_path / "out")
    report = regraft.verify(out, base=base, adapters=adapter)
    assert report.verdict in ("exact", "rounding"), report.conclusions


@pytest.fixture
def by_peft(shop: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter, and PEFT's merge of them."""
    base, adapter = made(shop, "llama", LLAMA)
    kept = shop / "llama-merged"
    if not kept.exists():
        peft_merge(base, [adapter], kept)
    return base, adapter, Path(shutil.copytree(kept, tmp_path / "merged"))


def change(folder: Path, how: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Change the tensors of a model of one file."""
    tensors = toys.load(folder)
    how(tensors)
    toys.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


DOWN = "model.layers.1.mlp.down_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def test_pefts_merge_with_one_module_left_out(by_peft: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = by_peft
    change(merged, lambda tensors: tensors.update({DOWN: toys.load(base)[DOWN]}))
    report = regraft.verify(merged, base=base, adapters=adapter)
    assert report.conclusions == (f"the delta is missing in {DOWN}",)


def test_pefts_merge_done_twice(by_peft: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = by_peft
    merged = peft_merge(base, [adapter, adapter], tmp_path / "twice")
    report = regraft.verify(merged, base=base, adapters=adapter)
    assert report.conclusions[0] == "every delta was applied twice"


def test_pefts_merge_without_its_rslora(shop: Path, tmp_path: Path) -> None:
    base, adapter = made(shop, "llama", LLAMA | {"use_rslora": True})
    plain = Path(shutil.copytree(adapter, tmp_path / "plain"))
    config = toys.read_json(plain / "adapter_config.json") | {"use_rslora": False}
    toys.write_json(plain / "adapter_config.json", config)
    merged = peft_merge(base, [plain], tmp_path / "merged")
    report = regraft.verify(merged, base=base, adapters=adapter)
    assert report.conclusions[0] == "every delta is there 0.5 times"
    notes = {tensor.note for tensor in report.tensors if tensor.note}
    assert all("alpha/r was taken for alpha/sqrt(r)" in note for note in notes)


def test_pefts_merge_of_another_adapter(
    shop: Path, by_peft: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _ = by_peft
    _, other = made(shop, "llama", LLAMA, seed=9)
    merged = peft_merge(base, [other], tmp_path / "other")
    report = regraft.verify(merged, base=base, adapters=adapter)
    assert report.conclusions[0].startswith("another adapter was merged")


def test_pefts_merge_into_another_base(by_peft: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = by_peft
    model = zoo.load_base(base)
    zoo.randomize(model, seed=77)
    model.bfloat16().save_pretrained(tmp_path / "another")
    merged = peft_merge(tmp_path / "another", [adapter], tmp_path / "merged-other")
    report = regraft.verify(merged, base=base, adapters=adapter)
    assert report.conclusions[0].startswith("it was made from another base")


def test_pefts_merge_with_two_tensors_swapped(by_peft: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = by_peft
    other = Q.replace("layers.0", "layers.1")

    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q], tensors[other] = tensors[other], tensors[Q]

    report = regraft.verify(change(merged, swap), base=base, adapters=adapter)
    told = {t.name for t in report.tensors if t.verdict == "swapped"}
    assert told == {Q, other}


def test_an_adapter_saved_beside_the_base_is_not_merged(
    by_peft: tuple[Path, Path, Path],
) -> None:
    base, adapter, _ = by_peft
    report = regraft.verify(base, base=base, adapters=adapter)
    assert report.conclusions[0] == "this is the base: there is no delta anywhere"


# -- ties, names and layouts -----------------------------------------------------------------------

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def test_a_tied_tensor_may_be_there_once_or_twice(shop: Path, tmp_path: Path) -> None:
    base, adapter = made(shop, "llama_tied", LLAMA)
    merged = peft_merge(base, [adapter], tmp_path / "merged")
    twice = change(merged, lambda tensors: tensors.update({HEAD: tensors[EMBED]}))
    report = regraft.verify(twice, base=base, adapters=adapter)
    assert verdicts(report)[HEAD] == "exact"
    assert report.ok
    changed = change(merged, lambda tensors: tensors.update({HEAD: tensors[EMBED] * 2}))
    report = regraft.verify(changed, base=base, adapters=adapter)
    assert not report.ok
    stored = change(tmp_path / "merged", lambda tensors: tensors.update({HEAD: tensors[EMBED]}))
    other = regraft.verify(base, base=stored, adapters=adapter)
    assert verdicts(other)[HEAD] == "exact"


def test_a_tie_that_came_apart_has_to_be_said(shop: Path, tmp_path: Path) -> None:
    base, adapter = made(shop, *OWN["untied"][:2])
    out = tmp_path / "out"
    regraft.merge(base, adapter, out)
    shutil.rmtree(out / "regraft")
    config = toys.read_json(out / "config.json") | {"tie_word_embeddings": True}
    toys.write_json(out / "config.json", config)
    report = regraft.verify(out, base=base, adapters=adapter)
    assert [str(d) for d in report.differences] == [
        "config.json: tie_word_embeddings is True, and the merge makes it False"
    ]


def fuse(tensors: dict[str, np.ndarray]) -> None:
    """Turn Mixtral's experts, one tensor each, into the two that transformers 5 has."""
    names = [name for name in tensors if ".experts." in name]
    layers = sorted({name.partition(".block_sparse_moe.")[0] for name in names})
    for layer in layers:
        old, new = f"{layer}.block_sparse_moe.experts", f"{layer}.mlp.experts"
        count = len({name for name in names if name.startswith(layer)}) // 3
        tensors[f"{new}.gate_up_proj"] = np.stack(
            [np.concatenate([tensors[f"{old}.{i}.{w}.weight"] for w in ("w1", "w3")])
             for i in range(count)]
        )  # fmt: skip
        down = [tensors[f"{old}.{i}.w2.weight"] for i in range(count)]
        tensors[f"{new}.down_proj"] = np.stack(down)
    for name in names:
        del tensors[name]


def test_experts_apart_and_fused_are_the_same(shop: Path, tmp_path: Path) -> None:
    base, adapter = made(shop, *OWN["experts"][:2])
    out, fused = tmp_path / "out", tmp_path / "fused base"
    regraft.merge(base, adapter, out)
    shutil.rmtree(out / "regraft")
    split = Path(shutil.copytree(out, tmp_path / "split"))
    assert any(".experts.0.w1" in name for name in toys.load(out))
    report = regraft.verify(change(out, fuse), base=base, adapters=adapter)
    assert report.verdict == "exact", report.conclusions
    change(Path(shutil.copytree(base, fused)), fuse)
    report = regraft.verify(split, base=fused, adapters=adapter)
    assert report.verdict == "exact", report.conclusions
    report = regraft.verify(base, base=fused, adapters=adapter)
    assert "every gate_up_proj" in report.conclusions[1]


def test_old_names_and_new_are_the_same(shop: Path, tmp_path: Path) -> None:
    base, adapter = made(shop, "gpt2", OWN["transposed"][1])
    merged = peft_merge(base, [adapter], tmp_path / "merged")

    def shorten(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    report = regraft.verify(change(merged, shorten), base=base, adapters=adapter)
    assert report.ok, report.conclusions
