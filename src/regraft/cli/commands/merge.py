"""``regraft merge``: the main job, as a thin layer over :func:`regraft.merge`."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output
from regraft.cli.writing import write_model


@click.command(short_help="Merge adapters into a base checkpoint.")
@options.base_and_adapters
@options.folder_to_make(required=False)
@options.dtype_or_blocks
@options.shard_size
@options.quantize
@options.rounding
@options.seed
@options.double_quant
@click.option(
    "--trained-on",
    metavar="BASE",
    help="The base that the adapters were trained on, if another one (say, the 4-bit version of "
    "this one): report, per tensor, how far the two are apart against the delta.",
)
@options.merging_method
@options.density
@options.peft_version
@options.max_memory
@options.threads
@options.overwrite
@options.reflink
@options.digest_cache
@options.undo
@options.keep_adapter
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@click.option("-v", "--verbose", is_flag=True, help="With --dry-run: every tensor on its own line.")
@options.token
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context, /, dry_run: bool, verbose: bool, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Merge LoRA adapters into a base checkpoint.

    BASE is a folder, a .safetensors, .bin or .gguf file, or a Hub id such as org/name@revision; an
    ADAPTER is the same, in PEFT's format, and =WEIGHT multiplies its scale. Several adapters add
    up in float32 before the one rounding. OUT loads with transformers and without PEFT. It carries
    a receipt of what was done to each tensor, and what `regraft unmerge` needs to take it back. A
    merge that was interrupted goes on where it was when the same command is given again.

    A quantized BASE (bitsandbytes, GPTQ, AWQ, FP8, ...) is dequantized on the way: OUT holds plain
    weights. With --quantize keep OUT stays in the base's format, with the base's scales, and still
    has the adapter: its weights are rounded so that on average nothing of it is lost. The summary
    says how much survived.

    With -o OUT.gguf a BASE.gguf stays one GGUF file: its metadata, tokenizer and types are kept,
    and so are the scales of its blocks, as with --quantize keep. Receipt and undo lie in the folder
    OUT.gguf.regraft beside it.

    \b
    Examples:
      regraft merge ./base ./adapter -o ./merged
      regraft merge org/model@main ./adapter=0.5 -o ./half --dtype bfloat16
      regraft merge ./base ./style ./facts=0.8 -o ./both --shard-size 5GB
      regraft merge ./base ./adapter -o ./final --no-undo
      regraft merge ./base-4bit ./adapter -o ./merged-16bit
      regraft merge ./base-4bit ./adapter -o ./merged-4bit --quantize keep
      regraft merge ./base.gguf ./adapter -o ./merged.gguf
      regraft merge ./base ./adapter -o ./merged --trained-on ./base-4bit
      regraft merge ./base ./adapter --dry-run
      regraft merge ./adapter -o ./merged    (the base that the adapter names)
    """
    if dry_run:
        _dry_run(Output(as_json=as_json), verbose, chosen)
        return
    if not chosen["out"] and chosen["base"] is not None:
        raise click.UsageError("Missing option '-o' / '--out': the folder to make.")
    _merge(Output(as_json=as_json, quiet=quiet), options.command_line(ctx), chosen)


def _dry_run(output: Output, verbose: bool, chosen: dict[str, Any]) -> None:
    from regraft import api
    from regraft.cli.texts import plan as plan_text

    output.mute_repeated()
    unplanned = ("keep_adapter", "trained_on", "digest_cache")
    asked = {name: value for name, value in chosen.items() if name not in unplanned}
    plan = api.plan(**_arguments(output, asked)).to_json()
    output.warn(plan["warnings"])
    output.data(plan, plan_text.render(plan, verbose=verbose))


def _merge(output: Output, command_line: str, chosen: dict[str, Any]) -> None:
    output.mute_downloads()
    output.mute_repeated()
    from regraft import api

    arguments = _arguments(output, chosen) | {"command": command_line}
    write_model(output, api.merge, arguments, deltas=True)


def _arguments(output: Output, chosen: dict[str, Any]) -> dict[str, Any]:
    base, adapters = options.base_named(output, chosen["base"], chosen["adapters"], chosen["token"])
    return chosen | {"base": base, "adapters": list(adapters)}
