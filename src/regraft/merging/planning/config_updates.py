"""Which class the output is of, and what its config says of labels: the adapter's head tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.adapters.model import Adapter
from regraft.errors import Problem, UnsupportedError
from regraft.formats.checkpoint import Checkpoint
from regraft.merging.inputs.base_index import BaseIndex
from regraft.merging.planning.match import Work
from regraft.names import NameMap, class_for_task, classes_of
from regraft.names.architecture import template

MOST_LABELS = 1_000_000
"""Labels of a classification head: each gets two lines of the config."""

_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_LAST_LAYERS = ("classifier", "score", "out_proj", "qa_outputs")


@dataclass(frozen=True)
class Chosen:
    """The class of the output.

    Attributes:
        name: the class; None where it is the base's own.
        problems: what cannot be decided.
        notes: what the user should know.
    """

    name: str | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def choose_class(base: Checkpoint, adapters: Sequence[Adapter]) -> Chosen:
    """Return the class that the adapters were trained on, when it is not the base's own.

    A head that the adapter brings along decides; of the classes that have such a head, the one that
    the adapter's config names is taken.
    """
    for adapter in adapters:
        claimed = _claimed(base, adapter)
        chosen = _by_head(base, adapter, claimed)
        if chosen is not None:
            return chosen
        if claimed:
            return Chosen(claimed)
    return Chosen()


def _claimed(base: Checkpoint, adapter: Adapter) -> str | None:
    """Return the class that an adapter's config names, where it matters."""
    settings = adapter.settings
    if settings.base_model_class and not _both_speak(base, settings.base_model_class):
        return settings.base_model_class
    if settings.task_type in _HEAD_TASKS and base.config:
        return class_for_task(settings.task_type, str(base.config.get("model_type")))
    return None


def _both_speak(base: Checkpoint, trained: str) -> bool:
    """Whether a class has an output embedding as the base's own has: it is the same model, with or
    without its eyes, and the base's class stays."""
    own, other = NameMap.for_config(base.config), NameMap.for_config(base.config, trained)
    return bool(own.output_embedding and other.output_embedding)


def _by_head(base: Checkpoint, adapter: Adapter, claimed: str | None) -> Chosen | None:
    """Return the class that has the head which the adapter brings; None if it brings none."""
    own = NameMap.for_config(base.config)
    saved = [whole.parameter for whole in adapter.whole if whole.origin == "saved"]
    head = [name for name in saved if own.tensors and not own.has(name, own.tensors)]
    if not head or (claimed and _fits(base, claimed, saved) is not False):
        return None
    model_type = str((base.config or {}).get("model_type"))
    found = [name for name in classes_of(model_type) if _fits(base, name, saved)]
    if len(found) > 1:
        return Chosen(claimed, (_undecided(adapter, head, found),))
    if not found:
        return None  # nobody's head, which is noted when the output is complete
    said = claimed or f"task_type {adapter.settings.task_type}"
    note = (
        f"{adapter.label}: its head ({', '.join(sorted(head))}) makes the output a {found[0]}; its "
        f"config says {said}"
    )
    return Chosen(found[0], notes=(note,))


def _fits(base: Checkpoint, name: str, saved: Iterable[str]) -> bool | None:
    """Whether a class has all saved tensors, and no others in their modules; None: not known."""
    names = NameMap.for_config(base.config, name)
    if names.tensors is None:
        return None
    have = {template(parameter) for parameter in saved}
    layers = {parameter.rpartition(".")[0] for parameter in have}
    whole = {tensor for tensor in names.tensors if tensor.rpartition(".")[0] in layers}
    return all(names.has(parameter, names.tensors) for parameter in have) and whole <= have


def _undecided(adapter: Adapter, head: list[str], found: list[str]) -> Problem:
    return Problem(
        "several classes have the head that the adapter brings, and its config names none of them",
        f"{adapter.label}: {', '.join(sorted(head))}", "one class", ", ".join(found),
        "Set task_type in adapter_config.json to SEQ_CLS, TOKEN_CLS or QUESTION_ANS",
    )  # fmt: skip


# -- the base's own head ---------------------------------------------------------------------------


def left_out_of(base: Checkpoint, index: BaseIndex) -> frozenset[str]:
    """Return the base's tensors that the output's class does not have: an old output head."""
    before = NameMap.for_config(base.config)
    head = before.output_embedding
    if index.names.architecture == before.architecture or not head or index.names.output_embedding:
        return frozenset()
    return frozenset(name for name in base.tensors if name.startswith(f"{head}."))


def missing_head(
    index: BaseIndex,
    adapters: Sequence[Adapter],
    works: Mapping[str, Work],
    left_out: frozenset[str],
) -> list[Problem]:
    """Return the problem of a task whose head neither the base nor an adapter holds."""
    if not left_out or any(work.base is None for work in works.values()):
        return []
    labels = [a.label for a in adapters if a.settings.task_type in _HEAD_TASKS]
    return [
        Problem(
            "the adapter was trained with a head that neither it nor the base holds", label,
            f"the head of {index.names.architecture}", ", ".join(sorted(left_out)),
            "Save the adapter with its head in modules_to_save",
        )
        for label in labels
    ]  # fmt: skip


def note_left_out(index: BaseIndex, left_out: frozenset[str]) -> list[str]:
    """Say which head of the base is not in the output."""
    if not left_out:
        return []
    names = ", ".join(sorted(left_out))
    return [f"{names} of the base is left out: {index.names.architecture} has no such output"]


# -- the config ------------------------------------------------------------------------------------


def class_updates(
    index: BaseIndex, adapters: Sequence[Adapter], works: Mapping[str, Work], chosen: Chosen
) -> dict[str, Any]:
    """Return the architecture and labels when the adapter brings a head of its own.

    Raises:
        UnsupportedError: the head has more labels than a config can list, or two heads differ.
    """
    config = index.base.config or {}
    architecture = index.names.architecture
    brought = [work for work in works.values() if work.source_adapter is not None]
    if not architecture or not (chosen.name or brought):
        return {}
    updates: dict[str, Any] = {}
    added = any(work.base is None for work in brought)
    if (chosen.name or added) and config.get("architectures") != [architecture]:
        updates |= {"architectures": [architecture]} if index.names.known else {}
    heads = [work for work in brought if _is_head(index, work, adapters)]
    counts = {work.source.shape[0] for work in heads}
    if len(counts) > 1 or max(counts, default=0) > MOST_LABELS:
        raise _no_labels(heads)
    if counts and len(config.get("id2label") or {}) != max(counts):
        count = max(counts)
        updates["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        updates["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    return updates


def _no_labels(heads: list[Work]) -> UnsupportedError:
    if len(heads) > 1:
        return UnsupportedError(
            "heads of one model have different numbers of labels", expected="one number",
            where=", ".join(work.name for work in heads),
            found=", ".join(str(work.source.shape[0]) for work in heads),
        )  # fmt: skip
    return UnsupportedError(
        "a classification head has too many labels to be listed in the config",
        where=f"tensor {heads[0].name!r}", expected=f"at most {MOST_LABELS} rows",
        found=str(heads[0].source.shape[0]), hint="Is it a classification head at all?",
    )  # fmt: skip


def _is_head(index: BaseIndex, work: Work, adapters: Sequence[Adapter]) -> bool:
    """Whether a work writes the last layer of a classification head."""
    if not work.name.endswith(".weight") or not work.source.shape:
        return False
    labels = index.names.label_tensors
    if labels or index.names.tensors is not None:
        return any(piece.parameter in labels for piece in index.names.pieces(work.name))
    owner = work.source_adapter
    if owner is None or adapters[owner].settings.task_type not in _HEAD_TASKS:
        return False
    last = work.name.removesuffix(".weight").rpartition(".")[2] in _LAST_LAYERS
    return last and len(work.source.shape) == 2
