"""With the same seed a new adapter begins as PEFT's does, and is trained as PEFT's is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn

import regraft
from regraft.errors import UnsupportedError, UsageError
from regraft.runtime.model.live_base import LiveBase
from regraft.runtime.training.new_adapter import new_adapter
from regraft.testing.zoo import example_inputs, make_model
from runtime.training.test_new_adapter import CASES, EXPERTS, logits_of, name_of, their_tensors

OTHER_STARTS = (False, "gaussian")
IN_16_BITS = ("gpt2", "qwen2_tied", "toynet")
"""Bases whose cases are tried in 16 bits too, where PEFT rounds what it has drawn."""

TABLE = [
    *((case, True, torch.float32) for case in CASES),
    *((case, OTHER_STARTS[at % 2], torch.float32) for at, case in enumerate(CASES)),
    *((case, True, torch.bfloat16) for case in CASES if case[0] in IN_16_BITS),
    *((case, False, torch.float16) for case in CASES if case[1].get("use_dora")),
]
ORTHOGONAL: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {"up_proj": 6}}),
    ("gpt2", {"target_modules": ["c_attn"]}),
]
TABLE += [(case, "orthogonal", dtype) for case in ORTHOGONAL
          for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip


def settings_of(case: tuple[str, dict[str, Any]], start: Any, **more: Any) -> dict[str, Any]:
    given = {"r": 4, "lora_alpha": 5, "init_lora_weights": start, **copy.deepcopy(case[1]), **more}
    if given.get("lora_bias") and not isinstance(start, bool):
        del given["lora_bias"]  # PEFT refuses the two together
    return given


def base_of(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    return make_model(architecture).to(dtype)


def theirs(model: Any, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, peft.LoraConfig(**copy.deepcopy(settings)))


def label(value: Any) -> str:
    return name_of(value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("case", "start", "dtype"), TABLE, ids=label)
def test_the_same_seed_draws_the_same_adapter(
    case: tuple[str, dict[str, Any]], start: Any, dtype: torch.dtype
) -> None:
    settings = settings_of(case, start)
    torch.manual_seed(7)
    expected = their_tensors(theirs(base_of(case[0], dtype), settings))
    after = torch.get_rng_state()
    torch.manual_seed(7)
    found = new_adapter(LiveBase(base_of(case[0], dtype)), settings, "new").tensors
    assert found.keys() == expected.keys()
    assert [k for k in found if not torch.equal(found[k], expected[k].float())] == []
    assert all(tensor.dtype == torch.float32 and tensor.requires_grad for tensor in found.values())
    assert torch.equal(torch.get_rng_state(), after)  # what is drawn next is the same, too


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_factors_of_the_weight_are_pefts_but_for_rounding_and_signs(start: str) -> None:
    settings = settings_of(("llama", {"target_modules": ["q_proj", "down_proj"]}), start)
    torch.manual_seed(7)
    expected = their_tensors(theirs(base_of("llama"), settings))
    after = torch.get_rng_state()
    torch.manual_seed(7)
    found = new_adapter(LiveBase(base_of("llama")), settings, "new").tensors
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.abs(), expected[key].abs(), rtol=1e-3, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_second_adapter_goes_on_drawing_as_pefts_second_does() -> None:
    first, second = (
        {"r": 4, "target_modules": names} for names in (["q_proj"], ["q_proj", "v_proj"])
    )
    torch.manual_seed(7)
    peft_model = theirs(base_of("llama"), first)
    peft_model.add_adapter("b", peft.LoraConfig(**second))
    expected = peft.get_peft_model_state_dict(peft_model, adapter_name="b")
    torch.manual_seed(7)
    adapters = regraft.attach(base_of("llama"), first, "a")
    adapters.add_adapter("b", second)
    found = adapters.adapter("b").tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


TRAINED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear", "lora_dropout": 0.2}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "lora_dropout": 0.1}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "lora_dropout": 0.1,
               "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5],
               "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "orthogonal"}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all", "lora_dropout": 0.1}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ("toynet", {"target_modules": ["conv1d", "conv2d", "head"], "use_dora": True}),
    ("toynet", {"target_modules": ["conv1d", "conv2d", "head"], "lora_dropout": 0.2}),
]  # fmt: skip


def losses(model: nn.Module, parameters: Iterable[nn.Parameter], inputs: Any) -> list[float]:
    """Return the losses of three optimizer steps."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01)
    found = []
    for _ in range(3):
        loss = logits_of(model(**inputs)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in TRAINED),
        *((case, torch.bfloat16) for case in TRAINED[:2]),
    ],
    ids=label,
)
def test_the_losses_of_three_steps_are_pefts(
    case: tuple[str, dict[str, Any]], dtype: torch.dtype
) -> None:
    settings, inputs = settings_of(case, True) | case[1], example_inputs(case[0])
    torch.manual_seed(3)
    model = theirs(base_of(case[0], dtype), settings)
    expected = losses(model, model.parameters(), inputs)
    torch.manual_seed(3)
    live = base_of(case[0], dtype)
    adapters = regraft.attach(live, settings, "new")
    found = losses(live, adapters.parameters(), inputs)
    assert expected[2] != pytest.approx(expected[0], rel=1e-3)
    assert found == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 0.01)


@pytest.mark.parametrize(
    ("architecture", "settings", "error", "message"),
    [
        ("llama", {"target_modules": ["q_proj"], "r": 3}, UnsupportedError, "even rank"),
        ("toynet", {"target_modules": ["conv1d"]}, UnsupportedError, "for linear layers"),
        ("qwen2_tied", {"target_modules": ["embed_tokens", "lm_head"],
                        "ensure_weight_tying": True}, UnsupportedError, "factors of its own"),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, UsageError, "'lora_bias'"),
    ],
)  # fmt: skip
def test_an_orthogonal_start_is_refused_where_peft_has_none(
    architecture: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = {"r": 4, "init_lora_weights": "orthogonal", **settings}
    with pytest.raises(error, match=message):
        regraft.attach(base_of(architecture), config, "new")
