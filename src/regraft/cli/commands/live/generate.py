"""``regraft generate``: one answer of a model, with or without adapters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from regraft.cli import options, speaking
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.runtime.generating import Answer, Speaker


@click.command(short_help="Let a model answer a prompt, with or without adapters.")
@options.adapters_to_attach("Several answer together, as a merge adds them up.")
@speaking.model_and_sampling
@click.option(
    "--prompt", required=True, metavar="TEXT", help="What to answer; - reads it from stdin."
)
@options.as_json
@options.quiet
def command(
    base: str, adapters: tuple[str, ...], prompt: str, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Let a model answer a prompt.

    BASE is a model's folder, a merged one too, a .gguf file, or a Hub id such as org/name@revision.
    Of an adapter's folder, the base that it names is loaded and the adapter attached. Adapters are
    not merged; the answers are those of the merged model up to rounding. The tokenizer is that of
    the first adapter that brings one, else the base's, and so is the chat template, which is used
    if there is one. The answer ends where the model's generation config says so.

    \b
    Examples:
      regraft generate ./base --prompt "What is a graft?"
      regraft generate ./base --adapter ./style --adapter ./facts=0.5 --prompt "Hello"
      regraft generate ./adapter --load-in-4bit --prompt "Hello"
      regraft generate ./merged --temperature 0.7 --seed 1 --prompt - < question.txt
      regraft generate ./merged --prompt "Hello" --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    how = speaking.sampling(chosen)
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "user", "content": text}]
    if chosen["system"]:
        messages.insert(0, {"role": "system", "content": chosen["system"]})
    speaker = speaking.opened(output, base, adapters, chosen, together=True)
    answer = speaker.answer(messages, how, output.stream, template=chosen["template"])
    if answer.stopped:
        raise KeyboardInterrupt
    output.data(_payload(text, answer, speaker), "", secrets=True)


def _payload(prompt: str, answer: Answer, speaker: Speaker) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "tokens_per_second": answer.tokens_per_second,
        "adapters": [
            {"name": name, "source": speaker.sources[name], "weight": weight}
            for name, weight in speaker.active.items()
        ],
    }
