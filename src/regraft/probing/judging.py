"""What a server's answers say of its adapter, held against each other and against the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from regraft.probing.report import PromptProbe, Verdict
from regraft.probing.server import Answer, Token
from regraft.verifying.prompting.file import Prompt

if TYPE_CHECKING:
    from regraft.probing.expecting import Expected

APART = 1e-3
"""Log-probabilities that differ by more are another model's: the same one, asked twice, differs by
less."""

BASES_OWN = 2
"""How many times as far as the base an adapter may be from what is expected."""


def held(prompt: Prompt, plain: Answer, adapted: Answer, expected: Expected | None) -> PromptProbe:
    """Return how far the answers to a prompt are apart, and from what was expected."""
    return PromptProbe(
        prompt.text, plain.text, adapted.text, _apart(plain.logprobs, adapted.logprobs),
        _apart(adapted.logprobs, expected.adapter if expected else None),
        _apart(plain.logprobs, expected.base if expected else None),
    )  # fmt: skip


def _apart(one: Mapping[Token, float] | None, other: Mapping[Token, float] | None) -> float | None:
    """Return the largest difference over the tokens of both; None where there is none of both."""
    common = (one or {}).keys() & (other or {}).keys()
    if one is None or other is None or not common:
        return None
    return max(abs(one[token] - other[token]) for token in common)


def allowance(
    found: Sequence[PromptProbe], adapted: Sequence[Answer], expected: Sequence[Expected | None]
) -> float:
    """Return how far an adapter may be from what is expected because the server's base is.

    A server that computes in 16 bits, or whose base is quantized, is off without any adapter. No
    more is allowed than half of what the adapter moves, so that another base is not let through.
    """
    off = [each.base_from_expected for each in found if each.base_from_expected is not None]
    moved = [_moved(answer, each) for answer, each in zip(adapted, expected, strict=True) if each]
    most = max((each for each in moved if each is not None), default=0.0)
    return min(BASES_OWN * max(off, default=0.0), most / 2)


def _moved(answer: Answer, expected: Expected) -> float | None:
    """Return how far the adapter is to move the tokens of an answer."""
    told = (answer.logprobs or {}).keys() & expected.adapter.keys()
    return _apart({token: expected.adapter[token] for token in told}, expected.base)


def verdict_of(found: Sequence[PromptProbe], is_expected: bool, allowed: float) -> Verdict:
    """Return what all answers say."""
    differs = any(
        each.base != each.adapter or (each.apart is not None and each.apart > APART)
        for each in found
    )
    if not differs:
        seen = all(each.apart is not None for each in found)
        return "acts as the base" if seen else "cannot be judged"
    if not is_expected:
        return "acts"
    off = [each.from_expected for each in found if each.from_expected is not None]
    if any(value > allowed for value in off):
        return "otherwise than expected"
    return "acts" if len(off) == len(found) else "cannot be judged"


# -- notes -----------------------------------------------------------------------------------------

HIDDEN = (
    "the server hides the log-probabilities of some answers; what is said of these rests on their "
    "text alone"
)
NOTHING_IN_COMMON = (
    "answers have no token in common with what was computed, or come without log-probabilities"
)
BASE_IS_OFF = (
    "the server's base is off, too, as with 16 bits or quantized weights: up to {:.2g} was allowed"
)
BASE_IS_NOT_SEEN = (
    "given base and adapter in place of the merged model, it is seen whether the server's base is "
    "off, too, as with 16 bits or quantized weights"
)
OTHER_TOKENS = (
    "the server cut a prompt into {} tokens, and the tokenizer beside the model into {}: the "
    "server's tokenizer, or its template of chats, is another one"
)


def notes_on_answers(
    plain: Sequence[Answer], adapted: Sequence[Answer], expected: Sequence[Expected | None]
) -> list[str]:
    """Return what the user should know of the answers: what is hidden, what was read otherwise."""
    notes = []
    if any(answer.logprobs is None for answer in (*plain, *adapted)):
        notes.append(HIDDEN)
    for answer, each in zip(adapted, expected, strict=True):
        if each and answer.prompt_tokens not in (None, each.prompt_tokens):
            return [*notes, OTHER_TOKENS.format(answer.prompt_tokens, each.prompt_tokens)]
    return notes


def notes_on_verdict(verdict: Verdict, given: int, allowed: float, tolerance: float) -> list[str]:
    """Return what the user should know of the verdict; ``given`` is how many models were."""
    if verdict == "cannot be judged" and given:
        return [NOTHING_IN_COMMON]
    if allowed > tolerance:
        return [BASE_IS_OFF.format(allowed)]
    if verdict == "otherwise than expected" and given == 1:
        return [BASE_IS_NOT_SEEN]
    return []
