"""What a demo folder remembers of an earlier run, and why it is safe to write into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import OutputExistsError

STATE_FILE = "demo.json"


@dataclass(frozen=True)
class DemoFolder:
    """The folder that holds all the demo makes: the base, the adapters and the merged model."""

    path: Path

    @property
    def base(self) -> Path:
        """The converted base model."""
        return self.path / "base"

    def adapter(self, name: str) -> Path:
        """Return where a trained adapter is, in PEFT's format."""
        return self.path / adapter_part(name)

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.path / "merged"

    def open(self) -> None:
        """Make the folder, or take up one that an earlier demo made.

        Raises:
            OutputExistsError: the folder holds something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / STATE_FILE).exists():
            return
        if any(self.path.iterdir()):
            raise OutputExistsError(
                "the folder is not empty and no demo made it",
                where=str(self.path),
                hint="Name another folder for the demo; this one was left as it is",
            )
        self._write({})

    def recall(self, part: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what was noted of ``part`` if it is there and was made from the same ``key``."""
        entry = self._read().get(part)
        if not isinstance(entry, dict) or entry.get("key") != _as_json(key):
            return None
        facts = entry.get("facts")
        return facts if isinstance(facts, dict) and (self.path / part).is_dir() else None

    def note(self, part: str, key: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Remember that ``part`` was made from ``key``, with ``facts`` for later runs."""
        self._write(self._read() | {part: {"key": _as_json(key), "facts": dict(facts)}})

    @contextmanager
    def building(self, part: str) -> Iterator[Path]:
        """Give an empty folder that becomes ``part`` when the block ends without an error."""
        unfinished = self.path / f"{part}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        _let_others_read(unfinished)
        shutil.rmtree(self.path / part, ignore_errors=True)
        unfinished.rename(self.path / part)

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
        except ValueError:
            return {}
        return state if isinstance(state, dict) else {}

    def _write(self, state: Mapping[str, Any]) -> None:
        unfinished = self.path / f"{STATE_FILE}.tmp"
        unfinished.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.path / STATE_FILE)


def adapter_part(name: str) -> str:
    """Return what the part of the folder is called that holds an adapter."""
    return f"adapter-{name}"


def _let_others_read(folder: Path) -> None:
    """Give files the mode that the umask says; safetensors' library makes them for their owner."""
    usual = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(usual)


def _as_json(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(key))
