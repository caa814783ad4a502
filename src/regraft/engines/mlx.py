"""mlx-lm: adapters in its own format, with one rank and one scale for all modules.

What of an adapter has a place in that format is what `regraft convert --to mlx` writes, so that is
asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from regraft.adapters.dialects.mlx import write
from regraft.adapters.dialects.uniform import shape_of_uniform
from regraft.engines.common import model_is_known
from regraft.engines.facts import Engine, Rule, Settings
from regraft.engines.report import Finding
from regraft.engines.subject import Subject, is_grown
from regraft.errors import AdapterError, UnsupportedError
from regraft.translating import plain_adapter

MERGE = "Merge it (`regraft merge BASE ADAPTER -o OUT`), and give mlx-lm the merged model"


def has_a_form(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find what cannot be written in its format. A copy of an embedding is left out if it may be.

    That is a copy of the base's own shape: nobody reads here whether its values are the base's.
    """
    del settings
    if subject.dialect == "mlx" or subject.adapter.settings.begins_with_base:
        return
    copies = {
        each.parameter
        for each in subject.adapter.whole
        if each.origin == "embedding" and not is_grown(subject, each)
    }
    try:
        plain = plain_adapter(subject.files, subject.adapter)
        whole = {name: tensor for name, tensor in plain.whole.items() if name not in copies}
        write(shape_of_uniform(replace(plain, whole=whole)), subject.base)
    except (AdapterError, UnsupportedError) as error:
        for problem in error.problems:
            where = problem.where or subject.adapter.source
            yield Finding("refuses", where, problem.what, problem.hint or MERGE)


MLX = Engine(
    name="mlx",
    shown="mlx-lm",
    version="0.32.2",
    sources=(
        "mlx_lm/tuner/utils.py", "mlx_lm/tuner/lora.py", "mlx_lm/tuner/dora.py", "mlx_lm/utils.py",
        "mlx_lm/models",
    ),
    distributions=("mlx-lm",),
    dialect="mlx",
    rules=(Rule("starts with the base", "refuses", "it leaves the base as it is", MERGE),),
    checks=(model_is_known("mlx", lambda subject: subject.model_type), has_a_form),
)  # fmt: skip
