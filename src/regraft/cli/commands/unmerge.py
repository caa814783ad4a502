"""``regraft unmerge``: the base back out of a merged model."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="Get the base back, byte for byte.")
@click.argument("merged", metavar="MERGED")
@options.folder_to_make("BASE")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="An adapter that was merged, if no copy was kept. Once for each, in their order.",
)
@options.max_memory
@options.threads
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace BASE, if it holds a model, once the new one is complete.",
)
@options.reflink
@options.digest_cache
@options.token
@options.as_json
@options.quiet
def command(*, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Take a merge back: give back the base that a model was merged from, without that base.

    MERGED is what `regraft merge` or `swap` wrote, with its regraft/ subfolder; a GGUF file is one
    with the folder MERGED.gguf.regraft beside it, and BASE.gguf is one file. The files of the base
    come back byte for byte, and each tensor is held against the digest that the receipt has
    of it. Weights, adapter or patch that were changed since are refused, tensor by tensor.

    \b
    Examples:
      regraft unmerge ./merged -o ./base
      regraft unmerge ./merged.gguf -o ./base.gguf
      regraft unmerge ./merged -o ./base --adapter ./style=0.5 --adapter ./facts
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft import undoing
    from regraft.cli.texts import unmerge as unmerge_text

    adapters = list(chosen.pop("adapters")) or None
    with output.progress() as progress:
        report = undoing.unmerge(**chosen, adapters=adapters, progress=progress)
    output.data(report.to_json(), unmerge_text.render(report, cap=chosen["max_memory"]))
