"""The only module that prints: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from regraft.cli.text import plural, printable
from regraft.errors import AccessError, redacted
from regraft.formats.files.text import spelled

if TYPE_CHECKING:
    from regraft.cli.failures import Failure
    from regraft.demo.progress import Progress as StepProgress
    from regraft.progress import Progress, ProgressEvent


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show what ``warnings.warn`` says as the command line's other warnings, without its source."""
    before = warnings.showwarning

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        Output().warn([str(message)])

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


class ReaderGoneError(Exception):
    """Whoever read our output closed the pipe, as ``| head`` does."""


class Output:
    """Where a command writes.

    Args:
        as_json: print data as one JSON object.
        quiet: no progress bar and no text summary; errors and warnings stay.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def data(self, payload: Mapping[str, Any], text: str, *, secrets: bool = False) -> None:
        """Print a command's answer on stdout: ``payload`` as JSON, or ``text``.

        Args:
            payload: what it found.
            text: the same for people.
            secrets: whether what looks like one is no secret of the user's, as in a model's answer.
        """
        hide = (lambda words: words) if secrets else redacted
        if self.as_json:
            _write(sys.stdout, json.dumps(_plain(payload, hide), indent=2))
        elif not self.quiet:
            _write(sys.stdout, hide(text))

    def tell(self, text: str) -> None:
        """Print a piece of a story on stdout, as it happens; nothing in JSON mode."""
        if not self.as_json:
            _write(sys.stdout, text)

    def stream(self, piece: str) -> None:
        """Print a piece of a line on stdout at once; nothing in JSON mode."""
        if not self.as_json:
            _write(sys.stdout, piece, end="", keep="\n\t")

    def line(self, payload: Mapping[str, Any]) -> None:
        """Print an object as one line of JSON on stdout; nothing but in JSON mode."""
        if self.as_json:
            _write(sys.stdout, json.dumps(_plain(payload, lambda words: words)))

    def note(self, text: str) -> None:
        """Print a line of a conversation with the user on stderr; nothing if quiet."""
        if not self.quiet:
            _write(sys.stderr, text)

    def ask(self, prompt: str) -> None:
        """Print a prompt on stderr, and leave the cursor behind it; nothing if quiet."""
        if not self.quiet:
            _write(sys.stderr, prompt, end="")

    def warn(self, sentences: Sequence[str]) -> None:
        """Print warnings on stderr, quiet or not."""
        for warning in sentences:
            _write(sys.stderr, warning, label="warning", colour="yellow")

    def failure(self, failure: Failure) -> None:
        """Print an error: readable lines on stderr, and the object on stdout in JSON mode."""
        if self.as_json:
            _write(sys.stdout, json.dumps(failure.to_json(), indent=2))
        if failure.usage:
            _write(sys.stderr, failure.usage)
        _write(sys.stderr, _problems(failure), label=failure.label, colour="red")
        for note in failure.notes:
            _write(sys.stderr, note, label="note", colour="cyan")

    def traceback(self, error: BaseException) -> None:
        """Print the traceback of ``error`` on stderr."""
        import traceback

        _write(sys.stderr, "".join(traceback.format_exception(error)).rstrip())

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """Give a progress callback that draws a bar, or None away from a terminal."""
        if self.quiet or not _is_terminal(sys.stderr):
            yield None
            return
        from regraft.numerics.listeners import while_compiling

        bar = _Bar()
        try:
            with while_compiling(bar.compiling):
                yield bar
        finally:
            bar.close()

    def training_progress(self) -> StepProgress:
        """Give what makes bars that count steps, silent ones away from a terminal."""
        from regraft.demo.progress import on_terminal

        return on_terminal(sys.stderr)

    def mute_repeated(self) -> None:
        """Keep Python from printing the warnings that a report holds, too."""
        from regraft.errors import BaseMismatchWarning

        warnings.simplefilter("ignore", BaseMismatchWarning)

    def mute_downloads(self) -> None:
        """Keep huggingface_hub from drawing its own bars; call before it is imported."""
        if self.quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


_STAGES = {
    "read": "reading headers",
    "resume": "checking earlier work",
    "merge": "merging",
    "unmerge": "un-merging",
    "compare": "comparing",
    "digest": "hashing",
    "verify": "verifying",
    "prompts": "comparing answers",
    "shrink": "shrinking",
    "combine": "combining",
    "extract": "extracting",
    "export": "exporting",
    "finish": "writing to disk",
}


class _Bar:
    """A tqdm bar in bytes, fed by :class:`~regraft.progress.ProgressEvent`."""

    def __init__(self) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0
        self._bar = tqdm(
            unit="B",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __call__(self, event: ProgressEvent) -> None:
        bar = self._bar
        stage = _STAGES.get(event.stage, event.stage)
        if bar.desc != f"{stage}: ":
            bar.set_description(stage, refresh=False)
        bar.total = event.total or None
        bar.update(event.done - bar.n)

    def compiling(self) -> None:
        """Say why nothing moves; the next event says what is done then."""
        self._bar.set_description("compiling for this processor, once")

    def close(self) -> None:
        self._bar.close()


def _problems(failure: Failure) -> str:
    """Return all problems: one on the line itself, several as a list under their number."""
    lines = [str(problem) for problem in failure.problems]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([plural(len(lines), "problem"), *(f"  - {line}" for line in lines)])


def _write(
    stream: TextIO,
    text: str,
    *,
    label: str = "",
    colour: str = "",
    end: str = "\n",
    keep: str = "\n",
) -> None:
    """Write ``text`` and ``end``, with a coloured label before it on a terminal."""
    prefix = f"{label}: " if label else ""
    if label and _has_colour(stream):
        prefix = click.style(prefix, fg=colour, bold=True)
    if stream is sys.stderr:
        text = redacted(text)
    try:
        stream.write(_encodable(prefix + printable(text, keep) + end, stream))
        stream.flush()
    except BrokenPipeError as error:
        _abandon(stream)
        raise ReaderGoneError from error
    except OSError as error:
        _abandon(stream)
        if stream is sys.stdout:
            raise _unwritable(error) from error


def _encodable(text: str, stream: TextIO) -> str:
    """Return a text with all that a stream's encoding does not have spelled out."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _unwritable(error: OSError) -> AccessError:
    return AccessError(
        "what was found cannot be printed", where="standard output", found=error.strerror or "",
        hint="An output that was made is whole, and in place",
    )  # fmt: skip


def standard_streams() -> None:
    """Open what is closed of stdin, stdout and stderr, onto nothing.

    Else the next file that is opened, a weights file say, would get what is printed.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _abandon(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush succeeds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def _has_colour(stream: TextIO) -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return _is_terminal(stream) and not plain


def _plain(value: Any, hide: Callable[[str], str] = redacted) -> Any:
    """Return ``value`` as JSON can hold it: no NaN or infinity, no paths, tuples or surrogates."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, hide) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, hide) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (int, bool)) else hide(spelled(str(value)))
