"""Train a new adapter with TRL's SFTTrainer, and save it in PEFT's format.

pip install trl
python examples/train_with_sft.py BASE OUT
"""

from __future__ import annotations

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import regraft

ROWS = [
    {"prompt": "List all users", "completion": " SELECT * FROM users;"},
    {"prompt": "Count the users", "completion": " SELECT count(*) FROM users;"},
]


def main(base: str, out: str, steps: int = 30) -> None:
    """Train on two rows, and say how the loss fell."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapters = regraft.attach(model)
    adapters.add_adapter("sql", regraft.LoraConfig(r=8, lora_alpha=16))
    adapters.set_adapter("sql")

    settings = SFTConfig(
        f"{out}.run", max_steps=int(steps), learning_rate=1e-3, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, max_length=64, bf16=False,
        use_cpu=not next(model.parameters()).is_cuda,
    )  # fmt: skip
    trainer = SFTTrainer(
        adapters.for_trainer(), settings, train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapters.save_pretrained(out, "sql")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {out}")


if __name__ == "__main__":
    if len(sys.argv) <= 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
