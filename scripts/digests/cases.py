"""The cases: which verb is run on which base, with which adapters and choices."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import regraft
from digests import plain, quantized
from digests.making import DTYPES

Make = Callable[[Path], Path]

INPUTS: dict[str, Make] = {
    **{f"odd-{dtype}": partial(plain.write_odd, dtype=dtype) for dtype in DTYPES},
    "odd-mixed": plain.write_mixed,
    "lora": plain.odd_lora,
    "rslora": partial(plain.odd_lora, rank=9, seed=5, use_rslora=True),
    "dora": plain.odd_dora,
    "saved": plain.odd_saved,
    "bias": plain.odd_bias,
    "lora-bias": plain.odd_lora_bias,
    "small": partial(plain.odd_special, share=2.0**-6),
    "large": partial(plain.odd_special, share=2.0),
    "pissa": partial(plain.odd_factored, kind="pissa"),
    "olora": partial(plain.odd_factored, kind="olora"),
    **{f"llama-{dtype}": partial(plain.write_llama, dtype=dtype) for dtype in DTYPES},
    "llama-tied": plain.write_tied_llama,
    "llama-lora": plain.llama_lora,
    "llama-tiny": partial(plain.llama_lora, seed=9, share=2.0**-5, lora_alpha=1),
    "llama-dora": plain.llama_dora,
    "llama-embedding": plain.llama_embedding,
    "even-lora": partial(plain.llama_lora, sizes=plain.EVEN, share=2.0**-4),
    "even-dora": partial(plain.llama_dora, sizes=plain.EVEN),
    "llama-whole": partial(plain.write_llama, sizes=plain.WHOLE),
    "whole-lora": partial(plain.llama_lora, sizes=plain.WHOLE),
    "whole-dora": partial(plain.llama_dora, sizes=plain.WHOLE),
    "gguf-lora": partial(plain.llama_lora, sizes=quantized.GGUF_SIZES, share=2.0**-4),
    "gpt2": plain.write_gpt2,
    "gpt2-lora": partial(plain.gpt2_adapter, use_dora=False),
    "gpt2-dora": partial(plain.gpt2_adapter, use_dora=True),
    "mixtral": plain.write_mixtral,
    "mixtral-lora": plain.mixtral_adapter,
    "phi3": plain.write_phi3,
    "phi3-lora": plain.phi3_adapter,
    "gpt-oss": quantized.write_gpt_oss,
    "gpt-oss-lora": quantized.gpt_oss_adapter,
    **{
        f"stored-{name}": partial(quantized.write_stored, format=name) for name in quantized.FORMATS
    },
    **{f"gguf-{kind}": partial(quantized.write_gguf, kind=kind) for kind in quantized.GGUF_TYPES},
}
"""Bases and adapters by name."""


@dataclass(frozen=True)
class Made:
    """A base that regraft makes: options of ``quantize``, and which model's adapters fit."""

    options: dict[str, Any]
    model: str = "llama"

    @property
    def base(self) -> str:
        """The input that is quantized."""
        return "llama-whole" if self.model == "whole" else "llama-bfloat16"


MADE: dict[str, Made] = {
    "nf4": Made({"to": "nf4"}),
    "nf4-double": Made({"to": "nf4", "double_quant": True}),
    "fp4": Made({"to": "fp4"}),
    "fp4-double": Made({"to": "fp4", "double_quant": True}),
    "int8": Made({"to": "int8"}),
    "fp8": Made({"to": "fp8"}, "whole"),
}


@dataclass(frozen=True)
class World:
    """A folder with the inputs that have been made so far."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        """Return an input; it is made when it is asked for first."""
        place = self.folder / "inputs" / name
        if not place.exists():
            if name in INPUTS:
                INPUTS[name](place)
            else:
                made = MADE[name]
                regraft.quantize(self[made.base], place, **made.options)
        return place


@dataclass(frozen=True)
class Case:
    """One merge, and what is done with it; or one conversion.

    Attributes:
        name: of the case.
        run: makes the outputs, each a folder in the one that it is given.
        by_lapack: it needs a factorization, whose result depends on the library.
        in_brief: it is one of those that the tests run.
        needs: an optional package.
    """

    name: str
    run: Callable[[World, Path], None]
    by_lapack: bool = False
    in_brief: bool = False
    needs: str = ""


Adapters = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Merged:
    """A merge, with its undo if there is one, and a swap for other adapters.

    Attributes:
        base: of the inputs.
        adapters: each with its weight.
        options: of the merge.
        swapped: the adapters that take the place of the first ones.
    """

    base: str
    adapters: Adapters
    options: dict[str, Any] = field(default_factory=dict)
    swapped: Adapters = ()
    undone: bool = True

    def __call__(self, world: World, out: Path) -> None:
        """Make the outputs."""
        regraft.merge(world[self.base], _of(world, self.adapters), out / "merged", **self.options)
        common = {k: v for k, v in self.options.items() if k in ("threads", "max_memory")}
        if self.undone:
            regraft.unmerge(out / "merged", out / "base", **common)
        if self.swapped:
            regraft.swap(out / "merged", _of(world, self.swapped), out / "swapped", **self.options)


def _of(world: World, adapters: Adapters) -> list[tuple[Path, float]]:
    return [(world[name], weight) for name, weight in adapters]


ALL: Adapters = (("lora", 1.0), ("dora", 0.7), ("rslora", -0.35), ("saved", 1.0))


def _one(model: str) -> Adapters:
    return ((f"{model}-lora", 1.0),)


def _both(model: str) -> Adapters:
    return ((f"{model}-lora", 0.5), (f"{model}-dora", 1.0))


def cases() -> Iterator[Case]:
    """Yield all cases."""
    yield from _plain_cases()
    yield from _layout_cases()
    yield from _method_cases()
    yield from _converting_cases()
    yield from _quantizing_cases()
    yield from _quantized_cases()
    yield from _gguf_cases()
    yield from _lapack_cases()


def _plain_cases() -> Iterator[Case]:
    for base in DTYPES:
        for dtype in (None, *DTYPES):
            brief = (base, dtype) == ("bfloat16", None)
            yield Case(
                f"merge four, {base} to {dtype or 'its own'}",
                Merged(f"odd-{base}", ALL, {"dtype": dtype}), in_brief=brief,
            )  # fmt: skip
        for share in ("small", "large"):
            yield Case(f"odd values, {base}, {share}", Merged(f"odd-{base}", ((share, 1.0),)))
        yield Case(
            f"swap, {base}",
            Merged(f"odd-{base}", (("lora", 1.0),), swapped=(("rslora", 0.5), ("dora", 1.0))),
            in_brief=base == "float16",
        )  # fmt: skip
    yield Case("mixed dtypes", Merged("odd-mixed", ALL))
    for threads in (1, 2, 7):
        options = {"threads": threads, "max_memory": "300MiB"}
        yield Case(f"{threads} threads", Merged("odd-bfloat16", ALL, options))
    yield Case("shards of 40 kB", Merged("odd-bfloat16", ALL, {"shard_size": "40KB"}))
    yield Case("biases and patterns", Merged("odd-bfloat16", (("bias", 1.0),)), in_brief=True)
    yield Case("a bias of B", Merged("odd-float16", (("lora-bias", -1.0),)))


def _layout_cases() -> Iterator[Case]:
    yield Case("Conv1D", Merged("gpt2", (("gpt2-lora", 1.0),)), in_brief=True)
    yield Case("Conv1D, DoRA", Merged("gpt2", (("gpt2-dora", 0.5), ("gpt2-lora", 1.0))))
    yield Case("tied embeddings", Merged("llama-tied", (("llama-embedding", 1.0),)))
    yield Case("experts stored apart", Merged("mixtral", (("mixtral-lora", 1.0),)))
    yield Case("fused queries, keys and values", Merged("phi3", (("phi3-lora", 1.0),)))


def _method_cases() -> Iterator[Case]:
    """Yield merges by methods on elements; ``della`` where rows are rows, in a llama."""
    two: Adapters = (("lora", 1.0), ("rslora", -0.35))
    options = {"density": 0.4, "seed": 5}
    for method, base in (("ties", "bfloat16"), ("dare", "float32"), ("dare_ties", "float16"),
                         ("breadcrumbs", "bfloat16"), ("magnitude_prune", "float32")):  # fmt: skip
        merged = Merged(f"odd-{base}", two, {"method": method, **options})
        yield Case(f"{method}, {base}", merged, in_brief=method in ("ties", "dare_ties"))
    della = {"method": "della", **options}
    yield Case("della, bfloat16", Merged("llama-bfloat16", _one("llama"), della))


def _converting_cases() -> Iterator[Case]:
    for base in DTYPES:
        for dtype in DTYPES:
            if base != dtype:
                yield Case(f"convert {base} to {dtype}", _converted(f"odd-{base}", dtype=dtype))
    yield Case("convert to shards of 30 kB", _converted("odd-mixed", shard_size="30KB"))
    for dtype in DTYPES:
        yield Case(f"shrink to {dtype}", _shrunk("rslora", dtype=dtype))
    yield Case("the uniform form", _shrunk("bias", dtype="float32", uniform=False))


def _converted(base: str, **options: Any) -> Callable[[World, Path], None]:
    return lambda world, out: _ignored(regraft.convert(world[base], out / "converted", **options))


def _shrunk(adapter: str, **options: Any) -> Callable[[World, Path], None]:
    return lambda world, out: _ignored(regraft.shrink(world[adapter], out / "shrunk", **options))


def _ignored(_: object) -> None:
    return None


def _quantizing_cases() -> Iterator[Case]:
    for name, made in MADE.items():
        for base in (made.base, *(f"llama-{d}" for d in ("float16", "float32"))):
            for rounding in ("nearest", "stochastic") if made.model == "llama" else ():
                yield _quantizing(name, base, rounding)
        options = {"quantize": made.options["to"]}
        options |= {k: v for k, v in made.options.items() if k != "to"}
        merged = Merged(made.base, _both(made.model), options, undone=False)
        yield Case(f"merge and quantize, {name}", merged, in_brief=name == "nf4-double")
    yield _quantizing("fp8", "llama-whole", "nearest")
    yield _quantizing("fp8", "llama-whole", "stochastic")
    kept = {"quantize": "nf4", "undo": True, "rounding": "stochastic"}
    yield Case("merge and quantize, with an undo", Merged("llama-bfloat16", _one("llama"), kept))


def _quantizing(name: str, base: str, rounding: str) -> Case:
    run = _quantized(base, rounding=rounding, seed=3, **MADE[name].options)
    brief = rounding == "stochastic" and base in ("llama-bfloat16", "llama-whole")
    return Case(f"quantize {base}, {name}, {rounding}", run, in_brief=brief)


def _quantized(base: str, **options: Any) -> Callable[[World, Path], None]:
    return lambda world, out: _ignored(regraft.quantize(world[base], out / "quantized", **options))


def _dequantized(base: str, **options: Any) -> Callable[[World, Path], None]:
    return lambda world, out: _ignored(regraft.dequantize(world[base], out / "plain", **options))


def _quantized_cases() -> Iterator[Case]:
    for name, made in MADE.items():
        yield from _stored_cases(name, _both(made.model), _one(made.model))
    for name in quantized.FORMATS:
        yield from _stored_cases(f"stored-{name}", _both("even"), _one("even"))
    moe = _one("gpt-oss")
    yield Case("gpt-oss: merged out", Merged("gpt-oss", moe), in_brief=True)
    for dtype in (None, "float16", "float32"):
        yield Case(f"gpt-oss: dequantized, {dtype}", _dequantized("gpt-oss", dtype=dtype))
        yield Case(f"gpt-oss: to {dtype}", Merged("gpt-oss", moe, {"dtype": dtype}))


def _stored_cases(base: str, adapters: Adapters, other: Adapters) -> Iterator[Case]:
    """Yield what is done with a base whose format is read and written."""
    yield Case(f"{base}: merged out", Merged(base, adapters))
    yield Case(f"{base}: to float32", Merged(base, other, {"dtype": "float32"}))
    yield Case(f"{base}: dequantized", _dequantized(base), in_brief=True)
    yield Case(f"{base}: dequantized to float16", _dequantized(base, dtype="float16"))
    for rounding in ("stochastic", "nearest"):
        options = {"quantize": "keep", "rounding": rounding, "seed": 7}
        swapped = other if rounding == "nearest" else ()
        brief = rounding == "stochastic" and base in ("nf4-double", "stored-gptq-4-any-order")
        yield Case(f"{base}: kept, {rounding}", Merged(base, adapters, options, swapped),
                   in_brief=brief)  # fmt: skip


def _gguf_cases() -> Iterator[Case]:
    for kind in quantized.GGUF_TYPES:
        base = f"gguf-{kind}"
        yield Case(f"GGUF {kind}: dequantized", _dequantized(base, dtype="float32"), needs="gguf")
        yield Case(f"GGUF {kind}: merged", Merged(base, _one("gguf")), needs="gguf")


def _lapack_cases() -> Iterator[Case]:
    for kind in ("pissa", "olora"):
        for base in DTYPES:
            merged = Merged(f"odd-{base}", ((kind, 1.0),))
            yield Case(f"{kind}, {base}", merged, by_lapack=True)
    for options in ({"rank": 2}, {"energy": 0.9}):
        yield Case(f"shrink, {options}", _shrunk("rslora", **options), by_lapack=True)


def run_case(case: Case, world: World) -> Path:
    """Run a case; return the folder of its outputs."""
    out = world.folder / "outputs"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    case.run(world, out)
    return out
