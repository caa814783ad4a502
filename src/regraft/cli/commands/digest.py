"""``regraft digest``: the digests of a model's tensors, kept for later work."""

from __future__ import annotations

import click

from regraft.cli import options
from regraft.cli.output import Output

NOT_KEPT = (
    "the digests were not kept: there is no folder for them (REGRAFT_CACHE), it cannot be written "
    "to, a file was changed in the last minute, or lies where times are not believed (as in memory)"
)


@click.command(short_help="Hash a model's tensors once, for all later work.")
@click.argument("base", metavar="MODEL")
@options.threads
@options.token
@options.as_json
@options.quiet
def command(base: str, threads: int | None, token: str | None, as_json: bool, quiet: bool) -> None:
    """Take the blake3 of every tensor of a model, and keep them.

    A receipt has the digest of everything that was read. Of files that are as they were (by device,
    inode, size and the times of their last changes) merge, unmerge, swap, convert, quantize and
    dequantize with --digest-cache take it from here, and from each other. The lists lie in
    ~/.cache/regraft, or where the variable REGRAFT_CACHE says; they may be removed at any time.

    \b
    Examples:
      regraft digest ./base
      regraft digest org/model@main --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    output.mute_downloads()
    from regraft import digesting
    from regraft.cli.text import pairs, plural, size

    with output.progress() as progress:
        report = digesting.digest(base, threads=threads, token=token, progress=progress)
    if not report.kept:
        output.warn([NOT_KEPT])
    known = f"; {report.known} digests were known" if report.known else ""
    kept = "for work with --digest-cache" if report.kept else "no"
    rows = [
        ("model", report.source),
        ("tensors", f"{plural(len(report.tensors), 'tensor')}, {size(report.nbytes)}{known}"),
        ("kept", kept),
        ("time", f"{report.seconds:.1f} s"),
    ]
    output.data(report.to_json(), pairs(rows))
