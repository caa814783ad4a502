"""``regraft verify``: is a merged model what it should be?"""

from __future__ import annotations

from typing import Any

import click

from regraft.cli import options
from regraft.cli.output import Output

UNJUDGED = 3
"""Exit code when nothing differs but something cannot be compared."""


@click.command(short_help="Is this the merge, bit for bit? Of any tool.")
@click.argument("merged", metavar="MERGED")
@click.option("--base", metavar="BASE", help="Do the merge again: the base it should be made from.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="Do the merge again: an adapter it should be made with. Once for each, in their order.",
)
@click.option(
    "--prompts",
    type=click.Path(),
    metavar="FILE",
    help="Compare answers to these prompts too, with base and adapters: one a line, or a .jsonl of "
    "chats. Needs regraft[torch].",
)
@click.option(
    "--receipt-only",
    is_flag=True,
    help="Compare with the receipt alone; do not look for the base and adapters that it names.",
)
@options.peft_version
@options.max_memory
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker threads.  [default: by the number of cores]",
)
@click.option("-v", "--verbose", is_flag=True, help="Every tensor on its own line.")
@options.token
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context, /, merged: str, base: str | None, adapters: tuple[str, ...],
    verbose: bool, as_json: bool, quiet: bool, **chosen: Any,
) -> None:  # fmt: skip
    """Say whether a merged model is what it should be.

    A model that regraft merged is held against its receipt, every bit of the files. The merge is
    also done again and compared tensor by tensor: the same, within rounding, or which tensors are
    not the merge and what they are instead. That needs the base and the adapters: those given, or
    those that the receipt names, if they are on this machine. What another tool merged needs --base
    and --adapter. With --prompts base and adapter, and the merged model, are run too, and their
    answers compared. Exits with 0 when it is the merge, 1 when something differs, and 3 when it
    cannot be judged.

    \b
    Examples:
      regraft verify ./merged
      regraft verify ./merged --receipt-only
      regraft verify ./merged --base org/model --adapter ./style=0.5 --adapter ./facts
      regraft verify ./merged --base org/model --adapter ./style --prompts ./prompts.txt
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    output.mute_repeated()
    from regraft.cli.texts import verify as verify_text
    from regraft.verifying.verify import verify

    with output.progress() as progress:
        report = verify(merged, base=base, adapters=list(adapters), progress=progress, **chosen)
    output.warn(report.warnings)
    output.data(report.to_json(), verify_text.render(report, verbose=verbose))
    if not report.ok:
        ctx.exit(UNJUDGED if report.verdict == "unjudged" else 1)
