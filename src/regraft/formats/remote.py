"""A base on the Hub, known from its headers alone: they are read where they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import EnvironmentShortfall, FormatError, InputError, Problem
from regraft.formats.checkpoint import Checkpoint, Shard, open_checkpoint, read_base_config
from regraft.formats.files.json_file import read_json_object
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.hub import Located, locate
from regraft.formats.problems import capped, quoted
from regraft.formats.safetensors import entry_trouble
from regraft.tensors import TensorSpec

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsRepoMetadata


def open_headers(source: str | Path, *, token: str | None = None) -> Checkpoint:
    """Return a base as ``open_checkpoint`` does, without fetching its weights.

    A local path, or a model whose weights are all in the Hub's cache, is opened as it is. Of any
    other model on the Hub, the config and the headers are fetched; its tensors' paths are then the
    files' names, and cannot be read. A model without safetensors has to be fetched whole.

    Raises:
        InputError: there is no such model, or it is none that has headers.
        EnvironmentShortfall: the Hub cannot be reached.
    """
    located = locate(source, kind="adapter", token=token)  # fetches all but a base's weights
    if located.subfolder:  # the Hub tells headers of files at the top alone
        return open_checkpoint(locate(source, kind="base", token=token))
    if located.repo_id is None or is_whole(located.path):
        return open_checkpoint(located)
    try:
        headers = fetch_headers(located, token)
    except InputError:
        return open_checkpoint(locate(source, kind="base", token=token))
    return checkpoint_of(located, headers)


def is_whole(folder: Path) -> bool:
    """Whether a Hub model's weights are all in the cache, so that no header need be fetched."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        with typed_os_errors(folder):
            return all((folder / name).is_file() for name in names)
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def fetch_headers(located: Located, token: str | None) -> SafetensorsRepoMetadata:
    """Fetch the headers of a model's safetensors files, without their tensors.

    Raises:
        InputError: the model has no safetensors.
        EnvironmentShortfall: the headers could not be fetched.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    where = f"Hub id {located.source!r}"
    try:
        return HfApi(token=token).get_safetensors_metadata(
            located.repo_id or "", revision=located.revision
        )
    except NotASafetensorsRepoError:
        raise InputError(
            "is neither an adapter nor a model in safetensors",
            where=where,
            expected="model.safetensors, its index, or adapter_config.json",
            hint="Download its files and inspect the folder",
        ) from None
    except Exception as error:  # the library's errors come from several trees
        raise EnvironmentShortfall(
            "the headers could not be fetched",
            where=where,
            found=f"{type(error).__name__}: {error}".partition("\n")[0],
            hint="Check the connection and the token, or download the model and give its folder",
        ) from None


def checkpoint_of(located: Located, headers: SafetensorsRepoMetadata) -> Checkpoint:
    """Return the checkpoint that a model's headers describe.

    Raises:
        FormatError: a tensor's entry is malformed; all of them at once. That there is no gap and no
            overlap is checked when the files themselves are read.
    """
    _check_entries(located, headers)
    shards, tensors = [], dict[str, TensorSpec]()
    for name, file in sorted(headers.files_metadata.items()):
        found = [_spec(name, key, info) for key, info in file.tensors.items()]
        found.sort(key=lambda spec: spec.start)
        shards.append(Shard(Path(name), name, tuple(spec.name for spec in found), {}))
        tensors |= {spec.name: spec for spec in found}
    return Checkpoint(
        root=located.path,
        source=located.source,
        revision=located.revision,
        shards=tuple(shards),
        tensors=tensors,
        config=read_base_config(located.path / "config.json"),
        index_metadata=None,
        container="safetensors",
        single_file=False,
    )


def _check_entries(located: Located, headers: SafetensorsRepoMetadata) -> None:
    problems = []
    for file, metadata in sorted(headers.files_metadata.items()):
        for name, info in metadata.tensors.items():
            entry = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": list(info.data_offsets),
            }
            if trouble := entry_trouble(name, entry):
                where = f"Hub id {located.source!r}, {file}, tensor {quoted(name)}"
                problems.append(Problem(trouble[0], where, *trouble[1:]))
    if problems:
        raise FormatError(capped(problems, located.path))


def _spec(file: str, name: str, info: Any) -> TensorSpec:
    begin, end = info.data_offsets
    return TensorSpec(name, info.dtype, tuple(info.shape), Path(file), begin, end - begin)
