"""``regraft probe``: does the adapter of a running server act?"""

from __future__ import annotations

import os
from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output

KINDS = ("vllm", "sglang", "llama.cpp", "mlx")
"""Servers that are known by name; the table itself is in :mod:`regraft.probing.kinds`."""

EXIT_CODES = {
    "acts": 0,
    "acts as the base": 1,
    "otherwise than expected": 1,
    "cannot be judged": 3,
}
"""What the process returns, by what was found."""

KEY_VARIABLE = "OPENAI_API_KEY"


@click.command(short_help="Ask a running server whether its adapter acts.")
@click.argument("url", metavar="URL")
@click.option("--adapter", required=True, metavar="NAME", help="The server's name of the adapter.")
@click.option(
    "--base",
    metavar="NAME",
    help="The server's name of the base.  [default: the first model that is not the adapter]",
)
@click.option(
    "--for",
    "engine",
    type=click.Choice(list(KINDS)),
    help="The kind of server.  [default: what it says itself]",
)
@click.option(
    "--prompts",
    type=click.Path(),
    metavar="FILE",
    help="Prompts to ask, as for verify.  [default: three at hand]",
)
@click.option(
    "--expect",
    multiple=True,
    metavar="MODEL",
    help="What it is to answer as: a merged model; or, given twice, a base and an adapter.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=16,
    metavar="N",
    help="Tokens of each answer.  [default: 16]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.1,
    metavar="X",
    help="Largest difference of a log-probability from what is expected; twice that of the "
    "server's base, where that is more.  [default: 0.1]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    metavar="SECONDS",
    help="How long to wait for each answer.  [default: 60]",
)
@options.as_json
@click.pass_context
def command(
    ctx: click.Context, /, url: str, expect: tuple[str, ...], as_json: bool, **chosen: Any
) -> None:
    """Ask a server that speaks OpenAI's API whether an adapter acts.

    The server may be vLLM, SGLang, llama.cpp's or mlx_lm.server. It is asked the same prompts
    with and without the adapter; with --expect, its log-probabilities are held against what regraft
    computes of the files, too. An adapter is named as the server does: a model's name (vLLM,
    SGLang), the number or file of llama.cpp's, for mlx_lm.server the folder, or default_model for
    what it was started with. Exits with 0 when the adapter acts, and as expected; 1 when it
    answers as the base, or otherwise than expected; 3 when this cannot be judged. A key is taken
    from OPENAI_API_KEY.

    \b
    Examples:
      regraft probe http://localhost:8000 --adapter sql
      regraft probe http://localhost:8000 --adapter sql --expect ./base --expect ./sql
      regraft probe http://localhost:8080 --adapter 0
      regraft probe http://localhost:8080 --adapter ./adapter-mlx
    """
    from regraft.cli.texts import probe as text
    from regraft.probing.verb import probe

    output = Output(as_json=as_json)
    key = os.environ.get(KEY_VARIABLE)
    report = probe(url, expect=expect or None, key=key, **chosen)
    output.data(report.to_json(), text.render(report))
    ctx.exit(EXIT_CODES[report.verdict])
