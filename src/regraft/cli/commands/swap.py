"""``regraft swap``: other adapters in the place of those that were merged."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output
from regraft.cli.writing import write_model


@click.command(short_help="Take the merged adapters out and merge others, in one pass.")
@click.argument("merged", metavar="MERGED")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@options.out
@click.option(
    "--merged-adapter",
    "merged_adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="An adapter that was merged, if no copy was kept. Once for each, in their order.",
)
@options.dtype_or_blocks
@options.shard_size
@options.max_memory
@options.threads
@options.overwrite
@options.reflink
@options.digest_cache
@options.quantize
@options.rounding
@options.seed
@options.double_quant
@options.merging_method
@options.density
@options.peft_version
@options.undo
@options.keep_adapter
@options.token
@options.as_json
@options.quiet
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Take a merge back and merge other adapters, in one pass and without the base.

    MERGED is what `regraft merge` or `swap` wrote, with its regraft/ subfolder, or a GGUF file with
    the folder MERGED.gguf.regraft beside it, whose OUT may be a GGUF file too. The ADAPTERs take
    the place of all that were merged. OUT is byte for byte what merging them into the base makes,
    and its receipt names that base. By default its dtype and files are the base's, whatever those
    of MERGED are.

    \b
    Examples:
      regraft swap ./merged ./adapter-v2 -o ./merged-v2
      regraft swap ./merged ./style=0.3 ./facts -o ./both
      regraft swap ./merged.gguf ./adapter-v2 -o ./merged-v2.gguf
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    output.mute_repeated()
    from regraft import undoing

    adapters, merged_adapters = (list(chosen[name]) for name in ("adapters", "merged_adapters"))
    chosen |= {"adapters": adapters, "merged_adapters": merged_adapters or None}
    command_line = options.command_line(ctx)
    write_model(output, undoing.swap, chosen | {"command": command_line}, deltas=True)
