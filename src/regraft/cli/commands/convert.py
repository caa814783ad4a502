"""``regraft convert``: a model in another dtype, in other files, or as safetensors."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output
from regraft.cli.writing import write_model


@click.command(short_help="Write a model in another dtype, in other files, or as safetensors.")
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
    """Write a model in another dtype, in files of another size, or as safetensors.

    MODEL is a folder, a .safetensors or .bin file, or a Hub id such as org/name@revision; OUT holds
    safetensors. Tensors that keep their dtype keep their bytes. The config's dtype follows;
    tokenizer and other files go along. For a quantized model use `regraft dequantize`, and to merge
    adapters on the way `regraft merge`, which take the same options.

    \b
    Examples:
      regraft convert ./model -o ./model-bf16 --dtype bf16
      regraft convert org/model -o ./model --shard-size 2GB
      regraft convert ./model-with-bin-files -o ./model
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft import converting

    write_model(output, converting.convert, chosen | {"command": options.command_line(ctx)})
