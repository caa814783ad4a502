"""Where an input is: a path on this machine, or a model on the Hugging Face Hub."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regraft.errors import (
    DiskSpaceError,
    EnvironmentShortfall,
    InputError,
    MissingExtraError,
    RegraftError,
    keep_secret,
)
from regraft.formats.files.reading import access_error, expanded, typed_os_errors
from regraft.formats.files.text import visible
from regraft.formats.problems import quoted
from regraft.formats.reference import (
    Reference,
    cached_id,
    cached_snapshot,
    neighbour,
    parse_reference,
)

Kind = Literal["base", "adapter", "merged"]


@dataclass(frozen=True)
class Located:
    """An input that is on this machine now.

    Attributes:
        path: the folder or file.
        source: what the user called it.
        repo_id: its name on the Hub, or None for a local path.
        revision: the Hub's commit hash, or None for a local path.
        subfolder: the folder of the repository that is meant; empty for its top.
    """

    path: Path
    source: str
    repo_id: str | None
    revision: str | None
    subfolder: str = ""


_COMMIT = re.compile(r"[0-9a-f]{40}")
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.txt", "*.py")
_DOCUMENTS = ("*.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_SAFE_WEIGHTS = {
    "base": ("*.safetensors",),
    "adapter": ("adapter_model.safetensors",),
    "merged": ("*.safetensors", "regraft/*"),
}
_TORCH_WEIGHTS = {
    "base": ("pytorch_model*.bin", "diffusion_pytorch_model.bin"),
    "adapter": ("adapter_model.bin",),
    "merged": (),
}
_OTHER_COPIES = (
    "original/*",
    "consolidated*.safetensors",
    "*.fp16.safetensors",
    "*.non_ema.safetensors",
)
# "*" crosses folders, and only the files at the top are read; but for the receipt and the undo of
# a merged model, wherever they are asked for.
_BELOW = ("*/*.safetensors", "*/*.bin", "*/*.json", "*/*.model", "*/*.txt")
_NEVER = {
    "base": (*_OTHER_COPIES, *_BELOW),
    "adapter": (*_OTHER_COPIES, *_BELOW),
    "merged": _OTHER_COPIES,
}


def locate(source: str | Path, *, kind: Kind, token: str | None = None) -> Located:
    """Return where ``source`` is, fetching it from the Hub where it is not a local path.

    A path that exists wins over a Hub id of the same name. Only the files needed are fetched:
    safetensors, else PyTorch's ``.bin``; config, tokenizer and the like; documents where they can
    be had. The Hub's cache, token, progress bars and ``HF_HUB_OFFLINE`` are huggingface_hub's.

    Args:
        source: a path, or ``name``, ``org/name``, ``org/name@revision``, or
            ``org/name/folder@revision`` for what lies in a folder of a repository; or the web
            address of one of these. A ``models--org--name`` folder of the cache is its snapshot.
        kind: whether a base, an adapter or a merged model with its receipt and undo is meant,
            which decides what to fetch.
        token: a Hub token; by default the one huggingface_hub knows of.

    Raises:
        InputError: no such path, no such model or revision, or no right to it.
        EnvironmentShortfall: the Hub cannot be reached and the cache does not hold the model.
    """
    keep_secret(token)
    if "\0" in str(source):  # from an adapter's config, say
        raise InputError(
            "is neither a path nor a Hub id", where=quoted(str(source)),
            expected="a path that exists, or a Hub id such as org/name", found="a NUL character",
            hint="Name the base before the adapters, if it is an adapter that names it so",
        )  # fmt: skip
    path = expanded(source)
    with typed_os_errors(path):
        exists = path.exists()
        if exists and (snapshot := cached_snapshot(path)) != path:
            return Located(snapshot, str(snapshot), None, None)
    if exists:
        return Located(path, str(source), None, None)
    found = None if isinstance(source, Path) else parse_reference(source)
    if found is None or (found.subfolder and Path(found.repo_id).parts[0] in _here(path)):
        raise _no_such_path(path)
    with _translated(str(found), kind):
        folder = _snapshot(found, kind, token)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else found.revision
    return Located(_inside(folder, found), str(found), found.repo_id, commit, found.subfolder)


def _here(path: Path) -> set[str]:
    """Return the first part of a relative path if such a folder is here: then a path is meant."""
    first = path.parts[0] if path.parts else ""
    return {first} if first and Path(first).is_dir() else set()


def _inside(folder: Path, reference: Reference) -> Path:
    """Return the folder of a snapshot that a reference means.

    Raises:
        InputError: the repository has no such folder, or nothing in it that is read.
    """
    if (folder / reference.subfolder).is_dir():
        return folder / reference.subfolder
    raise InputError(
        "the repository has no such folder, or no model or adapter in it",
        where=f"Hub id {quoted(str(reference))}",
        expected="a folder of the repository that holds one",
        found=quoted(reference.subfolder),
        hint=f"See https://huggingface.co/{reference.repo_id}/tree/{reference.revision or 'main'}",
    )


def _no_such_path(path: Path) -> InputError:
    hint = f"Check the spelling; relative paths start from {Path.cwd()}."
    return InputError(
        "no such file or folder",
        where=visible(str(path)),
        expected="a path that exists, or a Hub id such as org/name or org/name@revision",
        hint=(hint + _neighbour(path)).removesuffix("."),
    )


def _neighbour(path: Path) -> str:
    try:
        return neighbour(path)
    except OSError:
        return ""


def _snapshot(reference: Reference, kind: Kind, token: str | None) -> Path:
    """Return the folder that holds the files, safetensors if the repository has any."""
    folder = _fetch_with_documents(reference, kind, token)
    place = folder / reference.subfolder
    if any(place.glob("*.safetensors")):
        return folder
    if kind == "merged":
        return folder
    if kind == "adapter" and not (place / "adapter_config.json").exists():
        if not (place / "config.json").exists():
            _fetch_configs_below(reference, token)  # so that it can be said where adapters lie
        return folder  # not an adapter: the weights would be of no use
    return _fetch(reference, _TORCH_WEIGHTS[kind], _NEVER[kind], token)


def _fetch_configs_below(reference: Reference, token: str | None) -> None:
    """Fetch the configs of adapters in folders of a repository, if it can be reached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError):
        _fetch(reference, ("*/adapter_config.json",), (), token)


def _fetch_with_documents(reference: Reference, kind: Kind, token: str | None) -> Path:
    """Fetch; without a connection, do without documents that the cache happens not to hold."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    needed = (*_SAFE_WEIGHTS[kind], *_SIDE_FILES)
    try:
        return _fetch(reference, (*needed, *_DOCUMENTS), _NEVER[kind], token)
    except LocalEntryNotFoundError as error:
        if not hasattr(error, "snapshot_path"):  # nothing at all is cached
            raise
    return _fetch(reference, needed, _NEVER[kind], token)


def _fetch(
    reference: Reference, patterns: tuple[str, ...], never: tuple[str, ...], token: str | None
) -> Path:
    from huggingface_hub import snapshot_download

    below = f"{reference.subfolder}/" if reference.subfolder else ""
    folder = snapshot_download(
        reference.repo_id,
        revision=reference.revision,
        allow_patterns=[below + pattern for pattern in patterns],
        ignore_patterns=[below + pattern for pattern in never],
        token=token,
        library_name="regraft",
    )
    return Path(folder)


@contextmanager
def _translated(source: str, kind: Kind) -> Iterator[None]:
    """Turn what huggingface_hub raises into regraft's errors."""
    try:
        yield
    except ImportError:
        raise MissingExtraError(
            "huggingface_hub is needed to fetch from the Hub",
            where=quoted(source),
            hint="Run pip install huggingface_hub, or give a local path",
        ) from None
    except Exception as error:  # the library's errors come from several trees
        from huggingface_hub import get_token

        keep_secret(get_token())
        raise _hub_error(source, kind, error) from None


def _hub_error(source: str, kind: Kind, error: Exception) -> RegraftError:
    """Return the typed error for the first class of the table that fits."""
    from huggingface_hub import constants, errors

    here = f"Hub id {quoted(source)}"
    wanted = "merged model" if kind == "merged" else str(kind)
    not_local = f"no {wanted} of this name: neither a local path nor on the Hub"
    sign_in = "Check the spelling; a private one needs a token (hf auth login)."
    accept = f"Accept its terms on https://huggingface.co/{'/'.join(source.partition('@')[0].split('/')[:2])}"
    near = _neighbour(Path(source))
    is_off = constants.HF_HUB_OFFLINE
    unset = "Unset HF_HUB_OFFLINE, check" if is_off else "Check"
    offline = f"{unset} the connection, or give a local path.{near}".removesuffix(".")
    cached = cached_id(source)
    meant = f"Its Hub id is {cached}" if cached else near.strip()
    table: tuple[tuple[type[Exception], type[RegraftError], str, str], ...] = (
        (
            errors.GatedRepoError,
            InputError,
            "access to it is gated",
            f"{accept}, then hf auth login",
        ),
        (errors.RepositoryNotFoundError, InputError, not_local, (sign_in + near).removesuffix(".")),
        (errors.RevisionNotFoundError, InputError, "it has no such revision", "See its branches"),
        (errors.HFValidationError, InputError, "is neither a path that exists nor a Hub id", meant),
        (
            errors.LocalEntryNotFoundError,
            EnvironmentShortfall,
            "no such local path, the Hub cannot be reached, and the cache lacks files of it",
            offline,
        ),
        (errors.OfflineModeIsEnabled, EnvironmentShortfall, "the Hub is set to offline", offline),
    )
    for caught, raised, what, hint in table:
        if isinstance(error, caught):
            named = hasattr(error, "snapshot_path")  # which files are missing
            off = is_off and raised is EnvironmentShortfall and not named
            found = "HF_HUB_OFFLINE is set" if off else _first_line(error)
            return raised(what, where=here, found=found, hint=hint)
    return _other_error(here, error, offline)


def _other_error(here: str, error: Exception, hint: str) -> RegraftError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            "the disk is full: the download does not fit",
            where=here,
            hint="Free some space, or move the cache with HF_HOME",
        )
    if isinstance(error, OSError) and error.errno and error.filename:
        return access_error(Path(error.filename), error)
    return EnvironmentShortfall(
        "the download failed", where=here, found=_first_line(error), hint=hint
    )


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:300].rstrip('.')}"
