"""``regraft chat``: talk to a model, and switch its adapters meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options, speaking
from regraft.cli.failures import explain
from regraft.cli.output import Output
from regraft.errors import RegraftError, UsageError

if TYPE_CHECKING:
    from regraft.runtime.generating import Sampling, Speaker

PROMPT = "> "


@click.command(short_help="Talk to a model, and switch its adapters meanwhile.")
@options.adapters_to_attach("Of several the first one answers, until you say otherwise.")
@speaking.model_and_sampling
@options.as_json
@options.quiet
def command(
    base: str, adapters: tuple[str, ...], as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Talk to a model, and switch, mix and load adapters meanwhile.

    BASE and the options are those of `regraft generate`, but that of several adapters the first one
    answers, until /adapter says otherwise. What you type is answered line by line;
    a line that begins with / is a command, and /help lists these. Ctrl-C stops an answer, Ctrl-D
    ends. Answers are printed on stdout and all else on stderr, so a chat can be piped; with --json
    each answer is an object on a line of its own.

    \b
    Examples:
      regraft chat ./base --adapter ./sql --adapter ./json
      regraft chat ./adapter --load-in-4bit
      regraft chat ./merged --system "Answer briefly." --temperature 0.7
      printf '/adapter sql\\nHello\\n' | regraft chat ./base --adapter ./sql --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    how = speaking.sampling(chosen)
    speaker = speaking.opened(output, base, adapters, chosen, together=False)
    Chat(speaker, how, output, chosen).run()


class Chat:
    """A conversation: what was said, and with which adapters it goes on."""

    def __init__(
        self, speaker: Speaker, how: Sampling, output: Output, chosen: dict[str, Any]
    ) -> None:
        self.speaker, self.how, self.output = speaker, how, output
        self.system: str = chosen["system"] or ""
        self.template: bool = chosen["template"]
        self.token: str | None = chosen["token"]
        self.messages: list[dict[str, str]] = []
        self.ended = False

    def run(self) -> None:
        """Answer line by line until there are no more, or the user quits."""
        self.output.note(f"{self.tell_active()}. {self.tell_others()}/help lists the commands, "
                         "/quit ends.")  # fmt: skip
        while not self.ended:
            try:
                self.output.ask(PROMPT)
                line = sys.stdin.readline()
                if not line:
                    break
                self.take(line.strip())
            except KeyboardInterrupt:
                self.output.note("\n/quit or Ctrl-D ends.")
            except RegraftError as error:
                failure = explain(error)
                Output().failure(failure)
                self.output.line(failure.to_json())

    def take(self, line: str) -> None:
        """Carry out a command, or answer."""
        if not line:
            return
        if not line.startswith("/"):
            self.answer(line)
            return
        word, _, rest = line.partition(" ")
        if word not in COMMANDS:
            raise UsageError(
                f"there is no command {word}", expected=", ".join(COMMANDS), hint="Type /help"
            )
        COMMANDS[word][0](self, rest.strip())

    def answer(self, line: str) -> None:
        """Answer a line, and remember both."""
        messages = [*self.messages, {"role": "user", "content": line}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = self.speaker.answer(
            [*system, *messages], self.how, self.output.stream, template=self.template
        )
        self.output.tell("")
        self.output.line({
            "prompt": line, "text": answer.text, "tokens": answer.tokens,
            "seconds": answer.seconds, "tokens_per_second": answer.tokens_per_second,
            "adapters": self.speaker.active, "stopped": answer.stopped,
        })  # fmt: skip
        if answer.stopped:
            self.output.note("stopped")
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]

    def tell_active(self) -> str:
        """Return which adapters answer, as a sentence."""
        active = self.speaker.active
        if not active:
            return "The base answers"
        return "With " + ", ".join(n if w == 1 else f"{n}={w:g}" for n, w in active.items())

    def tell_others(self) -> str:
        """Return what may answer instead, as a sentence; "" if nothing may."""
        others = [name for name in self.speaker.sources if name not in self.speaker.active]
        if not others:
            return ""
        mixed = ",".join(self.speaker.sources)
        return (
            f"There {'is' if len(others) == 1 else 'are'} {', '.join(others)} too: "
            f"/adapter {others[0]} switches, /adapter {mixed} mixes. "
        )

    # -- commands --------------------------------------------------------------------------------

    def adapter(self, rest: str) -> None:
        """Switch."""
        weights = {} if rest == "none" else parse_choice(rest)
        unknown = [name for name in weights if name not in self.speaker.sources]
        if unknown:
            raise UsageError(
                "there is no adapter of this name", where=", ".join(unknown),
                expected=", ".join(self.speaker.sources) or "one that was loaded",
                hint="/adapters lists them, /load PATH loads another",
            )  # fmt: skip
        self.speaker.choose(weights)
        self.output.note(self.tell_active())

    def adapters(self, rest: str) -> None:
        """List."""
        del rest
        for name, source in self.speaker.sources.items():
            mark = "*" if name in self.speaker.active else " "
            self.output.note(f"{mark} {name}  {source}")
        if not self.speaker.sources:
            self.output.note("no adapters are loaded; /load PATH loads one")

    def load(self, rest: str) -> None:
        """Load an adapter."""
        words = rest.split()
        if len(words) not in (1, 2):
            raise UsageError("/load needs a path", expected="/load PATH [NAME]")
        if words[1:] and words[1] in self.speaker.sources:
            raise UsageError("there is an adapter of this name already", where=words[1],
                             hint="Give another one: /load PATH NAME")  # fmt: skip
        name = self.speaker.load(words[0], words[1] if len(words) > 1 else None, self.token)
        self.output.note(f"loaded {name}; /adapter {name} switches to it")

    def clear(self, rest: str) -> None:
        """Forget the conversation."""
        del rest
        self.messages = []
        self.output.note("the conversation is forgotten")

    def set_system(self, rest: str) -> None:
        """Set the system prompt."""
        self.system = rest
        self.output.note("the system prompt is set" if rest else "there is no system prompt now")

    def help(self, rest: str) -> None:
        """List the commands."""
        del rest
        for word, (_, arguments, what) in COMMANDS.items():
            self.output.note(f"{f'{word} {arguments}':<42}{what}")

    def quit(self, rest: str) -> None:
        """End."""
        del rest
        self.ended = True


Command = tuple[Callable[[Chat, str], None], str, str]

COMMANDS: dict[str, Command] = {
    "/adapter": (Chat.adapter, "NAME[=WEIGHT][,NAME...] | none", "which adapters answer"),
    "/adapters": (Chat.adapters, "", "list the adapters; * marks those that answer"),
    "/load": (Chat.load, "PATH [NAME]", "load another adapter"),
    "/clear": (Chat.clear, "", "forget the conversation"),
    "/system": (Chat.set_system, "[TEXT]", "set the system prompt, or none"),
    "/help": (Chat.help, "", "list the commands"),
    "/quit": (Chat.quit, "", "end"),
}
"""What a line may begin with: what is done, its arguments, and what to say of it."""


def parse_choice(text: str) -> dict[str, float]:
    """Return weights by name of ``NAME[=WEIGHT],...``.

    Raises:
        UsageError: there is no name, or a weight is no number.
    """
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, weight = part.rpartition("=")
        try:
            found[name if sign else part] = float(weight) if sign else 1.0
        except ValueError:
            raise UsageError(f"{weight!r} is not a weight", expected="NAME=0.5") from None
    if not found:
        raise UsageError(
            "/adapter needs a name", expected="/adapter NAME[=WEIGHT][,NAME...] | none"
        )
    return found
