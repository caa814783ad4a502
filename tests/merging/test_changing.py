"""Inputs that are changed while a verb reads them: no mixture comes out, and they are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import regraft
from merging import toys
from merging.test_undo import comparable
from regraft import ChangedError, ProgressEvent
from regraft.formats.files.watching import Stamp
from regraft.merging import finalize
from regraft.merging.compute.factors import FactorStore
from regraft.merging.undo import keeping as undo

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
SIDES = ("tokenizer.json", "LICENSE", "README.md")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with files beside its weights."""
    folder = toys.write_base(tmp_path / "base")
    for name in SIDES:
        (folder / name).write_text("{}")
    return folder


def once(change: Callable[[], object], stage: str = "merge") -> Callable[[ProgressEvent], None]:
    """Return a progress call that changes something in the middle of a stage, once."""
    left = [change]

    def progress(event: ProgressEvent) -> None:
        if left and event.stage == stage and 2 * event.done >= event.total:
            left.pop()()

    return progress


def rewrite(path: Path) -> Callable[[], object]:
    """Return what turns over the last bit of a file, in place and with its old times."""

    def change() -> None:
        found, content = path.stat(), path.read_bytes()
        with path.open("r+b") as file:
            file.write(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    return change


def assert_refused(call: Callable[[], object], path: Path, out: Path | None = None) -> None:
    """A call has to name the file that was changed, and to leave nothing."""
    before = {p.name for p in out.parent.iterdir()} if out is not None else set()
    with pytest.raises(ChangedError) as caught:
        call()
    assert [problem.where for problem in caught.value.problems] == [str(path)]
    if out is not None:
        assert {p.name for p in out.parent.iterdir()} == before


FILES = [f"base/{n}" for n in (WEIGHTS, "config.json", *SIDES)]
FILES += [f"adapter/{n}" for n in (ADAPTER, "adapter_config.json")]


@pytest.mark.parametrize("name", FILES)
def test_a_merge_refuses_a_file_that_is_changed_and_then_takes_it_as_it_is(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    out, path = tmp_path / "out", tmp_path / name
    progress = once(rewrite(path) if path.suffix == ".safetensors" else lambda: os.utime(path))
    assert_refused(lambda: regraft.merge(base, adapter, out, progress=progress), path, out)
    regraft.merge(base, adapter, out)
    assert regraft.verify(out, base=base, adapters=adapter).verdict == "exact"
    regraft.unmerge(out, tmp_path / "back")
    assert comparable(tmp_path / "back") == comparable(base)


@pytest.mark.parametrize("verb", ["convert", "quantize", "dequantize"])
def test_so_do_the_verbs_that_change_how_a_model_is_stored(base: Path, verb: str) -> None:
    out = base.with_name("out")
    if verb == "dequantize":
        base = Path(regraft.quantize(base, base.with_name("nf4"), "nf4").output)
    options = {"convert": {"dtype": "float32"}, "quantize": {"to": "nf4"}}
    more: dict[str, Any] = options.get(verb, {})
    path = base / WEIGHTS
    progress = once(rewrite(path))
    assert_refused(lambda: getattr(regraft, verb)(base, out, progress=progress, **more), path, out)


@pytest.mark.slow
@pytest.mark.parametrize("file", [WEIGHTS, "regraft/undo/patch.safetensors"])
def test_so_do_unmerge_and_swap(base: Path, adapter: Path, tmp_path: Path, file: str) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out"
    other = toys.write_adapter(tmp_path / "other", toys.attention(seed=9))
    regraft.merge(base, adapter, merged)
    path = merged / file

    def unmerge() -> None:
        regraft.unmerge(merged, out, progress=once(lambda: os.utime(path), "unmerge"))

    def swap(changed: Path) -> None:
        regraft.swap(merged, other, out, progress=once(lambda: os.utime(changed)))

    assert_refused(unmerge, path, out)
    assert_refused(lambda: swap(path), path, out)
    assert_refused(lambda: swap(other / ADAPTER), other / ADAPTER, out)


def test_so_does_shrink(adapter: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", adapter / ADAPTER
    left = [rewrite(path)]

    def progress(event: ProgressEvent) -> None:
        if left and event.done:
            left.pop()()

    assert_refused(lambda: regraft.shrink(adapter, out, progress=progress), path, out)


@pytest.mark.parametrize("name", ["out/model.safetensors", "base/model.safetensors"])
def test_verify_judges_nothing_that_is_changed(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    out, path = tmp_path / "out", tmp_path / name
    regraft.merge(base, adapter, out)
    progress = once(lambda: os.utime(path), "verify")
    assert_refused(
        lambda: regraft.verify(out, base=base, adapters=adapter, progress=progress, threads=1), path
    )


def test_diff_compares_nothing_that_is_changed(base: Path, adapter: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", base / WEIGHTS
    regraft.merge(base, adapter, out)
    progress = once(lambda: os.utime(path), "compare")
    assert_refused(lambda: regraft.diff(base, out, progress=progress), path)


def test_work_of_other_bytes_is_not_gone_on_with(base: Path, adapter: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        rewrite(base / WEIGHTS)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regraft.merge(base, adapter, tmp_path / "out", threads=1, progress=once(interrupt))
    regraft.merge(base, adapter, tmp_path / "out")
    regraft.merge(base, adapter, tmp_path / "fresh")
    assert comparable(tmp_path / "out") == comparable(tmp_path / "fresh")


# Where times say nothing, as of a file system that does not keep them, bytes do


@pytest.fixture
def without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file looks changed by its times, size or inode."""
    monkeypatch.setattr(Stamp, "of", lambda _: Stamp(0, 0, 0, 1, 1))


@pytest.mark.usefixtures("without_times")
def test_the_copies_of_adapters_are_those_that_were_merged(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = undo.keep_base

    def changed(*arguments: Any) -> dict[str, str]:
        rewrite(adapter / ADAPTER)()
        return keep(*arguments)

    monkeypatch.setattr(finalize, "keep_base", changed)
    out, path = tmp_path / "out", adapter / ADAPTER
    assert_refused(lambda: regraft.merge(base, adapter, out), path, out)


@pytest.mark.usefixtures("without_times")
def test_a_factor_that_is_read_twice_has_to_be_the_same(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = FactorStore._read, []

    def changing(store: FactorStore, *arguments: Any) -> Any:
        values = read(store, *arguments)
        if not seen:
            seen.append(arguments)
            path, name = arguments[1]
            store.digests[path, name] = "another"
            store._kept.clear()
            return read(store, *arguments)
        return values

    monkeypatch.setattr(FactorStore, "_read", changing)
    with pytest.raises(ChangedError, match=ADAPTER):
        regraft.merge(base, adapter, tmp_path / "out")


@pytest.mark.usefixtures("without_times")
@pytest.mark.parametrize("name", ["base/config.json", "adapter/adapter_config.json"])
def test_a_config_that_is_read_twice_has_to_be_the_same(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    out, path = tmp_path / "out", tmp_path / name
    progress = once(lambda: path.write_text(path.read_text() + " "))
    assert_refused(lambda: regraft.merge(base, adapter, out, progress=progress), path, out)
