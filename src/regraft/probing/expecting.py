"""What a server should answer: the next token's log-probabilities, computed from the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.errors import UnsupportedError
from regraft.formats.hub import locate
from regraft.libraries import require
from regraft.merging.inputs.base import open_base
from regraft.verifying.prompting.file import Prompt
from regraft.verifying.prompting.models import load_model


def expectation(paths: Sequence[str | Path]) -> Callable[[Prompt], Mapping[str, float]]:
    """Return what gives the log-probabilities of each next token, by its text.

    Args:
        paths: a merged model; or a base and an adapter.

    Raises:
        MissingExtraError: torch or transformers are not there.
        RegraftError: the files cannot be loaded.
    """
    require("torch", "transformers", why="Computing what is expected", where="--expect")
    folder = locate(paths[0], kind="base")
    model = load_model(open_base(folder)) if len(paths) == 1 else _merged(paths)
    tokenizer = _tokenizer(folder.path)
    texts = _texts(tokenizer, int(model.config.get_text_config().vocab_size))
    return lambda prompt: _answer(model, tokenizer, texts, prompt)


def _merged(paths: Sequence[str | Path]) -> Any:
    from regraft.runtime.merged_loading import load_merged

    return load_merged(paths[0], paths[1], dtype="float32").eval()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            "there is no tokenizer to read the prompts with", where=str(folder),
            found=str(error).partition("\n")[0],
            hint="Put the model's tokenizer beside it",
        ) from None  # fmt: skip


def _texts(tokenizer: Any, size: int) -> list[str | None]:
    """Return the text of each token, None where several have the same."""
    texts = [tokenizer.decode([token]) for token in range(min(size, len(tokenizer)))]
    counts = Counter(texts)
    return [text if counts[text] == 1 else None for text in texts]


def _answer(
    model: Any, tokenizer: Any, texts: Sequence[str | None], prompt: Prompt
) -> dict[str, float]:
    import torch

    if prompt.messages:
        ids = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = tokenizer(prompt.text)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
    values = torch.log_softmax(logits, -1).tolist()
    return {text: values[i] for i, text in enumerate(texts) if text is not None}
