"""The folder that the pages of the docs speak of: tiny real models and adapters by their names."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np

import regraft
from merging import toys

HIDDEN, INTER, HEADS, LAYERS, RANK = 128, 128, 4, 2, 12
ADAPTERS = {
    "adapter": 1, "adapter-v2": 2, "adapter-v3": 3, "adapter-retrained": 4, "my-adapter": 5,
    "sql-adapter": 6, "json-adapter": 7, "sql": 6, "json": 7, "style": 8, "facts": 9, "other": 10,
    "customers/customer-416": 11, "customers/customer-417": 12,
}  # fmt: skip
"""Folder and seed of each."""

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def tokenizer() -> Any:
    """Return a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = TEMPLATE
    return fast


def write_base(folder: Path) -> Path:
    """Write a llama in bfloat16 whose linear layers fit every format, with its tokenizer."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    speaker = tokenizer()
    torch.manual_seed(0)
    tokens = {f"{n}_token_id": getattr(speaker, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(speaker),
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        **tokens,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(max_new_tokens=4, **tokens)  # answers are short
    model.save_pretrained(folder)
    speaker.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter of the base with factors for every q_proj and v_proj."""
    modules = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(LAYERS) for n in "qv"]
    tensors: dict[str, np.ndarray] = {}
    for number, module in enumerate(modules):
        drawn = toys.lora(module, HIDDEN, HIDDEN, RANK, 10 * seed + 2 * number)
        tensors |= {key: value / 8 for key, value in drawn.items()}
    named = {"base_model_name_or_path": "./base", "task_type": "CAUSAL_LM"}
    return toys.write_adapter(folder, tensors, r=RANK, lora_alpha=RANK, **named)


def write_bins(base: Path, folder: Path) -> None:
    """Write the base as it was saved before there were safetensors."""
    import torch
    from safetensors.torch import load_file

    copytree(base, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def write_gguf(path: Path) -> None:
    """Write the base as llama.cpp's converter does."""
    from transformers import AutoModelForCausalLM

    from regraft.testing.gguf_files import converted, write

    model = AutoModelForCausalLM.from_pretrained(path.parent / "base", dtype="float32")
    sizes = {
        "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": INTER,
        "block_count": LAYERS, "attention.head_count": HEADS, "attention.head_count_kv": HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": model.config.vocab_size,
    }  # fmt: skip
    metadata = {f"llama.{key}": value for key, value in sizes.items()}
    write(path, "llama", metadata, converted(model, "llama", "Q8_0"))


def write_image_adapter(root: Path) -> None:
    """Write a UNet of one layer in a pipeline, and an adapter of it as kohya's scripts do."""
    from safetensors.numpy import save_file

    module = "down_blocks.0.attentions.0.to_q"
    config = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2}
    toys.write_base(root / "pipeline" / "unet", {f"{module}.weight": toys.draw(8, 8)}, config)
    name = f"lora_unet_{module.replace('.', '_')}"
    factors = {
        f"{name}.lora_down.weight": toys.draw(2, 8),
        f"{name}.lora_up.weight": toys.draw(8, 2),
    }
    save_file(factors, root / "style-sd.safetensors")


def write_world(root: Path) -> Path:
    """Write everything that a page may find, and return the folder."""
    base = write_base(root / "base")
    copytree(base, root / "model")
    write_bins(base, root / "model-with-bin-files")
    for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "base.gguf"):
        write_gguf(root / name)
    for name, seed in ADAPTERS.items():
        write_adapter(root / name, seed)
    for name in ("base-4bit", "model-4bit"):
        regraft.quantize(base, root / name, "nf4")
    both: list[str | Path] = [f"{root / 'style'}=0.5", root / "facts"]
    regraft.merge(base, both, root / "merged-by-peft", undo=False)
    copytree(root / "merged-by-peft", root / "models" / "merged")
    regraft.merge(base, root / "adapter", root / "merged")
    regraft.merge(base, root / "facts", root / "tuned", undo=False)
    write_image_adapter(root)
    (root / "prompts.txt").write_text("List all users\nWho is it?\n")
    return root
