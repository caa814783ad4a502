"""``regraft diff``: what is different?"""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="What differs between two models, or two adapters.")
@click.argument("x", metavar="X")
@click.argument("y", metavar="Y")
@click.option("--all", "show_all", is_flag=True, help="List everything that differs, uncapped.")
@click.option(
    "--raw",
    is_flag=True,
    help="Of adapters, compare the factors as they are stored, tensor by tensor.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker threads.  [default: by the number of cores]",
)
@options.token
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context, /, show_all: bool, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Compare two checkpoints, or two adapters, tensor by tensor or delta by delta.

    X and Y are folders, weights files, or Hub ids such as org/name@revision. Tensors are compared
    by name and bytes; of those that differ it tells how many elements do, how far Y is from X
    relative to X, the largest difference, and the largest distance in units in the last place.
    Of adapters the deltas are compared, scale * B * A of each module, also of different ranks,
    scales and dtypes: how far Y's is from X's, and the cosine between the two; --raw compares the
    stored factors. Between folders the configs count too; other files are only named. Memory does
    not grow with the model. Exits with 0 when they are the same, 1 when not, and 3 when they cannot
    be compared.

    \b
    Examples:
      regraft diff ./base ./merged
      regraft diff org/model@main org/model@v2 --all
      regraft diff ./adapter ./adapter-retrained
      regraft diff ./adapter ./adapter-retrained --raw --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft.cli.texts import diff as diff_text
    from regraft.verifying.diffing.diff import diff

    with output.progress() as progress:
        report = diff(**chosen, progress=progress)
    output.data(report.to_json(), diff_text.render(report, limit=None if show_all else SHOWN))
    ctx.exit(0 if report.same else 1)


SHOWN = 20
"""Lines of each list that are shown without --all."""
