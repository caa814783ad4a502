"""What a server should answer: the next token's log-probabilities, computed from the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import UnsupportedError
from regraft.formats.hub import locate
from regraft.libraries import require
from regraft.merging.inputs.base import open_base
from regraft.probing.server import Token
from regraft.verifying.prompting.file import Prompt
from regraft.verifying.prompting.models import load_model


@dataclass(frozen=True)
class Expected:
    """What a server should answer to a prompt.

    Attributes:
        adapter: log-probabilities of the next token, by its number and by its text.
        base: the same of the base, None where it was not computed.
        prompt_tokens: into how many tokens the prompt is cut.
    """

    adapter: Mapping[Token, float]
    base: Mapping[Token, float] | None
    prompt_tokens: int


def expected_answers(
    paths: Sequence[str | Path], prompts: Sequence[Prompt]
) -> tuple[Expected, ...]:
    """Return what should be answered to each prompt.

    Args:
        paths: a merged model; or a base and an adapter, of which the base's answers are computed,
            too.
        prompts: what is asked.

    Raises:
        MissingExtraError: torch or transformers are not there.
        RegraftError: the files cannot be loaded.
    """
    require("torch", "transformers", why="Computing what is expected", where="--expect")
    folder = locate(paths[0], kind="base")
    tokenizer = _tokenizer(folder.path)
    asked = [_ids(tokenizer, prompt) for prompt in prompts]
    plain = _answers(load_model(open_base(folder)), tokenizer, asked)
    if len(paths) == 1:
        return tuple(Expected(ours, None, len(ids)) for ours, ids in zip(plain, asked, strict=True))
    merged = _answers(_merged(paths), tokenizer, asked)
    return tuple(
        Expected(ours, base, len(ids)) for ours, base, ids in zip(merged, plain, asked, strict=True)
    )


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


def _ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    found: list[int] = (
        tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if prompt.messages
        else tokenizer(prompt.text)["input_ids"]
    )
    return found


def _answers(
    model: Any, tokenizer: Any, asked: Sequence[Sequence[int]]
) -> list[dict[Token, float]]:
    """Return the log-probabilities after each prompt."""
    import torch

    texts = _texts(tokenizer, int(model.config.get_text_config().vocab_size))
    found = []
    for ids in asked:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        values: list[float] = torch.log_softmax(logits, -1).tolist()
        by: dict[Token, float] = dict(enumerate(values))
        found.append(by | {text: values[i] for i, text in enumerate(texts) if text is not None})
    return found
