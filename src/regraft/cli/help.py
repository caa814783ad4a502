"""``regraft help``: the help of a command, or of all of them."""

from __future__ import annotations

import click

from regraft.cli import options
from regraft.cli.output import Output


def _commands(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the commands that a word may become."""
    del param
    group = ctx.find_root().command
    names = group.list_commands(ctx) if isinstance(group, click.Group) else []
    return [name for name in names if name.startswith(incomplete)]


@click.command(short_help="Explain a command, or list all of them.")
@click.argument("name", metavar="[COMMAND]", required=False, shell_complete=_commands)
@options.as_json
@click.pass_context
def command(ctx: click.Context, /, name: str | None, as_json: bool) -> None:
    """Explain a command, with all its options and examples, as `regraft COMMAND --help` does.

    Without a COMMAND it lists all commands, in the order in which a newcomer needs them.

    \b
    Examples:
      regraft help
      regraft help merge
    """
    parent = ctx.find_root()
    text = parent.get_help()
    if name is not None and isinstance(parent.command, click.Group):
        known, chosen, _ = parent.command.resolve_command(parent, [name])
        if chosen is not None:
            text = chosen.get_help(click.Context(chosen, info_name=known, parent=parent))
    Output(as_json=as_json).data({"command": name, "help": text}, text)
