"""Rows with adapters of their own in modules that do not have the batch first, or nowhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import regraft
from regraft.runtime.forward.mixed_modules import Split, layout_of
from regraft.runtime.model.row_axes import Axis

ROWS = ["a", "b", None]


def adapters_of(base: nn.Module, folder: Path, **config: Any) -> dict[str, tuple[Any, Path]]:
    """Return two adapters, each as PEFT's live model and as its folder."""
    made = {}
    for seed, name in enumerate("ab"):
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **config)).eval()
        draws = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=draws))
        model.save_pretrained(folder / name)
        made[name] = (model, folder / name)
    return made


def attached(base: nn.Module, made: dict[str, tuple[Any, Path]]) -> tuple[nn.Module, Any]:
    model = copy.deepcopy(base)
    handle = regraft.attach(model, made["a"][1], "a")
    handle.load_adapter(made["b"][1], "b")
    return model, handle


class Recurrent(nn.Module):
    """A linear layer and a recurrent one, which has the batch first or second."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.lin, self.first = nn.Linear(4, 4), batch_first
        self.rnn = kind(4, 4, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x)
        y = self.rnn(x if self.first else x.transpose(0, 1))[0]
        return y if self.first else y.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_attention_masks_of_each_head_go_with_their_rows(batch_first: bool) -> None:
    torch.manual_seed(0)
    rows, heads, length, width = 5, 2, 3, 8
    layers = [nn.MultiheadAttention(width, heads, batch_first=batch_first) for _ in range(2)]
    x = torch.randn(rows, length, width)
    x = x if batch_first else x.transpose(0, 1)
    masks = torch.rand(rows * heads, length, length) < 0.4
    masks[:, :, 0] = False  # something is left to look at
    given = {"query": x, "key": x, "value": x, "attn_mask": masks}
    groups = [(0, [0, 3]), (1, [1, 2, 4])]
    layout = layout_of(layers[0], Axis("attention"), given)
    split = Split(layout, groups, given)
    out, weights = split.run(lambda number, taken: layers[number](**taken))
    for number, places in groups:
        expected, of_heads = layers[number](**given)
        axis = 0 if batch_first else 1
        index = torch.tensor(places)
        torch.testing.assert_close(
            out.index_select(axis, index), expected.index_select(axis, index)
        )
        torch.testing.assert_close(weights[index], of_heads[index])


@pytest.mark.parametrize("length", [3, 5, 6])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@torch.no_grad()
def test_recurrent_layers_have_their_rows_where_they_say(
    tmp_path: Path, kind: type[nn.RNNBase], batch_first: bool, length: int
) -> None:
    torch.manual_seed(0)
    base = Recurrent(kind, batch_first).eval()
    made = adapters_of(base, tmp_path, target_modules=["lin"], modules_to_save=["rnn"])
    model, handle = attached(base, made)
    x = torch.randn(3, length, 4)
    with handle.rows(ROWS):
        found = model(x)
    expected = torch.stack([made["a"][0](x)[0], made["b"][0](x)[1], base(x)[2]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(3, 5), (3, 3), (3, 1)])
@torch.no_grad()
def test_experts_that_see_each_token_once_for_each_expert(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, intermediate_size_mlp=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        num_local_experts=2, attention_chunk_size=32, interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    names = [f"feed_forward.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    made = adapters_of(base, tmp_path, target_modules=[], target_parameters=names)
    model, handle = attached(base, made)
    ids = torch.randint(1, 30, size)
    with handle.rows(ROWS):
        found = model(input_ids=ids).logits
    answers = [made["a"][0], made["b"][0], base]
    expected = torch.stack([m(input_ids=ids).logits[i] for i, m in enumerate(answers)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Sorted(nn.Module):
    """A module that takes its inputs in an order of its own, and sizes of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        parts = x.split(sizes)
        return torch.cat([part @ w for part, w in zip(parts, self.weight, strict=True)])


class OfAll(nn.Module):
    """A module whose rows depend on one another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) @ self.weight


class OfAllThroughAdapters(nn.Module):
    """A module whose rows depend on one another by what an adapter adds, and by nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.lin.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        return x + y - y.mean(0, keepdim=True)


@torch.no_grad()
def test_rows_are_tried_out_with_an_adapter_too(tmp_path: Path) -> None:
    base = OfAllThroughAdapters().eval()
    model, handle = attached(base, adapters_of(base, tmp_path, target_modules=["lin"]))
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match="taken apart"):
        model(torch.randn(3, 4))


class Around(nn.Module):
    def __init__(self, inner: nn.Module, *more: Any) -> None:
        super().__init__()
        self.lin, self.inner, self.more = nn.Linear(4, 4), inner, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.lin(x), *self.more)


@pytest.mark.parametrize(
    "base", [Around(Sorted(), [1, 5]), Around(OfAll())], ids=["sorted", "mean"]
)
@torch.no_grad()
def test_rows_that_cannot_be_taken_apart_are_refused(tmp_path: Path, base: nn.Module) -> None:
    base = base.eval()
    made = adapters_of(base, tmp_path, target_modules=["lin"], modules_to_save=["inner"])
    model, handle = attached(base, made)
    x = torch.randn(6, 4)
    with handle.rows(ROWS * 2), pytest.raises(regraft.UnsupportedError, match="taken apart") as e:
        model(x)
    assert "adapters.using" in e.value.problems[0].hint
    with handle.using("a"):
        torch.testing.assert_close(model(x), made["a"][0](x))


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_an_encoder_sees_the_rows_and_the_decoder_the_beams(tmp_path: Path, beams: int) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=48, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=32, init_std=0.3,
    )  # fmt: skip
    base = transformers.BartForConditionalGeneration(config).eval()
    made = adapters_of(base, tmp_path, target_modules=["q_proj", "fc1"])
    model, handle = attached(base, made)
    asked = {"input_ids": torch.randint(6, 48, (3, 5)), "max_new_tokens": 4, "min_new_tokens": 4,
             "num_beams": beams, "do_sample": False}  # fmt: skip
    with handle.rows(ROWS, repeats=beams):
        found = model.generate(**asked)
    answers = [made["a"][0], made["b"][0], base]
    assert found.tolist() == [m.generate(**asked)[i].tolist() for i, m in enumerate(answers)]
