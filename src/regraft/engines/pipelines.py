"""An adapter's file as diffusers sees it: which pipeline its base is of, and kohya's names and
alphas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from regraft.adapters.dialects.images.kohya import PREFIXES, kohya_names
from regraft.adapters.dialects.images.mmdit_names import places
from regraft.adapters.dialects.images.parts import part_of, shapes_of
from regraft.engines.subject import Subject
from regraft.formats.files.json_file import read_json_object
from regraft.shrinking.targets import Pair

_INDEX, _INDEX_BYTES = "model_index.json", 2**20
_STABILITY = ("input_blocks", "middle_block", "output_blocks")
_DIFFUSERS = ("down_blocks", "mid_block", "up_blocks")


@dataclass(frozen=True)
class Named:
    """A module of the base, as a kohya file names it.

    Attributes:
        pair: its factors.
        written: its name in the file, with the prefix of its part.
        alpha: its alpha, None where the file has none for it.
    """

    pair: Pair
    written: str
    alpha: float | None

    @property
    def is_stabilitys(self) -> bool:
        """Whether its name is that of a block of Stability's UNet."""
        return any(word in self.written for word in _STABILITY)

    @property
    def is_diffusers(self) -> bool:
        """Whether its name is that of a block of diffusers' UNet."""
        return any(word in self.written for word in _DIFFUSERS)


class OfPipeline:
    """An adapter beside its base, which is a part of a pipeline."""

    def __init__(self, subject: Subject) -> None:
        """Look at nothing yet."""
        self.subject = subject

    @cached_property
    def part(self) -> str:
        """The part of a pipeline that the base is; ``""`` where it is not known."""
        return part_of(self.subject.base) or ""

    @property
    def is_text(self) -> bool:
        """Whether the base is a text encoder."""
        return self.part.startswith("text_encoder")

    @cached_property
    def kind(self) -> str:
        """The base's class in diffusers, or ``""``."""
        return str((self.subject.base.config or {}).get("_class_name") or "")

    @cached_property
    def pipeline(self) -> str:
        """The class of the pipeline that the base lies in, as its folder says; ``""`` for none."""
        path = self.subject.base.root.parent / _INDEX
        if not path.is_file():
            return ""
        return str(read_json_object(path, max_bytes=_INDEX_BYTES).get("_class_name") or "")

    @cached_property
    def is_sdxl(self) -> bool:
        """Whether it is one of SDXL's, by the pipeline's class or by what its UNet is told."""
        config = self.subject.base.config or {}
        return "XL" in self.pipeline or config.get("addition_embed_type") == "text_time"

    @cached_property
    def named(self) -> tuple[Named, ...]:
        """The modules of a kohya file, in the order of the file.

        A module of the file that is several of the base's is there once for each.
        """
        by_module = {pair.target.module: pair for pair in self.subject.pairs}
        stored, meant, found = self.subject.stored, self._meant, []
        for name in stored:
            written, _, what = name.partition(".")
            if what != "lora_down.weight":
                continue
            prefix = next((p for p in PREFIXES if written.startswith(p)), "")
            for module in meant.get(written.removeprefix(prefix), ()):
                pair = by_module.get(module)
                if pair is not None and (PREFIXES.get(prefix) == self.part or not self.is_text):
                    given = f"{written}.alpha" in stored
                    found.append(Named(pair, written, pair.scale * pair.rank if given else None))
        return tuple(found)

    @cached_property
    def _meant(self) -> Mapping[str, tuple[str, ...]]:
        shapes = shapes_of(self.subject.base)
        fused = {name: place.modules for name, place in places(shapes.keys()).items()}
        return fused | {n: tuple(m) for n, m in kohya_names(shapes, self.subject.base).items()}

    @cached_property
    def common_alpha(self) -> float | None:
        """The alpha that most modules of the file have, the first one of several; None for none."""
        alphas = Counter(each.alpha for each in self.named if each.alpha is not None)
        return alphas.most_common(1)[0][0] if alphas else None

    @cached_property
    def has_one_alpha(self) -> bool:
        """Whether all modules that have an alpha have the same."""
        return len({each.alpha for each in self.named if each.alpha is not None}) == 1
