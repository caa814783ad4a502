"""What a model makes of the demo's task and of plain English, against another model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import regraft
from regraft.demo.steps.answers import prompt_ids
from regraft.demo.steps.data import HELD_OUT_WORDS, make_examples
from regraft.formats.safetensors import read_header

PROSE = Path(__file__).resolve().parent / "general_text.txt"


@dataclass(frozen=True)
class Texts:
    """What models are asked: token ids, and from where on they are predicted.

    Attributes:
        task: of each held-out sentence prompt and answer, and the length of the prompt.
        prose: of each passage, and 1.
    """

    task: list[tuple[list[int], int]]
    prose: list[tuple[list[int], int]]


@dataclass(frozen=True)
class Predictions:
    """Logits where the next token is known, float32 (tokens, vocabulary), and these tokens."""

    logits: torch.Tensor
    tokens: torch.Tensor

    @property
    def loss(self) -> float:
        """Mean cross entropy, nats per token."""
        return float(torch.nn.functional.cross_entropy(self.logits, self.tokens))


@dataclass(frozen=True)
class Seen:
    """A model's predictions on both texts."""

    task: Predictions
    prose: Predictions


def texts(tokenizer: Any, sentences: int) -> Texts:
    """Return the held-out sentences with their answers, and the passages of prose."""
    task = []
    for example in make_examples(HELD_OUT_WORDS, sentences, seed=1):
        prompt = prompt_ids(tokenizer, example.sentence)
        answer = example.answer + tokenizer.eos_token
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        task.append((prompt + ids, len(prompt)))
    passages = PROSE.read_text("utf-8").split("\n\n")
    prose = [(tokenizer(each, add_special_tokens=False)["input_ids"], 1) for each in passages]
    return Texts(task, prose)


def seen(model: Any, asked: Texts) -> Seen:
    """Return what a model predicts."""
    return Seen(_predictions(model, asked.task), _predictions(model, asked.prose))


def _predictions(model: Any, rows: list[tuple[list[int], int]]) -> Predictions:
    logits, tokens = [], []
    for ids, begin in rows:
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([ids])).logits[0]
        logits.append(out[begin - 1 : -1].float())
        tokens.append(torch.tensor(ids[begin:]))
    return Predictions(torch.cat(logits), torch.cat(tokens))


def divergence(exact: Predictions, other: Predictions) -> float:
    """Return KL(exact || other) in nats, the mean over tokens, computed in float64."""
    total = 0.0
    for p, q in zip(exact.logits.split(64), other.logits.split(64), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(exact.tokens)


def plain_model(folder: Path) -> Any:
    """Return a checkpoint of plain weights, all computation in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def four_bit_model(folder: Path) -> Any:
    """Return a 4-bit checkpoint as transformers and bitsandbytes load it.

    Raises:
        RuntimeError: not all of it is used, or its linear layers are none of bitsandbytes.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    bad = {kind: names for kind, names in info.items() if names}
    layers = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    if bad or not layers:
        raise RuntimeError(f"{folder}: {layers} layers in 4 bits, {bad}")
    return model.eval()


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def dequantized(folder: Path) -> Path:
    """Return a 4-bit checkpoint as plain weights, the values that bitsandbytes computes."""
    out = folder.with_name(f"{folder.name}-values")
    regraft.dequantize(folder, out, overwrite=True)
    return out


def kept(base: Path, exact: Path, other: Path) -> tuple[float, float]:
    """Return what a receipt says, from plain weights: the share of the delta, and the noise.

    Returns:
        <Q - W, delta> / <delta, delta> and |Q - W - delta| / |W| over all tensors that the exact
        merge changed.
    """
    along = deltas = rest = weights = 0.0
    tensors = [_tensors(folder) for folder in (base, exact, other)]
    for name in tensors[1]:
        w, merged, q = (_values(each[name]) for each in tensors)
        delta, moved = merged - w, q - w
        size = float(np.vdot(delta, delta))
        if not size:
            continue
        along, deltas = along + float(np.vdot(moved, delta)), deltas + size
        rest += float(np.vdot(moved - delta, moved - delta))
        weights += float(np.vdot(w, w))
    return along / deltas, (rest / weights) ** 0.5


def _tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= read_header(path).tensors
    return found


def _values(spec: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a plain tensor's values, float64, flat."""
    raw = np.fromfile(spec.path, np.uint8, spec.nbytes, offset=spec.start)
    if spec.dtype == "F32":
        return raw.view(np.float32).astype(np.float64)
    if spec.dtype != "BF16":
        raise ValueError(f"{spec.name}: {spec.dtype}")
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
