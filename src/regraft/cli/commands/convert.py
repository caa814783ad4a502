"""``regraft convert``: an adapter in another dialect, a model in another dtype or other files."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output
from regraft.cli.writing import tell_receipt


@click.command(short_help="Write an adapter in another dialect, or a model in another dtype.")
@click.argument("source", metavar="ADAPTER|MODEL")
@options.out
@click.option(
    "--to",
    metavar="DIALECT",
    help="Of an adapter: what to write it in, such as mlx, gguf, kohya or diffusers.  "
    "[default: peft]",
)
@click.option(
    "--from",
    "dialect",
    metavar="DIALECT",
    help="Of an adapter: what it is written in.  [default: what its files show]",
)
@click.option(
    "--base",
    metavar="BASE",
    help="Of an adapter: the model it is for. Some dialects cannot be read or written without.",
)
@click.option(
    "--uniform",
    is_flag=True,
    help="Of an adapter: multiply every scale into B and give all modules one rank, for engines "
    "that read no patterns and no rsLoRA (vLLM, llama.cpp).",
)
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
    """Write an adapter as another program reads it; or a model in another dtype, or in other files.

    ADAPTER is a folder, a file or a Hub id, in any dialect that is read: PEFT's, MLX's, llama.cpp's
    GGUF, kohya's, diffusers' and more; `regraft inspect` says which. OUT holds it in the dialect
    that --to names. Every value stays, to the last bit, but where scales have to be multiplied into
    B (--uniform, and dialects with one scale for all modules). What the dialect cannot say is
    refused by name, and nothing is written.

    MODEL is a folder, a .safetensors or .bin file, or a Hub id such as org/name@revision; OUT holds
    safetensors. Tensors that keep their dtype keep their bytes. The config's dtype follows;
    tokenizer and other files go along. --dtype, --shard-size, --max-memory, --threads, --reflink
    and --digest-cache are for models. For a quantized model use `regraft dequantize`.

    \b
    Examples:
      regraft convert ./adapter -o ./adapter-mlx --to mlx
      regraft convert ./adapter -o ./adapter-gguf --to gguf --base ./base
      regraft convert ./adapter-mlx -o ./adapter-peft
      regraft convert ./style.safetensors -o ./style-diffusers --to diffusers --base ./sd/unet
      regraft convert ./adapter -o ./adapter-vllm --uniform
      regraft convert ./model -o ./model-bf16 --dtype bf16
      regraft convert org/model -o ./model --shard-size 2GB
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft import converting

    with output.progress() as progress:
        done = converting.convert(**chosen, command=options.command_line(ctx), progress=progress)
    from regraft.translating import AdapterConversion

    if isinstance(done, AdapterConversion):
        from regraft.cli.texts import convert as convert_text

        output.data(done.to_json(), convert_text.render(done))
    else:
        tell_receipt(output, done, chosen["max_memory"])
