"""``regraft combine``: one adapter of several."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="Make one adapter of several, and say how they stand to each other.")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@options.folder_to_make(required=False)
@options.combining_method(default="sum")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rank of the new adapter; modules whose deltas have less get less.",
)
@options.energy_to_keep("delta")
@click.option(
    "--exact",
    is_flag=True,
    help="Instead of --rank: the smallest rank that loses nothing but rounding.  [default]",
)
@options.density
@click.option(
    "--seed",
    type=int,
    default=0,
    metavar="N",
    help="Which random bits are used where a method draws.  [default: 0]",
)
@options.factor_dtype("float32")
@click.option(
    "--base",
    metavar="BASE",
    help="The base that the adapters are for: needed for some dialects and for stacks of experts, "
    "and for adapters that have no module in common.",
)
@click.option("--dry-run", is_flag=True, help="Print the report; write nothing.")
@options.replace_adapter
@options.token
@options.as_json
@options.quiet
def command(*, exact: bool, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Make one adapter of several; ranks, targets, dtypes and dialects may differ.

    What is combined is the deltas, scale * B A, each with its WEIGHT; a sum of factors would have
    terms that no adapter has. The default, sum, is exact, at the smallest rank that is. The report
    says of every module how large the deltas are, what was lost, and how the adapters compare: the
    cosine of their deltas, and the share of elements whose signs differ. OUT is in PEFT's format,
    with the scale 1 everywhere.

    \b
    Examples:
      regraft combine ./sql=0.7 ./json=0.3 -o ./both
      regraft combine ./sql ./json ./chat -o ./all --rank 32
      regraft combine ./sql ./json -o ./both --method knots --density 0.3
      regraft combine ./sql ./json --dry-run
    """
    if exact and (chosen["rank"] is not None or chosen["energy"] is not None):
        raise click.UsageError("--exact is another way to choose the rank: leave it out, or --rank")
    if not chosen["out"] and not chosen["dry_run"]:
        raise click.UsageError("Missing option '-o' / '--out': the folder to make.")
    output = Output(as_json=as_json, quiet=quiet and not chosen["dry_run"])
    output.mute_downloads()
    from regraft.cli.texts import combine as combine_text
    from regraft.combining.verb import combine

    with output.progress() as progress:
        report = combine(**chosen | {"adapters": list(chosen["adapters"])}, progress=progress)
    output.data(report.to_json(), combine_text.render(report))
