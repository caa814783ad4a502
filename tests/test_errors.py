"""Secrets are hidden where messages are made."""

from __future__ import annotations

import pytest

from regraft import errors
from regraft.errors import InputError, Problem, keep_secret, redacted

TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("https://user:pa55@host/a", "https://***@host/a"),
        ("http://user:p@ss@host", "http://***@host"),
        (
            f"git clone https://{TOKEN}@huggingface.co/a/b",
            "git clone https://***@huggingface.co/a/b",
        ),
        (f"token {TOKEN} is invalid", "token *** is invalid"),
        (f"https://h/a?token={TOKEN}&b=1", "https://h/a?token=***&b=1"),
        ("https://h/a?x=1&X-Amz-Signature=0af9&y=2", "https://h/a?x=1&X-Amz-Signature=***&y=2"),
        ("https://h?X-Amz-Security-Token=a%2Fb", "https://h?X-Amz-Security-Token=***"),
        ("https://h/?Signature=a~b&Key-Pair-Id=K1", "https://h/?Signature=***&Key-Pair-Id=***"),
        ("'authorization': 'Bearer abcdefgh.1'", "'authorization': 'Bearer ***'"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ("bearer abc123def", "bearer ***"),
        ("x-auth-token: abcdefghij", "x-auth-token: ***"),
        ('"access_token": "abcdefghij"', '"access_token": "***"'),
        ("ghp_" + "a1" * 18, "***"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "***"),
    ],
)
def test_tokens_and_credentials_are_hidden(said: str, shown: str) -> None:
    assert redacted(said) == shown


@pytest.mark.parametrize(
    "said",
    [
        "https://huggingface.co/org/name/tree/main", "hf://gpt2@main", "org/name@v1.0",
        "hf_device_map", "hf_quantizer", "model.layers.0.basic_block.weight", "a@b.c",
        "https://huggingface.co/org/name@main", "the token ids 1, 2", "key=value",
        "basic information", "the bearer something",
        "trainable_token_indices", "shard_size=5", "base, adapter",
    ],
)  # fmt: skip
def test_other_words_stay(said: str) -> None:
    assert redacted(said) == said


def test_a_token_that_was_given_is_hidden_whatever_it_looks_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(errors, "_SECRETS", set())
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    for secret in ("my own secret", "short", None):
        keep_secret(secret)
    said = redacted("no access with my own secret or from the environment; short")
    assert said == "no access with *** or ***; short"


def test_every_part_of_a_problem_hides_them() -> None:
    parts = dict.fromkeys(("what", "where", "expected", "found", "hint"), f"see {TOKEN}")
    problem = Problem(**parts)
    assert set(problem.to_json().values()) == {"see ***"}
    assert TOKEN not in str(problem)
    error = InputError(f"got {TOKEN}", found=f"https://a:b@c/{TOKEN}")
    assert TOKEN not in str(error)
    assert "a:b" not in str(error)
    assert TOKEN not in repr(error.problems)
