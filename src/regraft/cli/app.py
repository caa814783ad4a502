"""The ``regraft`` command group: loads a command when named, turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from regraft._version import __version__
from regraft.cli.failures import DEBUG_VARIABLE, UserInterruptError, explain
from regraft.cli.output import Output, ReaderGoneError, plain_warnings, standard_streams

READER_GONE = 141
"""Exit code when nobody reads stdout any more: as when SIGPIPE ends a program."""

COMMANDS = {
    "merge": "regraft.cli.commands.merge",
    "unmerge": "regraft.cli.commands.unmerge",
    "swap": "regraft.cli.commands.swap",
    "convert": "regraft.cli.commands.convert",
    "dequantize": "regraft.cli.commands.dequantize",
    "quantize": "regraft.cli.commands.quantize",
    "verify": "regraft.cli.commands.verify",
    "check": "regraft.cli.commands.check",
    "probe": "regraft.cli.commands.engines.probe",
    "inspect": "regraft.cli.commands.inspect",
    "diff": "regraft.cli.commands.diff",
    "shrink": "regraft.cli.commands.shrink",
    "combine": "regraft.cli.commands.combine",
    "extract": "regraft.cli.commands.extract",
    "export": "regraft.cli.commands.engines.export",
    "digest": "regraft.cli.commands.digest",
    "generate": "regraft.cli.commands.live.generate",
    "chat": "regraft.cli.commands.live.chat",
    "clean": "regraft.cli.commands.clean",
    "demo": "regraft.cli.commands.demo",
    "completion": "regraft.cli.completion",
    "help": "regraft.cli.help",
}
"""Every command, in the order of --help, and the module that has it as ``command``."""


OTHER_WORDS = {
    "undo": "unmerge", "revert": "unmerge", "restore": "unmerge", "info": "inspect",
    "show": "inspect", "hash": "digest", "compare": "diff", "run": "generate",
    "replace": "swap", "prune": "shrink", "mix": "combine",
}  # fmt: skip
"""What people call a command, and its name."""


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order a newcomer needs them."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None when there is none of that name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}' ({_suggestion(args[0])})")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt passes click as an error of our own."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise UserInterruptError from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Parse, run, explain any error, and exit."""
        del standalone_mode
        arguments = list(sys.argv[1:] if args is None else args)
        standard_streams()
        try:
            with plain_warnings():
                code = super().main(
                    arguments, prog_name, complete_var, standalone_mode=False, **extra
                )
        except ReaderGoneError:
            code = READER_GONE
        except Exception as error:
            code = _fail(error, as_json=_wants_json(arguments))
        sys.exit(code or 0)


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    if name in OTHER_WORDS:
        return f"did you mean '{OTHER_WORDS[name]}'?"
    near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(COMMANDS)}"


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether ``--json`` was asked for, known even when the arguments do not parse."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def _fail(error: Exception, *, as_json: bool) -> int:
    """Print what went wrong and return the exit code."""
    failure = explain(error)
    try:
        if os.environ.get(DEBUG_VARIABLE):
            Output(as_json=as_json).traceback(error)
        Output(as_json=as_json).failure(failure)
    except ReaderGoneError:
        return READER_GONE
    return failure.exit_code


@click.group(
    "regraft",
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
    epilog="Exit codes: 0 done, 1 a check says no, 2 usage, 3 an input is bad or refused, "
    "4 the environment fell short, 130 interrupted. REGRAFT_DEBUG=1 shows tracebacks.",
)
@click.version_option(__version__, "-V", "--version", message="regraft %(version)s")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Merge LoRA adapters into checkpoints, prove that it is right, and take it back bit for bit.

    \b
    Examples:
      regraft demo
      regraft inspect ./my-adapter
      regraft merge org/base-model ./my-adapter -o ./merged
      regraft verify ./merged
      regraft unmerge ./merged -o ./base-again

    `regraft help COMMAND` explains a command, with examples.
    """
    if ctx.invoked_subcommand is None:
        Output().data({}, ctx.get_help())
