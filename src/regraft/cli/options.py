"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from regraft.cli.output import Output
from regraft.deltas.methods.names import METHOD_NAMES
from regraft.formats.files.text import shell_word
from regraft.tensors import DTYPE_ALIASES, parse_size

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_MAX_MEMORY = "512MiB"

_UNRECORDED = {
    "token",
    "as_json",
    "quiet",
    "overwrite",
    "reflink",
    "digest_cache",
    "dry_run",
    "verbose",
    "help",
}
"""Parameters that do not belong in a receipt: one is a secret, the others change no byte."""


def check_size(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse what :func:`regraft.tensors.parse_size` cannot read; pass on the text as it is."""
    try:
        parse_size(value or 1)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(str(error), ctx, param) from None
    return value


def base_and_adapters(function: Function) -> Function:
    """Add the arguments ``[BASE] ADAPTER[=WEIGHT]...``; see :func:`base_named`."""
    function = click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1)(function)
    return click.argument("base", metavar="[BASE]", required=False)(function)


def base_named(
    output: Output, base: str | None, adapters: tuple[str, ...], token: str | None
) -> tuple[str, tuple[str, ...]]:
    """Return base and adapters; of an adapter alone, the base that it names, which is said.

    Raises:
        click.UsageError: a base alone was given, or nothing.
    """
    if base is None:
        raise click.UsageError("Missing argument 'ADAPTER[=WEIGHT]...': what to merge.")
    if adapters:
        return base, adapters
    from regraft.formats.files.reading import expanded, is_there
    from regraft.formats.layout import looks_like
    from regraft.merging.inputs.opening import base_named_by, parse_adapters

    path = expanded(parse_adapters(base)[0][0])
    if is_there(path) and looks_like(path) in ("checkpoint", "merged", "gguf"):
        raise click.UsageError("Missing argument 'ADAPTER[=WEIGHT]...': what to merge into it.")
    found = base_named_by(parse_adapters(base), token)
    output.note(f"base: {found}, which the adapter names")
    return found, (base,)


def folder_to_make(
    metavar: str = "OUT", *, required: bool = True
) -> Callable[[Function], Function]:
    """Return the option ``-o``, the folder that a command makes."""
    return click.option(
        "-o",
        "--out",
        type=click.Path(),
        metavar=metavar,
        required=required,
        help="Folder to make. It appears whole or not at all.",
    )


out = folder_to_make()

if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:
    _Choice = click.Choice  # it is generic since click 8.2


class Dtype(_Choice):
    """A dtype, given by its name or by a short one such as ``bf16``; passed on by its name."""

    def __init__(self, more: tuple[str, ...] = ()) -> None:
        super().__init__(["float32", "bfloat16", "float16", *more])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name of the dtype that ``value`` means."""
        return super().convert(DTYPE_ALIASES.get(str(value).lower(), value), param, ctx)


dtype = click.option(
    "--dtype",
    type=Dtype(),
    help="Element type of the output.  [default: each tensor keeps the base's]",
)

dtype_or_blocks = click.option(
    "--dtype",
    type=Dtype(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")),
    help="Element type of the output; one of q8_0 to q4_0 only of a GGUF file.  [default: each "
    "tensor keeps the base's]",
)

shard_size = click.option(
    "--shard-size",
    callback=check_size,
    metavar="SIZE",
    help="Largest output file, such as 5GB.  [default: the base's shards]",
)

quantize = click.option(
    "--quantize",
    type=click.Choice(["keep", "nf4", "fp4", "int8", "fp8"]),
    help="Write a quantized model: in the base's own format with its scales (keep), or in "
    "another.  [default: plain weights]",
)

rounding = click.option(
    "--rounding",
    type=click.Choice(["stochastic", "nearest"]),
    help="How weights become codes. Where the base's format is kept, nearest loses most of an "
    "adapter.  [default: stochastic there, else nearest]",
)

double_quant = click.option(
    "--double-quant", is_flag=True, help="Quantize the scales of nf4 or fp4 too."
)

seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Which random bits stochastic rounding takes.  [default: 0]",
)


def combining_method(default: str | None) -> Callable[[Function], Function]:
    """Return the option ``--method``: how several deltas become one."""
    return click.option(
        "--method",
        type=_Choice(list(METHOD_NAMES)),
        default=default,
        show_default=default is not None,
        help="How several deltas become one; docs/how-to-combine.md says what each does.",
    )


merging_method = click.option(
    "--method",
    type=_Choice(list(METHOD_NAMES)),
    default="sum",
    show_default=True,
    help="How the deltas of several adapters become one: their sum, or element by element ties, "
    "dare, dare_ties, della, breadcrumbs or magnitude_prune; docs/how-to-combine.md says more.",
)


def energy_to_keep(of: str) -> Callable[[Function], Function]:
    """Return the option ``--energy``; ``of`` is what has a squared norm."""
    return click.option(
        "--energy",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="F",
        help=f"Instead of --rank: the share of each {of}'s squared norm to keep, such as 0.99.",
    )


def factor_dtype(default: str) -> Callable[[Function], Function]:
    """Return the option ``--dtype`` of an adapter's factors."""
    return click.option(
        "--dtype",
        type=Dtype(),
        default=default,
        show_default=True,
        help="Element type of the factors.",
    )


replace_adapter = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace OUT, if it holds an adapter, once the new one is complete.",
)

density = click.option(
    "--density",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="F",
    help="The share of elements that the method keeps.  [default: the method's own]",
)

peft_version = click.option(
    "--peft-version",
    metavar="VERSION",
    help="Release of PEFT that trained adapters whose config does not say it, such as 0.18.0. Only "
    "square stacks of experts need it: PEFT 0.19 turned them round.",
)

reflink = click.option(
    "--reflink",
    type=click.Choice(["auto", "never", "always"]),
    default="auto",
    show_default=True,
    help="Share blocks of the disk for what stays as it is, where the file system can (XFS, "
    "btrfs): no time and no room for it, and the same bytes. always refuses where it cannot.",
)

digest_cache = click.option(
    "--digest-cache/--no-digest-cache",
    default=False,
    help="Of files that did not change since earlier work, by their times, take the digests that "
    "it kept, and keep those of this work.  [default: no-digest-cache]",
)

max_memory = click.option(
    "--max-memory",
    callback=check_size,
    default=DEFAULT_MAX_MEMORY,
    show_default=True,
    metavar="SIZE",
    help="Cap on the memory it takes, whatever the size of the model.",
)

threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker threads; the bytes do not depend on it.  [default: by the number of cores]",
)

overwrite = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace OUT, if it holds a model, once the new one is complete.",
)

undo = click.option(
    "--undo/--no-undo",
    default=None,
    help="Keep in OUT what `regraft unmerge` and `swap` need.  [default: undo, but not where "
    "weights are put into another quantized format, or a GGUF file into another type]",
)

keep_adapter = click.option(
    "--keep-adapter/--no-keep-adapter",
    default=True,
    help="Keep a copy of the adapters there too; else they have to be named again to undo.  "
    "[default: keep-adapter]",
)

token = click.option(
    "--token",
    metavar="TOKEN",
    help="Hugging Face token. Better: HF_TOKEN or `hf auth login`, which other users of the "
    "machine cannot see.",
)


def adapters_to_attach(several: str) -> Callable[[Function], Function]:
    """Return the option ``--adapter`` of a live model; ``several`` says what several do."""
    return click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="ADAPTER[=WEIGHT]",
        help="Adapter to attach; =WEIGHT multiplies its scale. It is called by the last part of "
        f"its path. {several}",
    )


load_in_4bit = click.option(
    "--load-in-4bit",
    is_flag=True,
    help="Put the model's linear layers into bitsandbytes' NF4 while it is loaded.",
)

model_dtype = click.option(
    "--dtype",
    type=Dtype(),
    help="Element type of the model in memory.  [default: the model's own]",
)

device = click.option(
    "--device", metavar="DEVICE", help="Such as cuda:1 or cpu.  [default: a GPU if there is one]"
)

max_new_tokens = click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="The most tokens of an answer.",
)

temperature = click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="T",
    help="Sample at this temperature.  [default: 0: the likeliest token each time]",
)

top_p = click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="P",
    help="Sample from the likeliest tokens that together have this probability.",
)

answer_seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    help="Seed of sampling.  [default: another one each time]",
)

system = click.option("--system", metavar="TEXT", help="System prompt.")

chat_template = click.option(
    "--no-chat-template",
    "template",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Give the model the plain text, also where its tokenizer has a chat template.",
)

as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, errors too."
)

quiet = click.option(
    "-q", "--quiet", is_flag=True, help="No progress bar and no summary; errors and warnings stay."
)


def command_line(ctx: click.Context) -> str:
    """Return the command as one would type it, without secrets: what the receipt records."""
    arguments, chosen = list[str](), list[str]()
    for parameter in ctx.command.params:
        words = _words(parameter, ctx.params.get(parameter.name or ""))
        if isinstance(parameter, click.Argument):
            arguments += words
        else:
            chosen += words
    if any(word.startswith("-") for word in arguments):  # it was given after a "--"
        arguments, chosen = chosen, ["--", *arguments]
    return " ".join([ctx.command_path, *map(shell_word, arguments + chosen)])


def _words(parameter: click.Parameter, value: Any) -> list[str]:
    """Return the words that give ``parameter`` its value; none where it is the default."""
    if parameter.name in _UNRECORDED or value in (None, ()) or value == parameter.default:
        return []
    if isinstance(parameter, click.Argument):
        return [str(word) for word in (value if parameter.nargs == -1 else [value])]
    name = max(parameter.opts, key=len)
    if isinstance(value, bool):
        return [name] if value else parameter.secondary_opts[:1]
    return [word for one in (value if parameter.multiple else [value]) for word in (name, str(one))]
