"""What an input's name means when it is no path: a Hub id, a folder in one, or a web address."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from regraft.errors import InputError
from regraft.formats.files.inside import head_of
from regraft.formats.problems import quoted

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)?", re.ASCII)
_PART = re.compile(r"[\w][\w.+=-]*", re.ASCII)
_SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?")
_VIEWS = ("tree", "blob", "resolve", "raw")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
_REVISION = re.compile(r"(?!-)[^\x00-\x20\x7f~^:?*\[\\]+")
"""What git lets a branch or tag be called, and no line break at its end."""

_CACHED = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_NAMES = 10_000


@dataclass(frozen=True)
class Reference:
    """A model on the Hub, or a folder in its repository.

    Attributes:
        repo_id: ``org/name``, or ``name``.
        revision: a branch, tag or commit; None for the main one.
        subfolder: a folder of the repository; empty for its top.
    """

    repo_id: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        place = f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id
        return f"{place}@{self.revision}" if self.revision else place


def parse_reference(text: str) -> Reference | None:
    """Return the model that ``org/name[/folder][@revision]`` or its web address names; else None.

    Raises:
        InputError: it is a web address of something else.
    """
    site = _SITE.match(text)
    if site is not None:
        return _of_address(text, text[site.end() :])
    if re.match(r"[a-z]+://", text):
        raise _other_address(text)
    return _reference(*text.partition("@")[::2])


def _reference(place: str, revision: str) -> Reference | None:
    parts = place.split("/")
    repo_id, below = "/".join(parts[:2]), parts[2:]
    if not _REPO_ID.fullmatch(repo_id) or place.endswith(_WEIGHT_SUFFIXES):
        return None
    if not all(map(_PART.fullmatch, below)):
        return None
    if revision and not _REVISION.fullmatch(revision):
        return None
    return Reference(repo_id, revision or None, "/".join(below))


def _of_address(text: str, path: str) -> Reference:
    """Return what a page of the Hub's site, or a path of its file system, shows."""
    if text.startswith("hf://"):
        place, _, rest = path.partition("@")
        revision, _, folder = rest.partition("/")
        found = _reference(f"{place}/{folder}".rstrip("/"), revision)
    else:
        parts = unquote(re.split(r"[?#]", path)[0]).strip("/").split("/")
        view = next((n for n, part in enumerate(parts[1:3], 1) if part in _VIEWS), len(parts))
        revision, below = "".join(parts[view + 1 : view + 2]), parts[view + 2 :]
        if below and below[-1].endswith(_WEIGHT_SUFFIXES):
            below = below[:-1]
        found = _reference("/".join([*parts[:view], *below]), revision)
        found = found if view <= 2 else None  # a page of another kind
    if found is None or found.repo_id.partition("/")[0] in ("datasets", "spaces", "models", "docs"):
        raise _other_address(text)
    return found


def _other_address(text: str) -> InputError:
    return InputError(
        "is a web address, and not that of a model on the Hub",
        where=quoted(text),
        expected="a path that exists, or a Hub id such as org/name, org/name/folder@revision",
        hint="Give the model's Hub id, or download it and give its folder",
    )


def cached_snapshot(path: Path) -> Path:
    """Return the snapshot in a ``models--org--name`` folder of the Hub's cache, else ``path``.

    Raises:
        InputError: it has several, and none is the main branch's.
        OSError: the system refused to look into it.
    """
    snapshots = path / "snapshots"
    if not path.resolve().name.startswith("models--") or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    commit = head_of(main, 64).decode("ascii", "replace").strip() if main.is_file() else ""
    if _COMMIT.fullmatch(commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    if len(found) == 1:
        return found[0]
    raise InputError(
        "is a folder of the Hub's cache with "
        + ("several snapshots" if found else "no snapshot in it"),
        where=str(path),
        expected="one snapshot",
        found=", ".join(entry.name for entry in found[:5]),
        hint=f"Give one, such as {found[0]}" if found else "Download the model again",
    )


def cached_id(text: str) -> str:
    """Return the Hub id of a ``models--org--name`` folder's name, or nothing."""
    found = _CACHED.fullmatch(text)
    return "/".join(filter(None, found.groups())) if found else ""


def neighbour(path: Path) -> str:
    """Return the sentence that offers a path of nearly the same name, or nothing."""
    for parent in path.parents:
        if not parent.is_dir():
            continue
        missing, *rest = path.relative_to(parent).parts
        names = [entry.name for entry in islice(parent.iterdir(), _MOST_NAMES)]
        for name in difflib.get_close_matches(missing[:256], names, n=3):
            found = parent.joinpath(name, *rest)
            if name != missing and found.exists():
                return f" Did you mean {quoted(str(found))}?"
        return ""
    return ""
