"""Ask a model the demo's questions, and read its logits on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from regraft.demo.steps.compare import Logits
from regraft.demo.steps.data import INSTRUCTION, Example

MAX_NEW_TOKENS = 22
"""Room for the longest right answer, and enough to see a wrong one."""


class Asker:
    """A model with its tokenizer; every computation is float32.

    Args:
        folder: a checkpoint, as ``AutoModelForCausalLM.from_pretrained`` takes it.
        four_bits: put the linear layers into bitsandbytes' NF4 while they are read.

    Attributes:
        model: the model itself.
    """

    def __init__(self, folder: Path, *, four_bits: bool = False) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        options = {"quantization_config": _nf4(), "device_map": "cpu"} if four_bits else {}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        self.model.eval()

    def answers(self, sentences: Sequence[str]) -> list[str]:
        """Return the model's answer to each sentence, by greedy decoding in one batch."""
        prompts = [prompt_ids(self._tokenizer, sentence) for sentence in sentences]
        ids, mask = _padded_left(prompts, self._tokenizer.pad_token_id)
        with torch.inference_mode(), _one_thread():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS
            )
        texts = self._tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def logits(self, examples: list[Example]) -> Logits:
        """Return the logits at every token of prompts and right answers.

        Shape (positions, vocabulary), sentence after sentence.
        """
        texts = [prompt(self._tokenizer, e.sentence) + e.answer for e in examples]
        rows = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids, mask = _padded_left(rows, self._tokenizer.pad_token_id)
        with torch.inference_mode():
            out = self.model(input_ids=ids, attention_mask=mask).logits
        logits: Logits = out[mask.bool()].numpy().astype(np.float32, copy=False)
        return logits


def _nf4() -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: for one token, more threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prompt(tokenizer: Any, sentence: str) -> str:
    """Return the chat that asks for the fields in ``sentence``, up to where the answer starts."""
    chat = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": sentence},
    ]
    text: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text


def prompt_ids(tokenizer: Any, sentence: str) -> list[int]:
    """Return the token ids of :func:`prompt`."""
    text = prompt(tokenizer, sentence)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _padded_left(rows: list[list[int]], pad: int) -> tuple[Any, Any]:
    """Return token ids and mask, (batch, length), with every row ending at the same place."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
    return ids, mask
