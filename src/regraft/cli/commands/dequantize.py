"""``regraft dequantize``: a quantized model as a plain one."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output
from regraft.cli.writing import write_model


@click.command(short_help="Write a quantized model as a plain one.")
@click.argument("base", metavar="MODEL")
@options.out
@options.dtype
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
    """Write a quantized model as a plain one, with the values that its codes stand for.

    They are those that the format's own library computes, byte for byte. To merge adapters on the
    way, name the quantized model as the base of `regraft merge`.

    \b
    Examples:
      regraft dequantize ./model-4bit -o ./model-16bit
      regraft dequantize org/model-fp8 -o ./model --dtype bfloat16 --shard-size 5GB
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft import converting

    write_model(output, converting.dequantize, chosen | {"command": options.command_line(ctx)})
