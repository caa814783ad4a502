"""diffusers: one file with the names of a pipeline's parts, or kohya's for UNets, CLIP and Flux.

A PEFT folder is loaded as nothing. Of kohya's files it leaves out what the checks here say, most of
it in silence. Text encoders are those of transformers 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from regraft.engines.common import CLOSE, every_part
from regraft.engines.facts import Engine, Rule, Settings
from regraft.engines.pipelines import Named, OfPipeline
from regraft.engines.report import Effect, Finding
from regraft.engines.subject import Subject

CONVERT = (
    "Write it under the names of the pipeline's parts: `regraft convert ADAPTER -o OUT --to "
    "diffusers --base BASE`"
)
MERGE = "Merge it (`regraft merge BASE ADAPTER -o OUT`), and put OUT in the part's place"

_FLUX, _SD3 = "FluxTransformer2DModel", "SD3Transformer2DModel"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_IN_UNET = ("to_q", "to_k", "to_v", "to_out.0")

Check = Callable[[Subject, Settings], Iterator[Finding]]


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _of(named: Named, effect: Effect, because: str, way_out: str = CONVERT) -> Finding:
    return Finding(effect, named.pair.name, because, way_out)


# -- diffusers' own files, and PEFT's --------------------------------------------------------------


def named_by_part(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find adapters whose names begin with no part of a pipeline, as those of PEFT's folders.

    A part takes the names that begin with its own, and an empty selection is a line in the log. The
    loader of Flux takes PEFT's prefix for the names of another program, and finds none of those.
    """
    del settings
    if subject.dialect in ("diffusers", "kohya"):
        return
    because = "its name begins with no part of a pipeline (unet, transformer), so it is passed over"
    effect: Effect = "leaves out"
    if OfPipeline(subject).kind == _FLUX and subject.dialect == "peft":
        effect, because = "refuses", "it takes PEFT's prefix for the names of another program"
    yield from (Finding(effect, name, because, CONVERT) for name in every_part(subject))


def other_text_encoders(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find adapters of a text encoder that no pipeline loads one for: T5, whichever it is."""
    del settings
    told = OfPipeline(subject)
    if told.part == "text_encoder_3" or (told.is_text and "T5" in (subject.architecture or "")):
        because = "it loads adapters of CLIP's text encoders alone"
        yield from (Finding("leaves out", n, because, MERGE) for n in every_part(subject))


def text_encoders(subject: Subject, settings: Settings) -> Iterator[Finding]:
    """Find what the loader of text encoders does not take of diffusers' own files.

    It tells its own files by the factors of attention, and without any it tells nothing. DoRA's
    magnitudes have other names in transformers, which begins with the norms of the base then.
    """
    del settings
    if subject.dialect != "diffusers" or not OfPipeline(subject).is_text:
        return
    if not any(_leaf(pair.target.module) in _ATTENTION for pair in subject.pairs):
        because = "it tells a text encoder's factors by those of its attention, and there are none"
        yield from (Finding("refuses", pair.name, because, MERGE) for pair in subject.pairs)
        return
    because = "its loader of text encoders finds no magnitudes, and takes the norms of the base"
    yield from (
        Finding("leaves out", pair.name, because, MERGE)
        for pair in subject.pairs if pair.target.magnitude is not None
    )  # fmt: skip


# -- kohya's files ---------------------------------------------------------------------------------


def _of_kohya(check: Callable[[OfPipeline], Iterator[Finding]]) -> Check:
    """Return a check of kohya's files alone."""

    def checked(subject: Subject, settings: Settings) -> Iterator[Finding]:
        del settings
        if subject.dialect == "kohya":
            yield from check(OfPipeline(subject))

    checked.__doc__ = check.__doc__
    return checked


@_of_kohya
def magnitudes_of_kohya(told: OfPipeline) -> Iterator[Finding]:
    """Find DoRA's magnitudes, which every loader takes out of the file."""
    because = "it takes DoRA's magnitudes (dora_scale) out of a kohya file"
    for pair in told.subject.pairs:
        if pair.target.magnitude is not None:
            yield Finding("leaves out", pair.name, because, CONVERT)


def _applied(told: OfPipeline, named: Named) -> float:
    """Return the alpha that a module of a UNet or a text encoder gets."""
    common = told.common_alpha
    if common is None:
        return float(named.pair.rank)
    module = named.pair.target.module
    is_known = not told.is_text and not module.endswith(tuple(f".{n}" for n in _IN_UNET))
    if told.has_one_alpha or named.alpha is None or not is_known:
        return common
    return named.alpha


@_of_kohya
def alphas_of_kohya(told: OfPipeline) -> Iterator[Finding]:
    """Find modules that get the alpha that most others have.

    Where alphas differ, that one is for all, with exceptions by name. The names under which it
    keeps those of attention, and of all of a text encoder, are no module's. A module without an
    alpha, which is its rank then, gets the common one, too.
    """
    if told.part != "unet" and not told.is_text:
        return
    because = "it loses the alphas of attention layers, which get the one that most modules have"
    if told.is_text:
        because = "it loses the alphas of text encoders, which get the one that most modules have"
    for named in told.named:
        used, true = _applied(told, named) / named.pair.rank, named.pair.scale
        if not math.isclose(used, true, rel_tol=CLOSE):
            missing = "a module without an alpha gets the one that most others have"
            said = missing if named.alpha is None else because
            yield Finding("other scale", named.pair.name, said, CONVERT, true, used)


_KNOWN = re.compile(
    r"(down|mid|up)_blocks?|transformer_blocks|to_[qkv]|to_out|proj_in|proj_out|time_emb_proj"
    r"|conv_in|conv_out|conv_shortcut|time_embedding|linear_[12]|[^_]+"
)
"""Parts of names in which it makes dots of underscores and finds the way back."""


@_of_kohya
def names_in_unets(told: OfPipeline) -> Iterator[Finding]:
    """Find names of kohya's that are no module's once underscores have become dots.

    Stability's names of blocks are known for SDXL alone, where the file has none of diffusers'.
    """
    if told.part != "unet":
        return
    lost = list(_lost(told))
    effect: Effect = "refuses" if lost and len(lost) == len(told.named) else "leaves out"
    yield from (_of(named, effect, because) for named, because in lost)


def _lost(told: OfPipeline) -> Iterator[tuple[Named, str]]:
    both = any(named.is_diffusers for named in told.named)
    for named in told.named:
        module = named.pair.target.module
        if named.is_stabilitys:
            if not told.is_sdxl:
                yield named, "it knows Stability's names of blocks in pipelines of SDXL alone"
            elif both:
                yield named, "of a file with names of both kinds it leaves Stability's out"
        elif named.written == f"lora_unet_{module.replace('.', '_')}" and not all(
            map(_KNOWN.fullmatch, module.split("."))
        ):
            yield named, "it makes a dot of an underscore in its name, and finds no such module"


@_of_kohya
def names_in_text_encoders(told: OfPipeline) -> Iterator[Finding]:
    """Find attention that is not told to be there: the output projection shows it, or the MLP."""
    leaves = {_leaf(named.pair.target.module) for named in told.named}
    if not told.is_text or "out_proj" in leaves:
        return
    effect: Effect = "leaves out" if leaves & {"fc1", "fc2"} else "refuses"
    because = "it tells a text encoder's attention by factors of out_proj, and there are none"
    for named in told.named:
        if _leaf(named.pair.target.module) in _ATTENTION:
            yield _of(named, effect, because)


_OF_MIXTURE = re.compile(
    r"(single_)?transformer_blocks\.\d+\.attn\..+|x_embedder|context_embedder|proj_out"
    r"|norm_out\.linear|time_text_embed\..+"
)
"""The modules of Flux that it knows by diffusers' names in a kohya file."""

_SINGLE_ROWS = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}


@_of_kohya
def names_in_transformers(told: OfPipeline) -> Iterator[Finding]:
    """Find what is left out or refused of kohya's files for Flux and Stable Diffusion 3."""
    if told.kind == _SD3:
        because = "it reads no kohya files for Stable Diffusion 3, and passes their names over"
        yield from (_of(named, "leaves out", because) for named in told.named)
    elif told.kind == _FLUX:
        yield from _in_flux(told)


def _in_flux(told: OfPipeline) -> Iterator[Finding]:
    mixture = any(named.written.startswith("lora_transformer_") for named in told.named)
    for named in told.named:
        module, theirs = named.pair.target.module, named.written.startswith("lora_unet_")
        if mixture and theirs:
            yield _of(named, "leaves out", "of names of both kinds it leaves the makers' out")
        elif not theirs and (named.alpha is None or not _OF_MIXTURE.fullmatch(module)):
            because = "it does not know this module by diffusers' name in a kohya file"
            said = because if named.alpha is not None else "it misses the alpha of the module"
            yield _of(named, "refuses", said)
        elif theirs and "transformer_blocks." not in module:
            because = "it finds the name of its part for modules in blocks alone"
            yield _of(named, "leaves out", because)
        elif theirs and named.written.endswith("_linear1"):
            rows = _SINGLE_ROWS.get(module.split(".", 2)[2])
            if rows != named.pair.sizes.out:
                yield _of(named, "refuses", f"it takes {rows} rows for it, as Flux.1 has")


DIFFUSERS = Engine(
    name="diffusers",
    shown="diffusers",
    version="0.42.1",
    sources=(
        "diffusers/loaders/peft.py", "diffusers/loaders/lora_base.py",
        "diffusers/loaders/lora_pipeline.py", "diffusers/loaders/lora_conversion_utils.py",
        "diffusers/utils/peft_utils.py", "diffusers/utils/state_dict_utils.py",
    ),
    distributions=("diffusers",),
    dialect="diffusers",
    rules=(
        Rule("saved", "refuses", "it has no place for modules that are replaced"),
        Rule("bias", "refuses", "it has no place for biases that are replaced"),
        Rule("token rows", "refuses", "it has no place for trained token rows"),
        Rule("starts with the base", "misapplies", "it leaves the base as it is"),
    ),
    checks=(
        named_by_part, other_text_encoders, text_encoders, magnitudes_of_kohya, alphas_of_kohya,
        names_in_unets, names_in_text_encoders, names_in_transformers,
    ),
    notes=(
        "kohya's files were looked at for UNets, CLIP, Flux and Stable Diffusion 3",
    ),
)  # fmt: skip
