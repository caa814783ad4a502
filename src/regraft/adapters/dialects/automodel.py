"""NeMo Automodel's grouped experts: PEFT's files, with stacks of matrices that are transposed.

``experts.lora_gate_and_up_A`` is (E, in, r), ``_B`` (E, r, 2 I) with gate first; ``lora_down_A``
(E, I, r), ``_B`` (E, r, out). Without a gate, ``_B`` is (E, r, I). Facts: nemo-automodel 0.7,
``components/_peft/lora_experts.py`` and ``components/moe/state_dict_mixin.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from regraft.adapters.dialects.form import Moved, NewFile, PlainAdapter, joined, stacked
from regraft.adapters.dialects.shared.base_facts import model_type
from regraft.adapters.dialects.shared.experts import Stack, by_stack, leaf_of, single_experts
from regraft.adapters.dialects.shared.gathering import Gathering
from regraft.adapters.dialects.shared.limits import magnitudes, refuse, unsayable
from regraft.adapters.dialects.shared.once import NewTensors
from regraft.adapters.dialects.shared.peft_files import FACTOR, PeftFiles, new_files, open_files
from regraft.adapters.dialects.shared.widening import as_one_dtype
from regraft.errors import Problem
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.reading import FilePool
from regraft.formats.layout import ADAPTER_SAFE
from regraft.tensors import TensorSpec

_PROGRAM = "NeMo Automodel"
_GROUPED = re.compile(r"(?P<module>.+)\.experts\.(?P<what>lora_(gate_and_up|gate_up|down)_[AB])")
_INTERLEAVED = ("gpt_oss",)
"""Model types of which gate and up lie in turn."""

_MERGE = "Merge it (`regraft merge`), and use the merged model"


def read(path: Path, base: Checkpoint | None) -> PlainAdapter:
    """Read an adapter of grouped experts.

    See :class:`regraft.adapters.dialects.registry.Reader`.
    """
    files = open_files(path)
    gathering = Gathering(files.weights)
    grouped = {name: spec for name, spec in files.tensors.items() if _GROUPED.fullmatch(name)}
    rest = {name: spec for name, spec in files.tensors.items() if name not in grouped}
    for name, parts in gathering.parts(rest, FACTOR, "lora_A and lora_B").items():
        pair = gathering.pair(name, parts, ("lora_A", "lora_B"))
        if pair is not None:
            gathering.add(name, *pair, files.scale)
    _add_experts(gathering, grouped, files, base)
    return PlainAdapter(
        gathering.done(), base=files.base, task_type="CAUSAL_LM", metadata=files.metadata
    )


def _add_experts(
    gathering: Gathering,
    grouped: Mapping[str, TensorSpec],
    files: PeftFiles,
    base: Checkpoint | None,
) -> None:
    found = gathering.parts(grouped, _GROUPED, "lora_gate_and_up_A, lora_down_A, ...")
    for owner, parts in found.items():
        name = f"{owner}.experts"
        if model_type(base) in _INTERLEAVED:
            gathering.refuse(f"{model_type(base)} has gate and up in turn in one matrix", name)
            continue
        first = "gate_and_up" if "lora_gate_and_up_A" in parts else "gate_up"
        inner = gathering.pair(name, parts, (f"lora_{first}_A", f"lora_{first}_B"), (3,))
        down = gathering.pair(name, parts, ("lora_down_A", "lora_down_B"), (3,))
        if inner is None or down is None:
            continue
        _add_layer(gathering, owner, inner, down, files.scale, base)


def _add_layer(
    gathering: Gathering,
    owner: str,
    inner: tuple[Moved, Moved],
    down: tuple[Moved, Moved],
    scale: float,
    base: Checkpoint | None,
) -> None:
    """Add the experts of a layer: A and B of gate and up together, and of down."""
    name, counts = f"{owner}.experts", {tensor.shape[0] for tensor in (*inner, *down)}
    width, height = down[0].shape[1], inner[1].shape[2]
    if len(counts) > 1 or height not in (width, 2 * width):
        gathering.refuse(
            "factors do not fit each other", name, f"gate and up of {2 * width} rows",
            ", ".join(str(tensor.shape) for tensor in (*inner, *down)),
        )  # fmt: skip
        return
    roles = ("gate", "up") if height == 2 * width else ("up",)
    leaves = {role: leaf_of(owner, role, base) for role in (*roles, "down")}
    for number in range(counts.pop()):
        a, b = (tensor.at(number).transposed for tensor in inner)
        for at, role in enumerate(roles):
            rows = b.rows(at * width, (at + 1) * width)
            gathering.add(f"{name}.{number}.{leaves[role]}", a, rows, scale, stored=name)
        a, b = (tensor.at(number).transposed for tensor in down)
        gathering.add(f"{name}.{number}.{leaves['down']}", a, b, scale, stored=name)


# -- writing ---------------------------------------------------------------------------------------


def write(adapter: PlainAdapter, base: Checkpoint | None) -> tuple[NewFile, ...]:
    """Return an adapter's files as NeMo Automodel has them; of one rank and scale."""
    adapter = single_experts(adapter, base)
    problems = unsayable(adapter, _PROGRAM) + magnitudes(adapter.modules, _PROGRAM)
    refuse(problems, ADAPTER_SAFE)
    plain, stacks, problems = by_stack(adapter.modules)
    layers: dict[str, dict[str, Stack]] = {}
    for stack in stacks:
        layers.setdefault(stack.owner, {})[stack.role] = stack
    groups = [_Group(owner, roles) for owner, roles in layers.items()]
    with FilePool() as files:
        problems += [problem for group in groups for problem in group.problems(files)]
    refuse(problems, ADAPTER_SAFE)
    tensors = NewTensors()
    for module in plain:
        tensors[f"{module.name}.lora_A.weight"] = module.a
        tensors[f"{module.name}.lora_B.weight"] = module.b
    for group in groups:
        tensors.add(group.tensors())
    names = [module.name for module in plain] + [f"{owner}.experts" for owner in layers]
    return new_files(adapter, tensors, names)


@dataclass(frozen=True)
class _Group:
    """The experts of a layer: their stacks by role."""

    owner: str
    roles: Mapping[str, Stack]

    def problems(self, files: FilePool) -> list[Problem]:
        """Return why these cannot be grouped experts."""
        where = f"{self.owner}.experts"
        if set(self.roles) not in ({"gate", "up", "down"}, {"up", "down"}):
            return [Problem("NeMo Automodel trains gate, up and down of experts together", where,
                            found=", ".join(sorted(self.roles)), hint=_MERGE)]  # fmt: skip
        if "gate" in self.roles and not self._share(files):
            return [Problem("gate and up of NeMo Automodel's experts share A, and here they do not",
                            where, hint=_MERGE)]  # fmt: skip
        return []

    def _share(self, files: FilePool) -> bool:
        pairs = zip(self.roles["gate"].members, self.roles["up"].members, strict=True)
        return all(
            gate.a.shape == up.a.shape and gate.a.dtype == up.a.dtype
            and np.array_equal(gate.a.bits(files), up.a.bits(files))
            for gate, up in pairs
        )  # fmt: skip

    def tensors(self) -> dict[str, Moved]:
        """Return the grouped tensors, by name."""
        up = self.roles["up"]
        members = up.members
        if "gate" in self.roles:
            members = tuple(
                replace(u, b=joined(as_one_dtype([g.b, u.b])))
                for g, u in zip(self.roles["gate"].members, up.members, strict=True)
            )
        found = {}
        for name, held in (("gate_and_up", members), ("down", self.roles["down"].members)):
            for factor in "AB":
                each = [m.a if factor == "A" else m.b for m in held]
                stack = stacked(as_one_dtype(each))
                found[f"{self.owner}.experts.lora_{name}_{factor}"] = stack.transposed
        return found
