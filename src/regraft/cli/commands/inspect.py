"""``regraft inspect``: what is this?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from regraft.cli import options
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.inspection import Inspection


@click.command(short_help="What is this? From headers alone.")
@click.argument("sources", metavar="PATH_OR_ID...", nargs=-1, required=True)
@options.token
@options.as_json
@options.quiet
def command(sources: tuple[str, ...], token: str | None, as_json: bool, quiet: bool) -> None:
    """Say what a checkpoint or an adapter is, from its headers and configs alone.

    For a base or merged model: architecture, parameters, dtypes, files, quantization, and what it
    was merged from. For an adapter: ranks, scale, adapted modules, the base it claims, and any
    feature that cannot be merged. With --json, one source gives one object and several give
    {"inspections": [...]}.

    \b
    Examples:
      regraft inspect ./my-adapter
      regraft inspect ./base ./adapter ./merged
      regraft inspect org/model@main --json
    """
    from regraft import inspection
    from regraft.cli.texts import inspection as inspection_text

    found = [inspection.inspect(source, token=token) for source in sources]
    text = "\n\n".join(map(inspection_text.render, found))
    Output(as_json=as_json, quiet=quiet).data(_payload(found), text)


def _payload(found: list[Inspection]) -> dict[str, object]:
    if len(found) == 1:
        return found[0].to_json()
    return {"inspections": [item.to_json() for item in found]}
