"""``regraft clean``: away with what interrupted work has left."""

from __future__ import annotations

import click

from regraft.cli import options
from regraft.cli.output import Output


@click.command(short_help="Remove what interrupted work has left.")
@click.argument("folders", metavar="[FOLDER_OR_OUT]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@options.as_json
def command(folders: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Remove the work that interrupted merges, swaps and un-merges have left beside their outputs.

    It lies in hidden folders named .OUT.regraft, from which the same command would go on. They are
    looked for in each FOLDER (not in those below it) or beside each OUT; by default in the current
    folder. Work that is going on is left alone, and
    so is that of other users.

    \b
    Examples:
      regraft clean
      regraft clean ./models --dry-run
      regraft clean ./merged
    """
    from regraft import undoing
    from regraft.cli.texts import clean as clean_text

    found = undoing.clean(list(folders) or ".", dry_run=dry_run)
    payload = clean_text.payload(found, dry_run=dry_run)
    Output(as_json=as_json).data(payload, clean_text.render(found, dry_run=dry_run))
