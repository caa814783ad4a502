"""What ``generate`` and ``chat`` share: options, and the model that they load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from regraft.cli import options
from regraft.cli.output import Output

if TYPE_CHECKING:
    from regraft.runtime.generating import Sampling, Speaker

Function = TypeVar("Function", bound=Callable[..., Any])

_MODEL = ("load_in_4bit", "dtype", "device", "token")
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "seed")


def model_and_sampling(function: Function) -> Function:
    """Add the argument ``BASE`` and the options of a model and its answers, but ``--adapter``."""
    for option in (
        options.token, options.chat_template, options.system, options.answer_seed, options.top_p,
        options.temperature, options.max_new_tokens, options.device, options.model_dtype,
        options.load_in_4bit,
    ):  # fmt: skip
        function = option(function)
    return click.argument("base", metavar="BASE")(function)


def opened(
    output: Output, base: str, adapters: Sequence[str], chosen: dict[str, Any], *, together: bool
) -> Speaker:
    """Load the model and its adapters, of which all answer, or the first."""
    output.mute_downloads()
    from regraft.merging.inputs.opening import parse_adapters
    from regraft.runtime.generating import open_speaker

    wanted = parse_adapters(list(adapters)) if adapters else []
    how = {name: chosen[name] for name in _MODEL}
    return open_speaker(base, wanted, **how, together=together)


def sampling(chosen: dict[str, Any]) -> Sampling:
    """Return how tokens are chosen.

    Raises:
        click.UsageError: an option has no effect without another one.
    """
    if chosen["top_p"] is not None and not chosen["temperature"]:
        raise click.UsageError("--top-p needs --temperature: without it nothing is sampled.")
    from regraft.runtime.generating import Sampling

    return Sampling(**{name: chosen[name] for name in _SAMPLING})
