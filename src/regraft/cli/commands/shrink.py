"""``regraft shrink``: the same adapter, smaller."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="Make an adapter smaller, and say how far off it then is.")
@click.argument("adapter", metavar="ADAPTER")
@options.out
@options.factor_dtype("bfloat16")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Highest rank of a module; lower ones stay.  [default: every rank stays]",
)
@options.energy_to_keep("delta")
@click.option(
    "--uniform/--no-uniform",
    default=None,
    help="Multiply every scale into B and give all modules one rank, for programs that read no "
    "patterns (vLLM, llama.cpp).  [default: with --rank, where they would be wrong]",
)
@click.option(
    "--base",
    metavar="BASE",
    help="The base it was trained on: copies of its embeddings are then left out.",
)
@options.replace_adapter
@options.token
@options.as_json
@options.quiet
def command(*, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write an adapter anew with fewer bits, a lower rank, or without copies of the base's tensors.

    ADAPTER is a folder in PEFT's format, its weights file, or a Hub id. By default its factors
    become bfloat16. --rank or --energy cut each delta to its largest singular values, the best
    approximation there is of that rank. The config is changed to match, and what each delta is
    multiplied by stays. It tells how far each delta is from what it was, rounding included.
    Embeddings that PEFT saved along, although they are the base's, are left out if --base names
    that base.

    \b
    Examples:
      regraft shrink ./adapter -o ./small
      regraft shrink ./adapter -o ./small --rank 8
      regraft shrink ./adapter -o ./small --energy 0.99 --base org/base-model
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft.cli.texts import shrink as shrink_text
    from regraft.shrinking.verb import shrink

    with output.progress() as progress:
        report = shrink(**chosen, progress=progress)
    output.warn(report.warnings)
    output.data(report.to_json(), shrink_text.render(report))
