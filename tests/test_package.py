"""The package as a whole: its public names, what it loads and when, what it can do without."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import regraft
from merging import toys
from merging.processes import python

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_public_name_can_be_had_and_is_listed() -> None:
    assert len(regraft.__all__) == len(set(regraft.__all__))
    for name in regraft.__all__:
        assert getattr(regraft, name) is not None
    assert set(dir(regraft)) == {*regraft.__all__, "Adapters"}  # which needs torch
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        regraft.mergee  # noqa: B018


def test_a_star_import_gives_exactly_them() -> None:
    space: dict[str, Any] = {}
    exec("from regraft import *", space)
    assert set(space) - {"__builtins__"} == set(regraft.__all__)


def error_names() -> set[str]:
    """Return the names of all errors that the package raises on purpose."""
    from regraft import errors

    return {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.RegraftError)
    }


def test_every_error_is_public_and_has_an_exit_code() -> None:
    assert error_names() <= set(regraft.__all__)
    for name in error_names() - {"RegraftError"}:
        assert getattr(regraft, name)("what").exit_code in (2, 3, 4)


def test_the_tree_of_errors_is_the_one_drawn() -> None:
    from regraft import errors

    parents = [errors.RegraftError]
    drawn = re.findall(r"^    ([│├└─ ]+)(\w+)  ", errors.__doc__ or "", re.MULTILINE)
    assert {name for _, name in drawn} == error_names() - {"RegraftError"}
    for indent, name in drawn:
        depth = len(indent) // 4
        kind = getattr(errors, name)
        assert kind.__bases__ == (parents[depth - 1],)
        parents[depth:] = [kind]


def test_the_version_is_the_one_the_package_is_built_with() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z0-9.+-]*)?", regraft.__version__)
    assert "version" in PROJECT["dynamic"]


# Documentation of what is public


def public_functions() -> list[Callable[..., Any]]:
    """Return the public functions, and the public methods of public classes."""
    found: list[Callable[..., Any]] = []
    for name in regraft.__all__:
        value = getattr(regraft, name)
        if inspect.isfunction(value):
            found.append(value)
        elif inspect.isclass(value):
            members = [member for key, member in vars(value).items() if not key.startswith("_")]
            found += [member for member in members if inspect.isfunction(member)]
    return found


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f.__qualname__)
def test_public_functions_are_documented_and_annotated(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""
    assert text.partition("\n")[0].endswith(".")
    hints = inspect.signature(function)
    assert hints.return_annotation is not inspect.Signature.empty
    for name, parameter in hints.parameters.items():
        assert name == "self" or parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("name", ["merge", "plan", "check", "inspect", "shrink"])
def test_the_verbs_say_what_they_raise(name: str) -> None:
    text = inspect.getdoc(getattr(regraft, name)) or ""
    raised = re.findall(r"^    (\w+): ", text.partition("Raises:")[2], re.MULTILINE)
    assert raised
    for kind in raised:
        assert issubclass(getattr(regraft, kind), regraft.RegraftError)


def test_every_argument_of_a_merge_is_explained() -> None:
    text = inspect.getdoc(regraft.merge) or ""
    section = text.partition("Args:")[2].partition("Returns:")[0]
    named = re.findall(r"^    (\w+): ", section, re.MULTILINE)
    assert named == list(inspect.signature(regraft.merge).parameters)


def test_the_fields_of_what_is_returned_are_explained() -> None:
    for kind in (
        *(regraft.Receipt, regraft.Plan, regraft.CheckReport, regraft.ProgressEvent),
        regraft.ShrinkReport,
    ):
        text = inspect.getdoc(kind) or ""
        named = set(re.findall(r"^    ([\w, ]+): ", text.partition("Attributes:")[2], re.MULTILINE))
        explained = {name for group in named for name in group.split(", ")}
        missing = set(kind.__dataclass_fields__) - explained - {"receipt", "arithmetic"}
        assert not missing, kind


# What is loaded


LOADED = """
import json, sys
before = set(sys.modules)
{statement}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that a statement loads in a fresh interpreter."""
    done = python(LOADED.format(statement=statement))
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


HEAVY = {"numpy", "numba", "llvmlite", "torch", "transformers", "peft", "huggingface_hub",
         "safetensors", "ml_dtypes", "click", "tqdm", "blake3", "yaml"}  # fmt: skip


def test_importing_the_package_loads_nothing_but_itself() -> None:
    assert not loaded_by("import regraft; dir(regraft)") & HEAVY


@pytest.mark.slow
def test_the_verbs_load_no_torch() -> None:
    found = loaded_by("from regraft import *")
    assert "numpy" in found
    assert not found & {"torch", "transformers", "peft", "accelerate"}


WITHOUT = """
import sys
import regraft
base, adapter, out = sys.argv[1:]
assert regraft.check(base, adapter).ok
regraft.merge(base, adapter, out)
kinds = [regraft.inspect(path).kind for path in (base, adapter, out)]
assert kinds == ["base", "adapter", "merged"], kinds
assert not {"torch", "transformers", "peft"} & set(sys.modules)
"""


@pytest.mark.slow
def test_everything_but_the_extras_works_where_they_are_not_installed(tmp_path: Path) -> None:
    base, adapter = toys.write_base(tmp_path / "base"), toys.write_adapter(tmp_path / "adapter")
    missing = ["torch", "transformers", "peft", "accelerate", "gguf", "datasets", "scipy"]
    done = python(WITHOUT, base, adapter, tmp_path / "out", without=missing)
    assert (done.returncode, done.stderr) == (0, "")
    assert toys.load(tmp_path / "out").keys() == toys.llama_tensors().keys()


@pytest.mark.slow
def test_what_the_core_imports_is_declared() -> None:
    declared = names_of(PROJECT["dependencies"])
    for package, bringer in (("yaml", "huggingface_hub"), ("llvmlite", "numba")):
        distribution = {"yaml": "pyyaml"}.get(package, package)
        assert bringer in declared
        assert distribution in names_of(metadata.requires(bringer) or [])
    extra = {"gguf", "jinja2"}
    assert core_imports() - {"yaml", "llvmlite"} - extra <= declared
    assert names_of(PROJECT["optional-dependencies"]["gguf"]) == extra


def names_of(requirements: list[str]) -> set[str]:
    """Return the names in a list of requirements, as they are imported."""
    found = (re.match(r"[\w-]+", requirement) for requirement in requirements)
    return {match[0].replace("-", "_").lower() for match in found if match}


NEEDS_THE_EXTRA = (
    Path("verifying/prompting/prompts.py"), Path("verifying/prompting/models.py"),
    Path("probing/expecting.py"),
)  # fmt: skip


def core_imports() -> set[str]:
    """Return the third-party packages that the core's files import anywhere."""
    package = ROOT / "src" / "regraft"
    found: set[str] = set()
    for path in package.rglob("*.py"):
        place = path.relative_to(package)
        if not {"demo", "runtime", "testing"} & set(place.parts) and place not in NEEDS_THE_EXTRA:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(node.module or "")
    top = {name.partition(".")[0] for name in found}
    return top - sys.stdlib_module_names - {"regraft", "torch", "_typeshed"}


def test_the_rooms_keep_to_themselves() -> None:
    linter = pytest.importorskip("importlinter.cli")
    assert linter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_the_package_says_it_is_typed_and_holds_its_data() -> None:
    package = Path(regraft.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "names" / "transformers.json").exists()
    assert (package / "engines" / "vllm_models.json").exists()


def test_public_modules_have_a_docstring() -> None:
    from regraft import api, errors, tensors

    modules: tuple[ModuleType, ...] = (regraft, api, errors, tensors)
    assert all((module.__doc__ or "").strip() for module in modules)
