"""The verb ``probe``: does the adapter of a running server act, and as it should?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from regraft.errors import UsageError
from regraft.probing.report import ProbeReport, PromptProbe, Verdict
from regraft.probing.server import Answer, Server
from regraft.verifying.prompting.file import Prompt, read_prompts

APART = 1e-3
"""Log-probabilities that differ by more are another model's: the same one, asked twice, differs by
less."""

ASKED = tuple(
    Prompt(number, text)
    for number, text in enumerate(
        ("The capital of France is", "def add(a, b):", "Once upon a time"), 1
    )
)
"""What a server is asked where no prompts are given."""

Expected = Callable[[Prompt], Mapping[str, float]]


def probe(
    url: str,
    *,
    adapter: str,
    base: str | None = None,
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
            llama.cpp server's adapter, or the folder for mlx_lm.server.
        base: its name of the base; by default the first model that is not the adapter.
        prompts: a file of prompts, as for :func:`regraft.verify`; a few are at hand.
        expect: the merged model, or base and adapter, that it is to answer as; needs the torch
            extra, and a tokenizer beside the model.
        tokens: how many tokens each answer has at most.
        tolerance: largest difference of a log-probability from the expected one.
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
    server = Server(url, timeout, key)
    of_base, of_adapter = server.sides(adapter, base)
    expected = _expectation(paths) if paths else None
    found = []
    hidden = False
    for prompt in asked:
        plain, adapted = (server.answer(side, prompt, tokens) for side in (of_base, of_adapter))
        hidden |= adapted.logprobs is None or plain.logprobs is None
        found.append(_held(prompt, plain, adapted, expected))
    verdict = _verdict(found, expected is not None, tolerance)
    return ProbeReport(
        server.root, of_base.shown, of_adapter.shown, verdict, tuple(found), tolerance,
        tuple(_notes(hidden, verdict, expected is not None)),
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


def _expectation(paths: Sequence[str | Path]) -> Expected:
    from regraft.probing.expecting import expectation

    return expectation(paths)


def _held(prompt: Prompt, plain: Answer, adapted: Answer, expected: Expected | None) -> PromptProbe:
    wanted = None if expected is None else _apart(adapted.logprobs, expected(prompt))
    apart = _apart(plain.logprobs, adapted.logprobs)
    return PromptProbe(prompt.text, plain.text, adapted.text, apart, wanted)


def _apart(one: Mapping[str, float] | None, other: Mapping[str, float] | None) -> float | None:
    """Return the largest difference over the tokens of both; None where there is none of both."""
    common = (one or {}).keys() & (other or {}).keys()
    if one is None or other is None or not common:
        return None
    return max(abs(one[token] - other[token]) for token in common)


def _verdict(found: Sequence[PromptProbe], is_expected: bool, tolerance: float) -> Verdict:
    differs = any(
        each.base != each.adapter or (each.apart is not None and each.apart > APART)
        for each in found
    )
    seen = all(each.apart is not None for each in found)
    if not differs:
        return "acts as the base" if seen else "cannot be judged"
    if not is_expected:
        return "acts"
    off = [each.from_expected for each in found if each.from_expected is not None]
    if not off:
        return "cannot be judged"
    return "acts" if max(off) <= tolerance else "otherwise than expected"


def _notes(hidden: bool, verdict: Verdict, is_expected: bool) -> list[str]:
    notes = []
    if hidden:
        notes.append(
            "the server hides the log-probabilities of some answers; what is said of these rests "
            "on their text alone"
        )
    if verdict == "cannot be judged" and is_expected:
        notes.append("no answer has a token in common with what was computed")
    return notes
