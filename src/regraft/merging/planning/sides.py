"""What lies beside the weights of a merge's inputs, read before there is any work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import InputError
from regraft.formats.files.inside import refuse_outside
from regraft.formats.files.reading import open_regular, typed_os_errors
from regraft.formats.files.text import plain_text
from regraft.formats.layout import ADAPTER_CONFIG
from regraft.merging.files.front_matter import read_metadata
from regraft.merging.files.side_files import plan_side_files, updated_config
from regraft.merging.planning.plan import Plan


@dataclass(frozen=True)
class Sides:
    """What lies beside the weights of the inputs and goes along, as it is before the work.

    Attributes:
        files: what is copied: name in the output to path.
        metadata: what the base's card says of licence and language.
        warnings: what is left out, one sentence each.
    """

    files: Mapping[str, Path]
    metadata: Mapping[str, Any]
    warnings: tuple[str, ...]


def sides_of(plan: Plan) -> Sides:
    """Read what is not copied as it is, and refuse what may not be read, before there is any work.

    Raises:
        AccessError: a file may not be read.
        InputError: a config is a link to outside of its folder, a weights file's name cannot be
            written down, or a file that is parsed cannot be.
    """
    _check_names(plan)
    roots = [Path(adapter.root) for adapter in plan.adapters]
    for root in roots:
        refuse_outside(root, ADAPTER_CONFIG)
    refuse_outside(plan.base.root, "config.json")
    if plan.base.single_file or plan.is_gguf:
        return Sides({}, {}, ())
    coded = bool(updated_config(plan.base.config or {}, plan.config_updates).get("auto_map"))
    found = plan_side_files(plan.base.root, roots, code=coded)
    for path in found.files.values():
        with typed_os_errors(path):
            os.close(open_regular(path))
    card = read_metadata(plan.base.root)
    return Sides(found.files, card.fields, (*found.left_out, *filter(None, [card.trouble])))


def _check_names(plan: Plan) -> None:
    """Refuse weight files whose names neither an index nor a receipt can hold.

    Raises:
        InputError: there are such.
    """
    paths = [shard.path for shard in plan.stored.shards]
    names = [shard.name for shard in plan.shards]
    odd = [name for name in [*names, *(p.name for p in paths)] if plain_text(name) != name]
    if odd:
        raise InputError(
            "the name of a weights file is not UTF-8", where=plain_text(str(plan.base.root)),
            found=plain_text(odd[0]), hint="Rename the file, and its entry in the index",
        )  # fmt: skip
