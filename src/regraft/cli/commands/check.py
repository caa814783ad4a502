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
@options.merging_method
@options.peft_version
@options.max_memory
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    help="Say what an engine would leave out, refuse or apply otherwise: vllm, sglang, llama.cpp, "
    "ollama, mlx, peft or diffusers; with a version, vllm==0.32.0.",
)
@click.option(
    "--engine-option",
    "engine_options",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="An option that the engine's server is started with, such as max_lora_rank=64. May be "
    "given several times.",
)
@options.token
@options.as_json
@options.quiet
@click.pass_context
def command(
    ctx: click.Context,
    /,
    base: str | None,
    adapters: tuple[str, ...],
    engine: str | None,
    engine_options: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Say whether adapters would merge into a base, and if not, everything that stands in the way.

    Only headers and configs are read, so this takes under a second for a sharded 70B model; of an
    adapter that regraft saved, a few values of the base tell whether it is the right one. Exits
    with 0 when it would merge, 1 when it would not, and 3 when a file cannot even be opened.

    With --for, it says too what an engine would do with the adapter: each part that it would leave
    out, refuse, or apply with another scale, and the way out. Exits with 1 if there is any.

    \b
    Examples:
      regraft check ./base ./adapter
      regraft check org/model ./adapter=0.5 ./other --json
      regraft check ./base ./adapter --for vllm --engine-option max_lora_rank=64
    """
    from regraft.engines.checking import check

    output = Output(as_json=as_json, quiet=quiet)
    output.mute_repeated()
    found, adapters = options.base_named(output, base, adapters, chosen["token"])
    given = dict(option.partition("=")[::2] for option in engine_options)
    report = check(found, list(adapters), engine=engine, engine_options=given, **chosen)
    output.warn(report.warnings)
    output.data(report.to_json(), _render(report))
    ctx.exit(0 if report.ok else 1)


def _render(report: CheckReport) -> str:
    from regraft.cli.text import plural
    from regraft.cli.texts import engines

    if report.problems:
        lines = [f"no: {plural(len(report.problems), 'problem')}"]
        lines += [f"  - {problem}" for problem in report.problems]
    else:
        lines = ["ok: it would merge" + _counts(report.summary)]
    if report.engine is not None:
        lines += ["", engines.render(report.engine)]
    return "\n".join(lines)


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
