"""A handle with a cache answers as one without, within the cap, from any number of threads."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import regraft
from regraft.formats.files.reading import FilePool
from regraft.testing.adapters import make_adapter
from regraft.testing.zoo import example_inputs, load_base, logits, make_base

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "plain": LoraConfig(r=2, target_modules=LINEAR),
    "dora": LoraConfig(r=3, target_modules=LINEAR, use_dora=True),
    "rslora": LoraConfig(r=4, target_modules=["o_proj", "up_proj"], use_rslora=True),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sources(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(base, folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def answers(base: Path, sources: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Return what a handle without a cache answers with each adapter."""
    adapters = regraft.attach(load_base(base))
    found = {}
    for name, source in sources.items():
        adapters.load_adapter(source, name)
        with adapters.using(name):
            found[name] = answer(adapters)
    return found


def answer(adapters: Any) -> torch.Tensor:
    return torch.from_numpy(logits(adapters.model, example_inputs("llama")))


def attached(base: Path, sources: dict[str, Path], cache: Any, **options: Any) -> Any:
    adapters = regraft.attach(load_base(base), cache=cache)
    for name, source in sources.items():
        adapters.load_adapter(source, name, **options)
    return adapters


def largest(sources: dict[str, Path]) -> int:
    return max((path / "adapter_model.safetensors").stat().st_size for path in sources.values())


def test_adapters_that_come_and_go_answer_as_those_that_stay(
    base: Path, sources: dict[str, Path], answers: dict[str, torch.Tensor]
) -> None:
    cache = regraft.AdapterCache(largest(sources))
    adapters = attached(base, sources, cache)
    assert cache.stats().reads == 0
    for name in [*sources, *reversed(sources)]:
        with adapters.using(name):
            assert torch.equal(answer(adapters), answers[name])
    stats = cache.stats()
    assert stats.evictions > len(sources)
    assert stats.peak_bytes <= cache.max_bytes


def test_hooks_are_there_before_an_adapter_is_read(base: Path, sources: dict[str, Path]) -> None:
    adapters = attached(base, sources, regraft.AdapterCache("1MB"))
    before = [len(module._forward_hooks) for module in adapters.model.modules()]
    assert sum(before) > 0
    for name in sources:
        with adapters.using(name):
            assert [len(m._forward_hooks) for m in adapters.model.modules()] == before


def test_a_selected_adapter_stays_and_one_too_many_is_refused(
    base: Path, sources: dict[str, Path], answers: dict[str, torch.Tensor]
) -> None:
    cache = regraft.AdapterCache(largest(sources))
    adapters = attached(base, sources, cache)
    adapters.set_adapter("whole")
    with pytest.raises(regraft.MemoryCapError, match="in use"), adapters.using("embedding"):
        pass
    assert torch.equal(answer(adapters), answers["whole"])
    adapters.set_adapter(None)
    with adapters.using("embedding"):
        assert torch.equal(answer(adapters), answers["embedding"])


def test_the_cap_counts_the_dtype_that_was_asked_for(base: Path, sources: dict[str, Path]) -> None:
    sizes = []
    for dtype in (torch.bfloat16, torch.float32):
        cache = regraft.AdapterCache("1MB")
        adapters = attached(base, {"plain": sources["plain"]}, cache, dtype=dtype)
        adapters.set_adapter("plain")
        sizes.append(cache.stats().nbytes)
    assert sizes[1] == 2 * sizes[0] > 0


def test_an_adapter_that_does_not_fit_is_refused_before_it_is_read(
    base: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    other = make_base("qwen2_tied", tmp_path / "other")
    misfit = make_adapter(other, tmp_path / "misfit", LoraConfig(r=2, target_modules=["q_proj"]))
    cache = regraft.AdapterCache("1MB")
    adapters = attached(base, {}, cache)
    with pytest.raises(regraft.MismatchError):
        adapters.load_adapter(misfit, "misfit")
    adapters.load_adapter(sources["plain"], "misfit")
    assert cache.stats().reads == 0


def test_two_models_share_a_cache_until_they_let_go(
    base: Path, sources: dict[str, Path], answers: dict[str, torch.Tensor]
) -> None:
    cache = regraft.AdapterCache("1MB")
    first = attached(base, {"plain": sources["plain"]}, cache)
    second = attached(base, {"dora": sources["dora"]}, cache)
    with pytest.raises(regraft.UsageError, match="another name"):
        second.load_adapter(sources["dora"], "plain")
    for adapters, name in ((first, "plain"), (second, "dora")):
        adapters.set_adapter(name)
        assert torch.equal(answer(adapters), answers[name])
        adapters.detach()
    assert cache.stats().nbytes == 0


@pytest.mark.slow
def test_threads_with_less_room_than_adapters_get_their_own(
    base: Path, sources: dict[str, Path], answers: dict[str, torch.Tensor]
) -> None:
    cache = regraft.AdapterCache(2 * largest(sources), timeout=60.0)
    adapters = attached(base, sources, cache)
    gate = threading.Barrier(len(sources))

    def work(name: str) -> bool:
        gate.wait()
        right = True
        for _ in range(20):
            with adapters.using(name):
                right &= torch.equal(answer(adapters), answers[name])
        return right

    with ThreadPoolExecutor(len(sources)) as pool:
        assert all(pool.map(work, sources))
    assert cache.stats().peak_bytes <= cache.max_bytes


def test_a_file_that_was_written_to_since_it_was_looked_at_is_refused(
    base: Path, sources: dict[str, Path], answers: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    copies = {
        name: Path(shutil.copytree(sources[name], tmp_path / name)) for name in ("plain", "dora")
    }
    adapters = attached(base, copies, regraft.AdapterCache("1GB"))
    (copies["plain"] / "adapter_model.safetensors").chmod(0o600)
    with adapters.using("plain"):  # a new mode is no change
        assert torch.equal(answer(adapters), answers["plain"])
    shutil.copy(sources["dora"] / "adapter_model.safetensors", copies["dora"])
    with (
        pytest.raises(regraft.ChangedError, match="since it was looked at"),
        adapters.using("dora"),
    ):
        answer(adapters)
    adapters.delete_adapter("dora")
    adapters.load_adapter(copies["dora"], "dora")
    with adapters.using("dora"):
        assert torch.equal(answer(adapters), answers["dora"])


def test_an_adapter_is_not_loaded_of_two_states_of_its_file(
    base: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(sources["plain"], tmp_path / "a"))
    weights, read_into = folder / "adapter_model.safetensors", FilePool.read_into

    def changing(pool: FilePool, *arguments: Any) -> None:
        read_into(pool, *arguments)
        os.utime(weights)

    monkeypatch.setattr(FilePool, "read_into", changing)
    adapters = regraft.attach(load_base(base))
    with pytest.raises(regraft.ChangedError) as caught:
        adapters.load_adapter(folder)
    assert [problem.where for problem in caught.value.problems] == [str(weights)]
