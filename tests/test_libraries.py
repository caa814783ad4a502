"""What comes with a model and runs: a chat template."""

from __future__ import annotations

from typing import Any

import pytest

from regraft import libraries
from regraft.errors import InputError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


MESSAGES = [{"role": "user", "content": "hello"}]


def test_messages_are_written_as_the_template_says(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert libraries.from_template(tokenizer, MESSAGES) == "hello>"
    assert libraries.from_template(tokenizer, MESSAGES, add_generation_prompt=False) == "hello"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{{ messages + 1 }}",
        "{{ strftime_now(1) }}",
        "{% include 'x' %}",
        "{{ raise_exception|tojson }}",
        "{{ raise_exception('no system prompt') }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{% for %}",
    ],
)
def test_a_template_that_fails_is_an_input_error(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template refuses") as caught:
        libraries.from_template(tokenizer, MESSAGES, hint="Do without")
    assert "Do without" in str(caught.value)


def test_a_template_that_does_not_end_is_given_up(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "TEMPLATE_SECONDS", 0.05)
    loop = "{% for i in range(9999) %}"
    tokenizer.chat_template = loop + "{% for j in range(900) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"no end after 0\.05 s"):
        libraries.from_template(tokenizer, MESSAGES)
