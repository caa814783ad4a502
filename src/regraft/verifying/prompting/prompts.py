"""Prompts through the base with its adapters, and through the merged model: the same answers?

tokens of every prompt -> logits of base + adapters, to a temporary file -> load the merged model,
compare -> load the base alone, compare -> PromptReport

One model is in memory at a time, in float32, so that what is compared are the weights: computing in
16 bits would add more noise than a merge's rounding does. How far the base alone is from the
adapters' answers tells whether the prompts can show anything at all.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regraft.adapters.model import Adapter
from regraft.errors import (
    DiskSpaceError,
    InputError,
    NumericError,
    Problem,
    UnsupportedError,
)
from regraft.formats.checkpoint import Checkpoint
from regraft.formats.files.parsed import check_parsed
from regraft.formats.files.reading import typed_os_errors
from regraft.formats.layout import ADAPTER_SAFE, ADAPTER_TORCH
from regraft.formats.problems import capped, quoted
from regraft.libraries import from_pretrained, from_template, quieted, require
from regraft.merging.options import MergeOptions
from regraft.merging.planning.planner import make_plan
from regraft.progress import Progress, ProgressEvent
from regraft.verifying.prompting.file import Prompt, read_prompts
from regraft.verifying.prompting.models import (
    SPARE,
    auto_class,
    first_line,
    is_out_of_memory,
    load_model,
    loading,
    no_memory,
    text_config,
)
from regraft.verifying.prompting.report import (
    PromptAgreement,
    PromptReport,
    Reference,
    Tally,
    judged,
)

MAX_TOKENS = 256
"""Tokens of a prompt that are looked at."""

_POSITIONS = 64
"""Positions compared at once, in float64."""

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)


def compare_prompts(
    merged: Checkpoint,
    base: Checkpoint,
    adapters: Sequence[Adapter],
    file: str | Path,
    options: MergeOptions,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> PromptReport:
    """Compare the answers of a merged model with those of its base and adapters.

    Memory is not capped: a model is loaded whole, in float32, one after the other. The logits of
    base and adapters wait in a temporary file. A GPU is used if there is one with room enough.

    Args:
        merged: the merged model.
        base: the base it should be made from.
        adapters: the adapters it should be made with.
        file: the prompts; see :func:`regraft.verifying.prompting.file.read_prompts`.
        options: memory and threads, for the merge that stands in where PEFT cannot be used.
        max_tokens: tokens of a prompt that are looked at.
        progress: called as work proceeds, in bytes of logits.

    Raises:
        InputError: the file, or what a model consists of, is not as it should be.
        UnsupportedError: it cannot be judged: not a model that continues text, or not one that
            transformers loads without code of the model's own.
        MissingExtraError: torch or transformers is missing.
        EnvironmentShortfall: memory or disk space does not suffice.
    """
    path, prompts = Path(os.path.expanduser(file)), check_prompts(file)  # noqa: PTH111
    with _quiet(), _scratch() as folder:
        for checkpoint in (merged, base):
            auto_class(checkpoint)
        rows = _tokenized(prompts, path, (merged, base), max_tokens)
        run = _PromptRun(rows, folder, progress)
        live = _live(base, adapters, options, folder)
        device = run.keep(live.model, base.source)
        live.model = None
        _collect()
        answered = run.compare(load_model(merged), merged.source)
        _collect()
        alone = run.compare_base(load_model(base), base.source)
    return _report(path, rows, answered, alone, live, device)


def check_prompts(file: str | Path) -> list[Prompt]:
    """Return the prompts of a file, once the packages that are needed are there too.

    Raises:
        InputError: the file is not as it should be.
        MissingExtraError: torch or transformers is missing.
        AccessError: the system refused to read the file.
    """
    prompts = read_prompts(Path(os.path.expanduser(file)))  # noqa: PTH111  (raises less)
    require("torch", "transformers", why="comparing answers to prompts", where="--prompts")
    return prompts


def _report(
    path: Path, rows: _TokenizedPrompts, answered: Sequence[Tally], alone: Sequence[Tally] | None,
    live: _LiveModel, device: str,
) -> PromptReport:  # fmt: skip
    merged = Tally.sum(answered)
    base = Tally.sum(alone) if alone is not None else None
    verdict = judged(merged, base)
    return PromptReport(
        file=str(path),
        ok=verdict == "same",
        verdict=verdict,
        tokens=merged.tokens,
        top1_agreement=merged.top1,
        kl_mean=merged.kl_mean,
        kl_max=merged.kl_max,
        base_top1_agreement=base.top1 if base is not None else None,
        base_kl_mean=base.kl_mean if base is not None else None,
        prompts=tuple(map(_agreement, rows.prompts, answered)),
        truncated=rows.truncated,
        reference=live.reference,
        dtype="float32",
        device=device,
        notes=live.notes,
    )


def _agreement(prompt: Prompt, tally: Tally) -> PromptAgreement:
    text = _shortened(prompt.text)
    return PromptAgreement(prompt.line, text, tally.tokens, tally.top1, tally.kl_mean, tally.kl_max)


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else words[:57] + "..."


# -- surroundings ----------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what transformers and PEFT say and draw; errors are exceptions and pass."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads: sleep, do not spin
    from transformers.utils import logging

    with quieted(logging), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _scratch() -> Iterator[Path]:
    with typed_os_errors(Path(tempfile.gettempdir())):
        folder = Path(tempfile.mkdtemp(prefix="regraft-prompts-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TokenizedPrompts:
    """The prompts as tokens.

    Attributes:
        prompts: the prompts.
        ids: the tokens of each.
        truncated: how many were longer than what is taken.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def _tokenized(
    prompts: list[Prompt], path: Path, models: Sequence[Checkpoint], max_tokens: int
) -> _TokenizedPrompts:
    """Return the prompts as tokens, by the tokenizer of the first model that has one."""
    tokenizer = _tokenizer(models)
    limit = min([max_tokens, *map(_longest, models)])
    rows: list[list[int]] = []
    problems: list[Problem] = []
    for prompt in prompts:
        where = f"{path}, line {prompt.line}"
        if prompt.messages and not getattr(tokenizer, "chat_template", None):
            hint = 'Write the prompt as plain text: {"prompt": ...}'
            problems.append(Problem("the model has no chat template", where, hint=hint))
            continue
        try:
            ids = _tokens(tokenizer, prompt)
        except Exception as error:  # a template may raise what it likes
            found = first_line(error)
            problems.append(Problem("cannot be made into tokens", where, found=found))
            continue
        if not ids:
            problems.append(Problem("the prompt has no token", where))
        rows.append(ids)
    if problems:
        raise InputError(capped(problems, path))
    cut = sum(len(ids) > limit for ids in rows)
    return _TokenizedPrompts(prompts, [ids[:limit] for ids in rows], cut)


def _tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    if not prompt.messages:
        return list(tokenizer(prompt.text)["input_ids"])
    asks = prompt.messages[-1]["role"] != "assistant"
    messages = [dict(message) for message in prompt.messages]
    text = from_template(tokenizer, messages, add_generation_prompt=asks)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenizer(models: Sequence[Checkpoint]) -> Any:
    from transformers import AutoTokenizer

    for model in models:
        if any((model.root / name).is_file() for name in _TOKENIZERS):
            check_parsed(model.root)
            with loading(model, "its tokenizer"):
                return from_pretrained(AutoTokenizer, model.root, local_files_only=True)
    raise UnsupportedError(
        "there is no tokenizer to read the prompts with", where=models[0].source,
        expected="tokenizer.json and the like, with the merged model or the base",
        hint="Copy the tokenizer's files into the model's folder",
    )  # fmt: skip


def _longest(model: Checkpoint) -> int:
    """Return how many positions a model has, if its config says so."""
    config = model.config or {}
    found = [part.get(key) for part in (config, text_config(config)) for key in _LIMITS]
    return min((n for n in found if isinstance(n, int) and n > 0), default=2**31)


# -- base + adapters -------------------------------------------------------------------------------


@dataclass
class _LiveModel:
    """The base with its adapters, and how it came about."""

    model: Any
    reference: Reference
    notes: tuple[str, ...] = ()


class _CannotError(Exception):
    """PEFT cannot put an adapter on the base; the message says why."""


def _live(
    base: Checkpoint, adapters: Sequence[Adapter], options: MergeOptions, folder: Path
) -> _LiveModel:
    """Return the base with its adapters live on it, or merged without rounding."""
    if find_spec("peft") is None:
        note = "PEFT is not installed: regraft's own merge, not rounded, answers as base + adapter"
        return _LiveModel(
            _merged_float32(base, adapters, options, folder), "float32 merge", (note,)
        )
    try:
        return _LiveModel(_with_peft(base, adapters), "peft")
    except _CannotError as error:
        reason = str(error)
    _collect()
    note = (
        f"PEFT does not load the adapter ({reason}): regraft's own merge, not rounded, answers as "
        "base + adapter"
    )
    return _LiveModel(_merged_float32(base, adapters, options, folder), "float32 merge", (note,))


def _with_peft(base: Checkpoint, adapters: Sequence[Adapter]) -> Any:
    """Return the base with the adapters on it, all of them active, in float32."""
    odd = [a for a in adapters if a.weights_file not in (ADAPTER_SAFE, ADAPTER_TORCH)]
    if odd:
        raise _CannotError(f"its weights are in {quoted(odd[0].weights_file)}")
    # PiSSA and OLoRA round what is left of the base to its dtype, as they did in training.
    rounds = any(adapter.settings.begins_with_base for adapter in adapters)
    model = load_model(base, "auto" if rounds else "float32")
    names = [f"adapter{number}" for number in range(len(adapters))]
    try:
        live = _attached(model, adapters, names)
    except (MemoryError, _CannotError):
        raise
    except Exception as error:  # the library's errors are of many kinds
        if is_out_of_memory(error):
            raise no_memory(base.source, first_line(error)) from None
        raise _CannotError(first_line(error)) from None
    return live.float().eval()


def _attached(model: Any, adapters: Sequence[Adapter], names: list[str]) -> Any:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    _grow(model, adapters)
    live = PeftModel.from_pretrained(
        model, adapters[0].root, adapter_name=names[0], torch_device="cpu"
    )
    for name, adapter in zip(names, adapters, strict=True):  # the first again: it tells what fits
        result = live.load_adapter(adapter.root, adapter_name=name, torch_device="cpu")
        lost = [*result.missing_keys, *result.unexpected_keys]
        if lost:
            raise _CannotError(f"{len(lost)} tensors do not fit, such as {quoted(lost[0])}")
    if len(names) > 1:
        live.base_model.set_adapter(names)
    for module in live.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, adapters, strict=True):
                module.set_scale(name, adapter.weight)
    return live


def _grow(model: Any, adapters: Sequence[Adapter]) -> None:
    """Make room in the vocabulary for embeddings that an adapter brings with more rows."""
    rows, width = model.get_input_embeddings().weight.shape
    shapes = [whole.spec.shape for a in adapters for whole in a.whole if whole.origin != "bias"]
    wanted = [shape[0] for shape in shapes if len(shape) == 2 and shape[1] == width]
    if max(wanted, default=0) > rows:
        model.resize_token_embeddings(max(wanted), mean_resizing=False)


def _merged_float32(
    base: Checkpoint, adapters: Sequence[Adapter], options: MergeOptions, folder: Path
) -> Any:
    """Return a merge that is not rounded to 16 bits, made in a temporary folder."""
    from regraft.formats.checkpoint import open_checkpoint
    from regraft.formats.hub import locate
    from regraft.merging.building import build
    from regraft.merging.files.staging import workplace
    from regraft.merging.inputs.base import see

    out = folder / "float32"
    wide = MergeOptions(dtype="F32", max_memory=options.max_memory, threads=options.threads)
    plain, quantization = see(base, wide.dtype)
    plan = make_plan(plain, adapters, wide, out, quantization=quantization)
    _check_disk(folder, plan.nbytes)
    with workplace(out, overwrite=False) as place:
        build(plan, place, (), "regraft verify", time.perf_counter(), keeping=None)
    return load_model(open_checkpoint(locate(out, kind="base")))


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            "not enough disk space for temporary files", where=str(folder.parent),
            expected=f"{needed / 1e9:.2f} GB free", found=f"{free / 1e9:.2f} GB",
            hint="Take fewer prompts, or set TMPDIR to a folder on a larger disk",
        )  # fmt: skip


# -- answers ---------------------------------------------------------------------------------------


def _collect() -> None:
    """Let go of a model, which may be part of a cycle."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _PromptRun:
    """Every prompt through one model after the other.

    Args:
        rows: the prompts.
        folder: for the logits of the first model.
        progress: called after every prompt.
    """

    def __init__(self, rows: _TokenizedPrompts, folder: Path, progress: Progress | None) -> None:
        self._rows, self._folder, self._progress = rows, folder, progress
        self._width = self._done = 0

    def keep(self, model: Any, source: str) -> str:
        """Keep a model's logits; return the device it ran on."""
        import torch

        model, device = _moved(model)
        self._check_vocabulary(model, source)
        for number, ids in enumerate(self._rows.ids):
            logits = _answer(model, ids, device, source)
            if bool(torch.isnan(logits).any()):
                raise NumericError(
                    "base and adapter answer with NaN", where=source,
                    found=f"line {self._rows.prompts[number].line} of the prompts",
                )  # fmt: skip
            if not self._width:
                self._width = int(logits.shape[1])
                _check_disk(self._folder, self._rows.tokens * self._width * 4)
            with typed_os_errors(self._folder):
                logits.cpu().numpy().tofile(self._folder / f"{number}.f32")
            self._tell(len(ids))
        return str(device)

    def compare_base(self, model: Any, source: str) -> list[Tally] | None:
        """Compare as :meth:`compare`; return None if the vocabulary lacks tokens."""
        return None if self._lacks(model) else self.compare(model, source)

    def compare(self, model: Any, source: str) -> list[Tally]:
        """Return how a model's answers agree with those kept, prompt by prompt."""
        model, device = _moved(model)
        self._check_vocabulary(model, source)
        found = []
        for number, ids in enumerate(self._rows.ids):
            kept = self._kept(number, len(ids), device)
            found.append(_tally(kept, _answer(model, ids, device, source)))
            self._tell(len(ids))
        return found

    def _kept(self, number: int, tokens: int, device: Any) -> Any:
        import numpy as np
        import torch

        flat = np.fromfile(self._folder / f"{number}.f32", np.float32)
        return torch.from_numpy(flat.reshape(tokens, self._width)).to(device)

    def _lacks(self, model: Any) -> bool:
        rows = model.get_input_embeddings().weight.shape[0]
        return bool(max(map(max, self._rows.ids)) >= rows)

    def _check_vocabulary(self, model: Any, source: str) -> None:
        if self._lacks(model):
            rows = model.get_input_embeddings().weight.shape[0]
            raise InputError(
                "the tokenizer makes tokens that the model does not have", where=source,
                expected=f"tokens below {rows}", found=str(max(map(max, self._rows.ids))),
            )  # fmt: skip

    def _tell(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            row = 4 * self._width
            total = 3 * self._rows.tokens * row  # base + adapter, merged, base
            self._progress(ProgressEvent("prompts", self._done * row, total))


def _moved(model: Any) -> tuple[Any, Any]:
    """Return a model and where it now is: on the GPU, if there is one with room enough."""
    import torch

    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > SPARE * needed + 2**31:
        return model.to("cuda"), torch.device("cuda")
    return model, torch.device("cpu")


def _answer(model: Any, ids: list[int], device: Any, source: str) -> Any:
    """Return the logits at every token of a prompt, float32, (tokens, vocabulary)."""
    import torch

    row = torch.tensor([ids], device=device)
    try:
        with torch.inference_mode():
            return model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].float()
    except Exception as error:  # whatever a model's own code raises
        if is_out_of_memory(error):
            raise no_memory(source, first_line(error)) from None
        raise UnsupportedError(
            "the model does not answer text alone", where=source, found=first_line(error)
        ) from None


def _tally(kept: Any, answer: Any) -> Tally:
    """Return how two models' logits on one prompt agree, over the tokens that both know."""
    import torch

    width = min(kept.shape[1], answer.shape[1])
    same, total, worst = 0, 0.0, 0.0
    for start in range(0, len(kept), _POSITIONS):
        p = torch.log_softmax(kept[start : start + _POSITIONS, :width].double(), -1)
        q = torch.log_softmax(answer[start : start + _POSITIONS, :width].double(), -1)
        terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
        kl = torch.nan_to_num(terms.sum(-1).clamp(min=0), nan=torch.inf, posinf=torch.inf)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        total, worst = total + float(kl.sum()), max(worst, float(kl.max()))
    return Tally(len(kept), same, total, worst)
