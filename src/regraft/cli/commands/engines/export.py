"""``regraft export``: a model as another program reads it."""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="Write a model for another program: GGUF, Ollama, MLX.")
@click.argument("model", metavar="MODEL")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="OUT",
    required=True,
    help="File (OUT.gguf) or folder to make. It appears whole or not at all.",
)
@click.option(
    "--for",
    "engine",
    type=click.Choice(["gguf", "llama.cpp", "ollama", "mlx"]),
    default="gguf",
    show_default=True,
    help="Program to write it for; gguf and llama.cpp are the same.",
)
@click.option(
    "--type",
    metavar="TYPE",
    help="Type of the matrices in GGUF: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.  "
    "[default: the dtype that most values have]",
)
@click.option(
    "--like",
    metavar="BASE.gguf",
    help="GGUF file of the same model, whose tokenizer is taken instead of the folder's.",
)
@options.max_memory
@options.reflink
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace OUT, if it holds the like, once the new one is complete.",
)
@options.token
@options.as_json
@options.quiet
def command(*, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Write a model as another program reads it.

    MODEL is a folder in the layout of transformers, such as a merged model, or a Hub id. GGUF,
    which llama.cpp reads, is one file with weights, hyperparameters and tokenizer; of a quantized
    model, with what its codes stand for. What llama.cpp would compute otherwise, and tokenizers
    that it would not follow, are refused by name. For ollama OUT is a folder with such a file and a
    Modelfile. For mlx the weights stay as they are, and the config gets the keys that mlx-lm looks
    for.

    \b
    Examples:
      regraft export ./merged -o merged.gguf
      regraft export ./merged -o merged.gguf --type q8_0
      regraft export ./merged -o merged.gguf --like base.gguf
      regraft export ./merged -o ./merged-ollama --for ollama --type q8_0
      regraft export ./merged -o ./merged-mlx --for mlx
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft.cli.texts import export as export_text
    from regraft.exporting.verb import export

    with output.progress() as progress:
        report = export(**chosen, progress=progress)
    output.warn(report.notes)
    output.data(report.to_json(), export_text.render(report))
