"""Inputs are found on disk or in the Hub's cache, and the library's errors become regraft's."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from safetensors.numpy import save_file

from regraft.errors import (
    AccessError,
    DiskSpaceError,
    EnvironmentShortfall,
    InputError,
    RegraftError,
)
from regraft.formats.adapter_files import open_adapter
from regraft.formats.checkpoint import open_checkpoint
from regraft.formats.hub import Located, locate
from regraft.formats.reference import parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty, with the Hub out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def add(cache: Path, repo_id: str, files: list[str], listed: list[str] | None = None) -> Path:
    """Put files into the cache as the Hub's client does: blobs, a snapshot of links, a ref.

    ``listed`` are the files the repository has, as the client remembers them.
    """
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(files):
        write(repo / "blobs" / str(number), name)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    if listed is not None:
        (repo / "trees").mkdir()
        entries = {name: {"size": 1, "blob_id": "0" * 40} for name in listed}
        tree = {"format_version": 1, "files": entries}
        (repo / "trees" / f"{COMMIT}.json").write_text(json.dumps(tree))
    return snapshot


def write(path: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        save_file({"model.norm.weight": np.ones(2, np.float32)}, path)
    else:
        path.write_text("{}")


def test_a_path_that_exists_wins(cache: Path, tmp_path: Path) -> None:
    add(cache, "org/name", ["config.json", "model.safetensors"])
    (tmp_path / "org" / "name").mkdir(parents=True)
    found = locate("org/name", kind="base")
    assert found == Located(Path("org/name"), "org/name", None, None)
    assert locate(tmp_path, kind="adapter").path == tmp_path


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model", kind="base").path == tmp_path / "model"


@pytest.mark.parametrize("source", ["org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_a_hub_id_is_found_in_the_cache(cache: Path, source: str) -> None:
    snapshot = add(cache, "org/name", ["config.json", "model.safetensors"])
    found = locate(source, kind="base")
    assert found == Located(snapshot.resolve(), source, "org/name", COMMIT)
    base = open_checkpoint(found)
    assert (base.source, base.revision, base.root) == (source, COMMIT, snapshot.resolve())
    assert list(base.tensors) == ["model.norm.weight"]


def test_a_bare_name_and_an_adapter_are_found_too(cache: Path) -> None:
    add(cache, "gpt2", ["config.json", "model.safetensors"])
    add(cache, "org/lora", ["adapter_config.json", "adapter_model.safetensors"])
    assert locate("gpt2", kind="base").repo_id == "gpt2"
    found = open_adapter(locate("org/lora", kind="adapter"))
    assert (found.weights_file, found.revision) == ("adapter_model.safetensors", COMMIT)


def test_without_a_connection_documents_may_be_missing_but_weights_not(cache: Path) -> None:
    files = ["config.json", "model.safetensors"]
    add(cache, "org/whole", files, [*files, "README.md", "LICENSE", "original/x.safetensors"])
    add(cache, "org/partial", files, [*files, "tokenizer.json"])
    assert locate("org/whole", kind="base").revision == COMMIT
    with pytest.raises(EnvironmentShortfall, match=r"cache lacks files.*tokenizer.json"):
        locate("org/partial", kind="base")


def test_offline_and_not_in_the_cache_is_said(cache: Path) -> None:
    assert not cache.exists()
    with pytest.raises(EnvironmentShortfall, match=r"'org/name'.*HF_HUB_OFFLINE") as caught:
        locate("org/name", kind="base")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "source",
    ["./x", "../x", "/no/such/x", "a/b/c.bin", "~/none", "~nobody-here/x", "x.safetensors",
     "a/b.bin", "", "a\\b", "org/", "/", "a b", ".hidden", Path("org/name")],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(
    cache: Path, source: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(cache, "org/name", ["config.json"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail_with(AssertionError("asked")))
    if source in ("", "/"):
        assert locate(source, kind="base").path.is_dir()
        return
    with pytest.raises(InputError, match="no such file or folder") as caught:
        locate(source, kind="base")
    assert caught.value.problems[0].hint


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def response(status: int) -> Any:
    return SimpleNamespace(headers={}, status_code=status, request=None)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (errors.GatedRepoError("no", response=response(403)), InputError,
         r"gated.*Accept its terms on https://huggingface.co/org/name, "),
        (errors.RepositoryNotFoundError("no", response=response(404)), InputError,
         "no adapter of this name: neither a local path nor on the Hub"),
        (errors.RevisionNotFoundError("no", response=response(404)), InputError,
         "no such revision"),
        (errors.HfHubHTTPError("teapot", response=response(500)), EnvironmentShortfall,
         "the download failed.*teapot"),
        (errors.LocalEntryNotFoundError("none"), EnvironmentShortfall, "cannot be reached"),
        (OSError(errno.ENOSPC, "No space left"), DiskSpaceError, "does not fit"),
        (OSError(errno.EDQUOT, "Quota exceeded"), DiskSpaceError, "does not fit"),
        (PermissionError(errno.EACCES, "denied", "/cache"), AccessError, "/cache: .*denied"),
        (ConnectionError("reset"), EnvironmentShortfall, "download failed.*reset"),
    ],
)  # fmt: skip
def test_the_librarys_errors_are_translated(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: type[RegraftError],
    message: str,
) -> None:
    del cache
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail_with(error))
    with pytest.raises(raised, match=message) as caught:
        locate("org/name@v1", kind="adapter")
    assert type(caught.value) is raised


def test_a_name_the_hub_cannot_have_is_an_input_error(cache: Path) -> None:
    del cache
    with pytest.raises(InputError, match="neither a path that exists nor a Hub id"):
        locate("org/na--me", kind="base")


class FakeHub:
    """A repository that is fetched by the patterns given, through the library's own filter."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder = folder / COMMIT
        self.files = files
        self.fetched: list[str] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        assert repo_id == "org/name"
        assert options["token"] == "secret"
        for name in huggingface_hub.utils.filter_repo_objects(
            self.files,
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options.get("ignore_patterns"),
        ):
            self.fetched.append(name)
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        self.folder.mkdir(exist_ok=True)
        return str(self.folder)


def fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], **options: Any
) -> list[str]:
    hub = FakeHub(tmp_path, files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert locate("org/name", token="secret", **options).revision == COMMIT
    return hub.fetched


SIDE = ["config.json", "tokenizer.model", "tokenizer.json", "chat_template.jinja", "modeling_x.py",
        "additional_chat_templates/tool.jinja", "README.md", "LICENSE", "merges.txt"]  # fmt: skip
NEVER = ["original/params.json", "original/consolidated.00.pth", "model.gguf", "onnx/model.onnx",
         "flax_model.msgpack", "tf_model.h5", "consolidated.safetensors", "optimizer.bin",
         "training_args.bin", "checkpoint-5/model.safetensors", "unet/config.json",
         "onnx/config.json", "rust_model.ot", "model.fp16.safetensors"]  # fmt: skip


def test_a_base_with_safetensors_is_fetched_without_the_rest(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    needed = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", *SIDE]
    files = [*needed, *NEVER, "pytorch_model.bin"]
    assert fetched(tmp_path, monkeypatch, files, kind="base") == needed


def test_a_base_without_safetensors_is_fetched_as_bin(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    needed = ["pytorch_model.bin.index.json", *SIDE, "pytorch_model-00001-of-00001.bin"]
    assert fetched(tmp_path, monkeypatch, [*needed, *NEVER], kind="base") == needed


def test_only_an_adapters_own_weights_are_fetched(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    needed = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"]
    files = [*needed, *NEVER, "adapter_model.bin", "model.safetensors"]
    assert fetched(tmp_path / "a", monkeypatch, files, kind="adapter") == needed
    needed[1] = "adapter_model.bin"
    files = [*needed, *NEVER, "model.safetensors"]
    got = fetched(tmp_path / "b", monkeypatch, files, kind="adapter")
    assert sorted(got) == sorted(needed)


def test_a_full_model_named_as_adapter_is_not_downloaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    files = ["config.json", "model.safetensors", "adapter_model.bin"]
    assert fetched(tmp_path, monkeypatch, files, kind="adapter") == ["config.json"]
    with pytest.raises(InputError, match="found a full model"):
        open_adapter(locate("org/name", kind="adapter", token="secret"))


@pytest.mark.slow
def test_the_environments_offline_mode_and_cache_are_honoured(tmp_path: Path) -> None:
    add(tmp_path / "hub", "org/name", ["config.json", "model.safetensors"])
    code = (
        "import sys; from regraft.formats.checkpoint import open_checkpoint;"
        "from regraft.formats.hub import locate;"
        "heavy = {'huggingface_hub', 'torch', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "print(locate('org/name', kind='base').revision)"
    )
    settings = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.stdout.strip(), done.stderr) == (COMMIT, "")


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("org/name/runs/sql@v1", "org/name/runs/sql@v1"),
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/", "org/name"),
        ("https://hf.co/gpt2", "gpt2"),
        ("https://huggingface.co/org/name/tree/main", "org/name@main"),
        ("https://huggingface.co/org/name/tree/v1/sub/low?x=1#y", "org/name/sub/low@v1"),
        ("huggingface.co/org/name/blob/main/adapter_config.json", "org/name@main"),
        ("https://huggingface.co/org/name/resolve/v1/sub/model.safetensors", "org/name/sub@v1"),
        ("hf://org/name@v1/sub", "org/name/sub@v1"),
    ],
)
def test_a_folder_of_a_repository_and_a_web_address_are_references(source: str, meant: str) -> None:
    assert str(parse_reference(source)) == meant


@pytest.mark.parametrize(
    "source",
    ["https://huggingface.co/datasets/org/name", "https://example.org/x", "hf://datasets/org/name",
     "https://huggingface.co/", "https://huggingface.co/docs/peft",
     "https://huggingface.co/org/name/discussions/3"],
)  # fmt: skip
def test_another_web_address_is_refused(cache: Path, source: str) -> None:
    del cache
    with pytest.raises(InputError, match=r"is a web address.*Give the model's Hub id"):
        locate(source, kind="base")


def test_only_the_folder_that_is_meant_is_fetched(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    wanted = ["sql/adapter_config.json", "sql/adapter_model.safetensors", "sql/README.md"]
    others = ["adapter_config.json", "adapter_model.safetensors", "sql/deeper/config.json",
              "math/adapter_model.safetensors", "sql/optimizer.pt"]  # fmt: skip
    hub = FakeHub(tmp_path, [*wanted, *others])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    found = locate("org/name/sql@v1", kind="adapter", token="secret")
    assert hub.fetched == wanted
    assert found == Located(hub.folder / "sql", "org/name/sql@v1", "org/name", COMMIT, "sql")
    hub.files = ["math/adapter_model.bin", "math/adapter_config.json"]
    assert locate("org/name/math", kind="adapter", token="secret").path == hub.folder / "math"
    assert "math/adapter_model.bin" in hub.fetched
    with pytest.raises(InputError, match=r"no such folder.*found 'none'.*name/tree/main"):
        locate("org/name/none", kind="adapter", token="secret")


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_repository_with_adapters_in_folders_lists_them(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    del cache
    files = [f"{name}/adapter_{part}" for name in ("sql", "math")
             for part in ("config.json", "model.safetensors")]  # fmt: skip
    hub = FakeHub(tmp_path, ["README.md", *files])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(InputError, match=f"such as org/name/math{revision}$") as caught:
        open_adapter(locate(f"org/name{revision}", kind="adapter", token="secret"))
    assert "found 'math', 'sql'" in str(caught.value)
    assert not [name for name in hub.fetched if name.endswith("safetensors")]


def test_a_folder_of_the_cache_is_its_snapshot(cache: Path, tmp_path: Path) -> None:
    snapshot = add(cache, "org/name", ["config.json", "model.safetensors"])
    repo = cache / "models--org--name"
    assert locate(repo, kind="base").path == snapshot
    (repo / "refs" / "main").unlink()
    assert locate(str(repo), kind="base").path == snapshot
    (snapshot.parent / ("f" * 40)).mkdir()
    with pytest.raises(InputError, match=r"several snapshots.*Give one, such as"):
        locate(repo, kind="base")
    assert tmp_path != repo
    with pytest.raises(InputError, match="Its Hub id is other/name"):
        locate("models--other--name", kind="base")


@pytest.mark.parametrize("source", ["adaptr", "./adaptr", "runs/checkpoint-90"])
def test_a_local_name_that_is_nearly_right_is_offered(
    cache: Path, tmp_path: Path, source: str
) -> None:
    del cache
    (tmp_path / "adapter").mkdir()
    (tmp_path / "runs" / "checkpoint-900").mkdir(parents=True)
    with pytest.raises(RegraftError, match=r"Did you mean '(adapter|runs/checkpoint-900)'"):
        locate(source, kind="adapter")


def test_offline_mode_is_spoken_of_only_where_it_is_set(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    unreachable = fail_with(errors.LocalEntryNotFoundError("none"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(EnvironmentShortfall, match="Check the connection") as caught:
        locate("org/name", kind="base")
    assert "HF_HUB_OFFLINE" not in str(caught.value)


def test_a_token_that_the_server_repeats_is_not_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    given, own = "tok-of-the-call-1", "hf_" + "x" * 34

    def refuse(*_: object, **__: object) -> None:
        raise errors.HfHubHTTPError(
            f"401 for https://user:pw@hub/a?X-Amz-Signature=0af9 {given} {own}",
            response=SimpleNamespace(status_code=401, headers={}, request=None),  # type: ignore[arg-type]
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RegraftError) as caught:
        locate("org/name", kind="base", token=given)
    said = str(caught.value)
    assert "401 for https://***@hub/a?X-Amz-Signature=*** *** ***" in said


@pytest.mark.parametrize(
    "text",
    [
        "org/name\n",
        "org/name@main\n",
        "org/name@a b",
        "org/name@-x",
        "org/name/sub\n",
        "org/name@a~1",
    ],
)
def test_line_breaks_and_what_git_has_no_names_for_are_no_part_of_a_hub_id(text: str) -> None:
    assert parse_reference(text) is None


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1.0+x", "feature#2", COMMIT])
def test_revisions_may_have_any_name_that_git_allows(revision: str) -> None:
    assert parse_reference(f"org/name@{revision}") is not None
