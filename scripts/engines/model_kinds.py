"""Writes which kinds of models engines have: ``src/regraft/engines/model_kinds.json``.

``python model_kinds.py LLAMA_CPP MLX_LM SGLANG OUT.json`` takes the folder of llama.cpp's
converters and those of the packages ``mlx_lm`` and ``sglang``. It reads files and imports none.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

NO_MODELS = ("activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline",
             "rope_utils", "ssm", "switch_layers")  # fmt: skip
"""Files beside mlx-lm's models that are none."""


def assigned(file: Path, name: str) -> Any:
    """Return the value that a module assigns to a name, as it stands there."""
    for node in ast.parse(file.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(each, ast.Name) and each.id == name for each in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise ValueError(f"{file} assigns nothing to {name}")


def of_llama_cpp(root: Path) -> list[str]:
    """Return the classes that llama.cpp's converter has a model for."""
    return sorted(assigned(root / "conversion/__init__.py", "TEXT_MODEL_MAP"))


def of_mlx_lm(root: Path) -> list[str]:
    """Return the model types that mlx-lm has."""
    own = {path.stem for path in (root / "models").glob("*.py")} - {"__init__", *NO_MODELS}
    return sorted(own | set(assigned(root / "utils.py", "MODEL_REMAPPING")))


def of_sglang(root: Path) -> list[str]:
    """Return the classes that SGLang has of its own."""
    found = set[str]()
    for file in (root / "srt/models").glob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
                found |= {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
    return sorted(found)


def main() -> None:
    """Write the table."""
    llama_cpp, mlx_lm, sglang, out = map(Path, sys.argv[1:5])
    table = {
        "llama.cpp": of_llama_cpp(llama_cpp),
        "mlx": of_mlx_lm(mlx_lm),
        "sglang": of_sglang(sglang),
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in table.items())
    out.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
