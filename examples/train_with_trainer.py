"""Train a new adapter with transformers' Trainer, and save it in PEFT's format.

python examples/train_with_trainer.py BASE OUT
"""

from __future__ import annotations

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import regraft

TEXTS = ["List all users -> SELECT * FROM users;", "Count the users -> SELECT count(*) FROM users;"]


def main(base: str, out: str, steps: int = 30) -> None:
    """Train on two lines, and say how the loss fell."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapters = regraft.attach(model)
    config = regraft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapters.add_adapter("sql", config)
    adapters.set_adapter("sql")

    settings = TrainingArguments(
        f"{out}.run", max_steps=int(steps), learning_rate=1e-3, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=not next(model.parameters()).is_cuda,
    )  # fmt: skip
    data = [tokenizer(text) for text in TEXTS]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(adapters.for_trainer(), settings, train_dataset=data, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapters.save_pretrained(out, "sql")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {out}")


if __name__ == "__main__":
    if len(sys.argv) <= 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
