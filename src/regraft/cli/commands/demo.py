"""``regraft demo``: train two adapters, switch between them, merge one, and take it out."""

from __future__ import annotations

from pathlib import Path

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="See it work on a real model, in minutes.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("regraft-demo"),
    show_default=True,
    help="Where to keep what the demo makes, so that a second run is quick.",
)
@click.option("--fresh", is_flag=True, help="Start over: train again, merge again.")
@click.option("--hub-id", metavar="ID", help="Take the base from the Hugging Face Hub instead.")
@options.as_json
def command(folder: Path, fresh: bool, hub_id: str | None, as_json: bool) -> None:
    """Train two adapters on a real 135M language model, switch between them, and merge one.

    The base fails at the task; each adapter answers it in a form of its own, on one base in memory,
    also in 4 bits. Merged, in memory and on files, one of them answers the same, and every bit of
    the base comes back. Needs pip install 'regraft[demo]'; takes under three minutes on two cores
    the first time, and about one the second.

    \b
    Examples:
      regraft demo
      regraft demo --dir /tmp/demo --fresh
      regraft demo --hub-id HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from regraft.demo import run_demo

    output = Output(as_json=as_json)
    result = run_demo(
        folder,
        fresh=fresh,
        hub_id=hub_id,
        as_json=as_json,
        say=output.tell,
        progress=output.training_progress(),
    )
    if as_json:
        output.data(result.to_json(), "")
