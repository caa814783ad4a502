"""Nothing heavy is loaded before it is needed, and nothing needs torch that should not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.kinds import Launch

HEAVY = {
    "numpy",
    "numba",
    "llvmlite",
    "huggingface_hub",
    "torch",
    "transformers",
    "peft",
    "tqdm",
    "safetensors",
    "ml_dtypes",
}

LISTING = """
import json, sys
sys.argv = ["regraft", *sys.argv[1:]]
from regraft.cli import main
try:
    main()
except SystemExit as end:
    code = end.code
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"code": code, "loaded": loaded}), file=sys.stderr)
"""

WITHOUT_TORCH = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "accelerate"):
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = ["regraft", *sys.argv[1:]]
from regraft.cli import main
main()
"""


def loaded_by(launch: Launch, *arguments: str | Path) -> set[str]:
    """Return the top-level modules that a command has loaded when it ends well."""
    result = launch("-c", LISTING, *arguments)
    listing = json.loads(result.stderr.splitlines()[-1])
    assert listing["code"] == 0, result.stderr
    return set(listing["loaded"])


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["merge", "--help"], ["demo", "--help"], ["completion", "zsh"]],
)
def test_start_up_loads_nothing_heavy(launch: Launch, arguments: list[str]) -> None:
    assert loaded_by(launch, *arguments) & HEAVY == set()


def test_inspecting_local_files_loads_no_numpy_and_no_hub(
    launch: Launch, base: Path, adapter: Path
) -> None:
    assert loaded_by(launch, "inspect", base, adapter) & HEAVY == set()


@pytest.mark.parametrize("arguments", [["check"], ["merge", "--dry-run"]])
def test_a_plan_needs_no_compiled_code(
    launch: Launch, base: Path, adapter: Path, arguments: list[str]
) -> None:
    assert loaded_by(launch, *arguments, base, adapter) & {"numba", "llvmlite", "torch"} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_works_without_torch(launch: Launch, arguments: list[str]) -> None:
    result = launch("-c", WITHOUT_TORCH, *arguments)
    assert (result.returncode, result.stderr) == (0, "")


def test_inspect_works_without_torch(launch: Launch, base: Path, adapter: Path) -> None:
    result = launch("-c", WITHOUT_TORCH, "inspect", base, adapter, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    kinds = [item["kind"] for item in json.loads(result.stdout)["inspections"]]
    assert kinds == ["base", "adapter"]


@pytest.mark.slow
def test_the_demo_without_torch_names_the_extra(launch: Launch) -> None:
    result = launch("-c", WITHOUT_TORCH, "demo", "--json")
    assert result.returncode == 4, result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "MissingExtraError"
    assert "pip install 'regraft[demo]'" in result.stderr
