"""The verb ``probe``: does the adapter of a running server act, and as it should?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.errors import UsageError
from regraft.probing.client import Client
from regraft.probing.judging import allowance, held, notes_on_answers, notes_on_verdict, verdict_of
from regraft.probing.report import ProbeReport
from regraft.probing.server import Server
from regraft.verifying.prompting.file import Prompt, read_prompts

if TYPE_CHECKING:
    from regraft.probing.expecting import Expected

ASKED = tuple(
    Prompt(number, text)
    for number, text in enumerate(
        ("The capital of France is", "def add(a, b):", "Once upon a time"), 1
    )
)
"""What a server is asked where no prompts are given."""


def probe(
    url: str,
    *,
    adapter: str,
    base: str | None = None,
    engine: str | None = None,
    prompts: str | Path | None = None,
    expect: str | Path | Sequence[str | Path] | None = None,
    tokens: int = 16,
    tolerance: float = 0.1,
    timeout: float = 60.0,
    key: str | None = None,
) -> ProbeReport:
    """Ask a server that speaks OpenAI's API whether an adapter acts.

    Answers and log-probabilities of the base and of the adapter are held against each other, and,
    given the files, against what regraft computes.

    Args:
        url: the server's address, such as ``http://localhost:8000``.
        adapter: its name of the adapter: a model's name (vLLM, SGLang), the number or file of a
            llama.cpp server's adapter; for mlx_lm.server the folder, or ``default_model`` for what
            it was started with.
        base: its name of the base; by default the adapter's parent or the first model that is not
            the adapter, and with mlx_lm.server the model that it was started with.
        engine: the kind of server: ``vllm``, ``sglang``, ``llama.cpp`` or ``mlx``; by default what
            the server says itself.
        prompts: a file of prompts, as for :func:`regraft.verify`; a few are at hand.
        expect: the merged model, or base and adapter, that it is to answer as; needs the torch
            extra, and a tokenizer beside the model.
        tokens: how many tokens each answer has at most.
        tolerance: largest difference of a log-probability from the expected one; where base and
            adapter are given, twice as much as the server's base differs from it is allowed, too.
        timeout: seconds to wait for each answer.
        key: what the server is asked with, if it wants a key.

    Returns:
        The report. Log-probabilities that the server hides are said; without them, and with equal
        answers, nothing can be judged.

    Raises:
        UsageError: the address is none, or ``expect`` is neither a model nor a base and an adapter.
        InputError: no server answers there, it has no such model, or speaks otherwise.
        EnvironmentShortfall: what is expected cannot be computed.
    """
    asked = tuple(read_prompts(Path(prompts))) if prompts is not None else ASKED
    paths = _paths(expect)
    client = Client(url, timeout, key)
    server = Server(client, engine)
    sides = server.sides(adapter, base)
    expected = _expected(paths, asked) if paths else (None,) * len(asked)
    # One side after the other: some servers load a model anew whenever another is asked for.
    plain, adapted = (
        [server.answer(side, prompt, tokens) for prompt in asked]
        for side in (sides.base, sides.adapter)
    )
    found = tuple(map(held, asked, plain, adapted, expected))
    allowed = max(tolerance, allowance(found, adapted, expected))
    verdict = verdict_of(found, bool(paths), allowed)
    notes = (
        *sides.notes, *notes_on_answers(plain, adapted, expected),
        *notes_on_verdict(verdict, len(paths), allowed, tolerance),
    )  # fmt: skip
    return ProbeReport(
        client.root, server.kind.name, sides.base.shown, sides.adapter.shown, verdict, found,
        allowed, notes,
    )  # fmt: skip


def _paths(expect: str | Path | Sequence[str | Path] | None) -> tuple[str | Path, ...]:
    if expect is None:
        return ()
    paths = (expect,) if isinstance(expect, str | Path) else tuple(expect)
    if len(paths) not in (1, 2):
        raise UsageError("it can be expected to answer as one model", where="--expect",
                         expected="MERGED, or BASE and ADAPTER",
                         found=f"{len(paths)} names")  # fmt: skip
    return paths


def _expected(paths: Sequence[str | Path], asked: Sequence[Prompt]) -> tuple[Expected, ...]:
    from regraft.probing.expecting import expected_answers

    return expected_answers(paths, asked)
