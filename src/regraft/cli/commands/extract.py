"""``regraft extract``: an adapter out of a fine-tuned model."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="Get an adapter out of a fine-tuned model.")
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@options.out
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rank of the factors.  [default: 64]",
)
@options.energy_to_keep("difference")
@click.option(
    "--max-error",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    metavar="F",
    help="Instead of --rank: the largest relative error of each difference, such as 0.02.",
)
@click.option(
    "--modules",
    metavar="NAMES",
    help="Names of modules, or ends of them, such as q_proj,v_proj.  [default: all that changed]",
)
@options.factor_dtype("bfloat16")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Which random start the search for the factors takes.  [default: 0]",
)
@options.replace_adapter
@options.token
@options.as_json
@options.quiet
def command(*, modules: str | None, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Get an adapter out of a fine-tuned model: what TUNED adds to BASE, as low-rank factors.

    Both are folders, weight files or Hub ids, plain or quantized; they are read a piece at a time,
    so that memory does not grow with them. Norms, biases and such travel whole, and so do
    embeddings that grew or are tied. The report says how far off every matrix is, and says so
    loudly where the fine-tune is not of low rank. From a model that `regraft merge` made of BASE
    the adapter comes out exactly, as it was.

    \b
    Examples:
      regraft extract ./base ./tuned -o ./adapter
      regraft extract ./base ./tuned -o ./adapter --rank 128 --dtype float32
      regraft extract ./base ./tuned -o ./adapter --max-error 0.1 --modules q_proj,v_proj
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft.cli.texts import extract as extract_text
    from regraft.extracting.verb import extract

    names = [name.strip() for name in modules.split(",") if name.strip()] if modules else None
    with output.progress() as progress:
        report = extract(**chosen, modules=names, progress=progress)
    output.warn(report.warnings)
    output.data(report.to_json(), extract_text.render(report))
