"""``regraft check``: would it merge?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.merging.planning.report import CheckReport


@click.command(short_help="Would it merge? All problems at once.")
@options.base_and_adapters
@options.dtype
@options.quantize
@options.peft_version
@options.max_memory
@options.token
@options.as_json
@click.pass_context
def command(
    ctx: click.Context, /, base: str | None, adapters: tuple[str, ...], as_json: bool, **chosen: Any
) -> None:
    """Say whether adapters would merge into a base, and if not, everything that stands in the way.

    Only headers and configs are read, so this takes under a second for a sharded 70B model; of an
    adapter that regraft saved, a few values of the base tell whether it is the right one. Exits
    with 0 when it would merge, 1 when it would not, and 3 when a file cannot even be opened.

    \b
    Examples:
      regraft check ./base ./adapter
      regraft check org/model ./adapter=0.5 ./other --json
    """
    from regraft import api

    output = Output(as_json=as_json)
    output.mute_repeated()
    found, adapters = options.base_named(output, base, adapters, chosen["token"])
    report = api.check(found, list(adapters), **chosen)
    output.warn(report.warnings)
    output.data(report.to_json(), _render(report))
    ctx.exit(0 if report.ok else 1)


def _render(report: CheckReport) -> str:
    from regraft.cli.text import plural

    if report.ok:
        return "ok: it would merge" + _counts(report.summary)
    lines = [f"no: {plural(len(report.problems), 'problem')}"]
    return "\n".join(lines + [f"  - {problem}" for problem in report.problems])


def _counts(summary: dict[str, Any]) -> str:
    """Return the plan's counts, to stand below the answer."""
    from regraft.cli.text import memory, pairs, size
    from regraft.cli.texts.receipt import actions

    rows = [
        ("  tensors", actions(summary)),
        ("  size", size(summary["bytes_written"])),
        ("  memory", f"{memory(summary['memory'])} at most"),
    ]
    return "\n" + pairs(rows)
