"""Ways of serving an adapter, each beside PEFT's model."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as tf

import regraft
from practice.bases import BASES, answer, inputs
from practice.generating import GENERATING, GENERATING_WAYS
from practice.hosting import HOSTING
from practice.outcome import Case, require, require_close
from practice.world import LLAMA, World, answers_by_row, generated, generates, in_world

T5 = next(base for base in BASES if base.name == "t5")


def cases() -> Iterator[Case]:
    """Yield every way of serving."""
    for name, settings in GENERATING.items():
        yield Case(f"generate: {name}", in_world(functools.partial(generates, settings)))
    for name, way in {**WAYS, **GENERATING_WAYS}.items():
        yield Case(name, in_world(way))
    for name, attempt in HOSTING.items():
        yield Case(name, attempt)
    yield Case("rows: encoder and decoder", in_world(answers_by_row, T5))
    yield Case("rows: encoder and decoder, beams", in_world(_rows_with_beams, T5))


def _rows_with_beams(world: World) -> None:
    found = {}
    for name in ("one", "two"):
        with world.adapters.using(name):
            found[name] = generated(world.model, num_beams=2)
    with world.adapters.rows(["one", "two"], repeats=2):
        mixed = generated(world.model, num_beams=2)
    for row, name in enumerate(found):
        width = min(mixed.shape[1], found[name].shape[1])
        require(torch.equal(mixed[row, :width], found[name][row, :width]), f"row of {name}")


def _scopes(world: World) -> None:
    with world.adapters.using("two"):
        with world.adapters.disable_adapter():
            require_close(world.answer(), world.expected(None), "inner scope")
        require_close(world.answer(), world.expected("two"), "outer scope")
    require_close(world.answer(), world.expected("one"), "after both")


def _exception(world: World) -> None:
    try:
        with world.adapters.using("two"):
            raise KeyError("of the caller")
    except KeyError:
        require_close(world.answer(), world.expected("one"), "after an exception")


def _threads(world: World) -> None:
    expected = {name: world.expected(name) for name in ("one", "two", None)}
    found: dict[str | None, Any] = {}

    def serve(name: str | None) -> None:
        with world.adapters.using(name):
            found[name] = [world.answer() for _ in range(5)]

    threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, answers in found.items():
        for each in answers:
            require_close(each, expected[name], f"thread of {name}")
    require(len(found) == len(expected), "a thread did not answer")


def _asyncio(world: World) -> None:
    async def serve(name: str) -> Any:
        with world.adapters.using(name):
            return await asyncio.to_thread(world.answer)

    async def both() -> list[Any]:
        return list(await asyncio.gather(serve("one"), serve("two")))

    for name, found in zip(("one", "two"), asyncio.run(both()), strict=True):
        require_close(found, world.expected(name), f"task of {name}")


def _context(world: World) -> None:
    found: list[Any] = []
    with world.adapters.using("two"):
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(lambda: found.append(world.answer()),))
        thread.start()
        thread.join()
    require_close(found[0], world.expected("two"), "a thread in a copied context")


def _batched(world: World) -> list[list[int]]:
    """Return what continuous batching generates; raise `UsageError` if regraft refused it.

    It runs in a thread of its own, and transformers hands the error on as text.
    """
    few = tf.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    settings = tf.GenerationConfig(
        max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=63
    )
    batch = world.model.generate_batch(
        inputs=inputs(LLAMA)["input_ids"].tolist(),
        generation_config=settings,
        continuous_batching_config=few,
        warmup=False,
    )
    for each in batch.values():
        if each.error and "generate_batch()" in str(each.error):
            raise regraft.UsageError(str(each.error))
    return [list(each.generated_tokens) for each in batch.values()]


def _batches_are_right(world: World, found: list[list[int]]) -> None:
    world.theirs.set_adapter("two")
    expected = generated(world.theirs, max_new_tokens=4, eos_token_id=63)[:, 6:].tolist()
    require(sorted(found) == sorted(expected), "other tokens")


def _continuous(world: World) -> None:
    world.adapters.set_adapter("two")
    _batches_are_right(world, _batched(world))


def _continuous_in_a_scope(world: World) -> None:
    with world.adapters.using("two"):
        found = _batched(world)
    _batches_are_right(world, found)


def _compiled(world: World) -> None:
    compiled = torch.compile(world.model, backend="eager")
    require_close(answer(compiled, LLAMA), world.expected("one"), "compiled")
    with world.adapters.using("two"):
        require_close(answer(compiled, LLAMA), world.expected("two"), "switched")


def _merged(world: World) -> None:
    world.adapters.merge_adapter("two")
    world.theirs.set_adapter("two")
    require_close(world.answer(), world.expected("two"), "merged")
    world.adapters.unmerge_adapter()
    require_close(world.answer(), world.expected("one"), "unmerged; the active adapter answers")


def _unloaded(world: World) -> None:
    model = world.adapters.merge_and_unload("two")
    require_close(answer(model, LLAMA), world.expected("two"), "merged and unloaded")


def _load_merged(world: World) -> None:
    world.plain.save_pretrained(world.folder / "base")
    model = regraft.load_merged(world.folder / "base", [world.paths["one"]])
    require_close(answer(model.eval(), LLAMA), world.expected("one"), "loaded merged")


def _base_saved(world: World) -> None:
    world.model.save_pretrained(world.folder / "base")
    loaded = tf.LlamaForCausalLM.from_pretrained(world.folder / "base").eval()
    require_close(answer(loaded, LLAMA), world.expected(None), "the saved base")
    require_close(world.answer(), world.expected("one"), "the model meanwhile")


def _cache(world: World) -> None:
    model = copy.deepcopy(world.plain)
    adapters = regraft.attach(model, cache=regraft.AdapterCache("1MiB"))
    for name, path in world.paths.items():
        adapters.load_adapter(path, name)
    for name in ("one", "two", "one"):
        with adapters.using(name):
            require_close(answer(model, LLAMA), world.expected(name), f"cached {name}")


def _reloaded(world: World) -> None:
    world.adapters.set_adapter("two")
    world.adapters.delete_adapter("one")
    world.adapters.load_adapter(world.paths["two"], "one")
    world.adapters.set_adapter("one")
    require_close(world.answer(), world.expected("two"), "another adapter under a name")


def _weighted(world: World) -> None:
    model = copy.deepcopy(world.theirs)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    with world.adapters.using({"one": 0.7, "two": 0.3}):
        require_close(world.answer(), answer(model, LLAMA), "weighted")


def _bfloat16(world: World) -> None:
    world.model.to(torch.bfloat16)
    world.theirs.to(torch.bfloat16)
    require_close(world.answer(), world.expected("one"), "in bfloat16", 0.03)


def _copied(world: World) -> None:
    found = answer(copy.deepcopy(world.model), LLAMA).detach()
    require_close(found, world.expected("one"), "a copy of the model")


def _replaced(world: World) -> None:
    attention = world.model.model.layers[0].self_attn
    new = torch.nn.Linear(16, 16, bias=False)
    new.weight.data = attention.q_proj.weight.data.clone()
    attention.q_proj = new
    require_close(world.answer(), world.expected("one"), "a module was replaced")


def _parallel(world: World) -> None:
    wrapped = torch.nn.DataParallel(world.model)
    require_close(answer(wrapped, LLAMA), world.expected("one"), "inside DataParallel")


WAYS: dict[str, Callable[[World], None]] = {
    "rows": answers_by_row,
    "rows with beams": _rows_with_beams,
    "nested scopes": _scopes,
    "an exception in a scope": _exception,
    "threads": _threads,
    "asyncio": _asyncio,
    "a thread in a copied context": _context,
    "continuous batching": _continuous,
    "continuous batching in a scope": _continuous_in_a_scope,
    "compiled": _compiled,
    "merged in memory, and taken back": _merged,
    "merged and unloaded": _unloaded,
    "load_merged": _load_merged,
    "the base saved meanwhile": _base_saved,
    "a cache of adapters": _cache,
    "a name loaded anew": _reloaded,
    "weighted adapters": _weighted,
    "cast to bfloat16": _bfloat16,
    "a deep copy": _copied,
    "a replaced module": _replaced,
    "DataParallel": _parallel,
}
"""Ways of serving by name; each raises `WrongError` if an answer is not PEFT's."""
