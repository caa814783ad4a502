"""``regraft quantize``: a model with its linear layers quantized."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output
from regraft.cli.writing import write_model

FORMATS = ("nf4", "fp4", "int8", "fp8")


@click.command(short_help="Write a model with its linear layers quantized.")
@click.argument("base", metavar="MODEL")
@options.out
@click.option(
    "--to",
    type=click.Choice(FORMATS),
    required=True,
    help="The format: bitsandbytes' nf4, fp4 or int8, or fp8 in blocks of 128x128.",
)
@options.double_quant
@options.rounding
@options.seed
@options.shard_size
@options.max_memory
@options.threads
@options.overwrite
@options.reflink
@options.digest_cache
@options.token
@options.as_json
@options.quiet
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write a model with its linear layers quantized, as transformers does when it loads one.

    OUT loads with from_pretrained, with no more memory than its own size. Codes and scales of nf4
    and fp4 are those of bitsandbytes, byte for byte. Embeddings and the output head stay plain. To
    merge adapters on the way, use `regraft merge --quantize`.

    \b
    Examples:
      regraft quantize ./model -o ./model-4bit --to nf4
      regraft quantize org/model -o ./model-4bit --to nf4 --double-quant
      regraft quantize ./model -o ./model-fp8 --to fp8
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft import converting

    write_model(output, converting.quantize, chosen | {"command": options.command_line(ctx)})
