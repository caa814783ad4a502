"""``regraft dequantize``: a quantized model as a plain one."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="Write a quantized model as a plain one.")
@click.argument("base", metavar="MODEL")
@options.out
@options.dtype
@options.shard_size
@options.max_memory
@options.threads
@options.overwrite
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
    from regraft.cli.texts import receipt as receipt_text

    with output.progress() as progress:
        receipt = converting.dequantize(
            **chosen, progress=progress, command=options.command_line(ctx)
        )
    output.warn(receipt.warnings)
    output.data(receipt.to_json(), receipt_text.render(receipt, cap=chosen["max_memory"]))
