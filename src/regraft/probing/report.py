"""What a probe of a server found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["acts", "acts as the base", "otherwise than expected", "cannot be judged"]


@dataclass(frozen=True)
class PromptProbe:
    """What a server answered to one prompt.

    Attributes:
        prompt: its text; the last message of a chat.
        base, adapter: the answers of both.
        apart: largest difference between their log-probabilities of the first token, None where the
            server hides them or they have no token in common.
        from_expected: the same between the adapter's and what regraft computes; None where nothing
            was expected.
        base_from_expected: the same of the base; None where it was not computed.
    """

    prompt: str
    base: str
    adapter: str
    apart: float | None
    from_expected: float | None
    base_from_expected: float | None = None


@dataclass(frozen=True)
class ProbeReport:
    """Whether the adapter of a running server acts.

    Attributes:
        url: the server's address.
        engine: its kind: ``vllm``, ``sglang``, ``llama.cpp`` or ``mlx``; ``openai`` for any other.
        base, adapter: its names of both.
        verdict: what its answers say.
        prompts: what it answered.
        tolerance: the largest difference from what was expected that counted as none.
        notes: what the user should know, such as hidden log-probabilities.
    """

    url: str
    engine: str
    base: str
    adapter: str
    verdict: Verdict
    prompts: tuple[PromptProbe, ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the adapter acts, and as expected."""
        return self.verdict == "acts"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self) | {"ok": self.ok}
