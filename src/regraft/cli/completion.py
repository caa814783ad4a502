"""``regraft completion``: the script that teaches a shell to complete regraft's commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from regraft.cli import options
from regraft.cli.output import Output

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_REGRAFT_COMPLETE"


@click.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(SHELLS))
@options.as_json
def command(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell.

    Save it where the shell looks for such scripts, or load it from the shell's start-up file, and
    open a new shell: Tab then completes commands, options and their values.

    \b
    Examples:
      regraft completion bash > ~/.local/share/bash-completion/completions/regraft
      regraft completion zsh > ~/.zfunc/_regraft     (with fpath+=~/.zfunc before compinit)
      regraft completion fish > ~/.config/fish/completions/regraft.fish
    """
    script = _script(shell)
    Output(as_json=as_json).data({"shell": shell, "script": script}, script)


def _script(shell: str) -> str:
    """Return click's own script; its template is filled here, as `source` also starts a bash."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click has no completion for {shell}")
    complete = kind(click.Group(), {}, "regraft", VARIABLE)
    return complete.source_template % complete.source_vars()
