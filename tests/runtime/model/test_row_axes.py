"""Which row of a batch an input belongs to: known by class, found for whole models, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import regraft
from regraft.runtime.model.row_axes import OTHERWISE
from runtime.toys import Experts

ROWS: list[Any] = ["a", "b", None, "a"]


class Transposed(nn.Module):
    """Time first inside, as many models of their own have it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, time, 6) of the same."""
        return self.out(torch.tanh(self.lin(x.transpose(0, 1)))).transpose(0, 1)


class TimeMajorTokens(Transposed):
    """Tokens flattened with time first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, time, 6) of the same."""
        batch, time, width = x.shape
        y = self.lin(x.transpose(0, 1).reshape(-1, width))
        return self.out(torch.tanh(y)).reshape(time, batch, width).transpose(0, 1)


class SortedTokens(Transposed):
    """Half of all tokens go through each layer, whatever rows they are of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, time, 6) of the same."""
        flat = x.flatten(0, 1)
        order = flat[:, 0].argsort()
        low, high = order.chunk(2)
        y = torch.zeros_like(flat)
        y[low], y[high] = self.lin(flat[low]), self.out(flat[high])
        return y.reshape(x.shape) + (x.sum() * 0)


class OfExperts(Transposed):
    """A stack of experts under a name of its own, with as many experts as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = Experts()
        self.lin = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return (batch, 12) of (batch, time, 6)."""
        return {"answer": self.bank(self.lin(x).mean(1))}


class Recurrent(Transposed):
    """A recurrent layer with time first."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, time, 6) of the same."""
        return self.gru(self.lin(x).transpose(0, 1))[0].transpose(0, 1)


def attached(
    build: Callable[[], nn.Module], folder: Path, **config: Any
) -> tuple[nn.Module, regraft.Adapters]:
    """Return a model with two adapters that answer differently."""
    torch.manual_seed(0)
    base = build().eval()
    handle = regraft.attach(copy.deepcopy(base))
    for number, name in enumerate("ab"):
        live = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **config))
        torch.manual_seed(10 + number)
        for key, parameter in live.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.data.normal_(std=0.5)
        live.save_pretrained(folder / name)
        handle.load_adapter(folder / name, name)
    return handle.model, handle


def answer(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Return what a model answers, as one tensor."""
    with torch.no_grad():
        found = model(**inputs)
    if isinstance(found, dict):
        found = (
            found["answer"]
            if "answer" in found
            else found[0 if "logits" not in found else "logits"]
        )
    return found


def assert_row_by_row(model: nn.Module, handle: regraft.Adapters, inputs: dict[str, Any]) -> None:
    """Fail unless each row answers as with its adapter alone, and adapters differ."""
    with handle.rows(ROWS):
        found = answer(model, inputs)
    for place, row in enumerate(ROWS):
        with handle.using(row):
            alone = answer(model, {k: v[place : place + 1] for k, v in inputs.items()})[0]
        with handle.using("b" if row == "a" else "a"):
            other = answer(model, {k: v[place : place + 1] for k, v in inputs.items()})[0]
        torch.testing.assert_close(found[place], alone, rtol=1e-4, atol=1e-5)
        assert (alone - other).abs().max() > 1e-3


OWN: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "time-first": (Transposed, {"target_modules": ["lin", "out"]}),
    "tokens-flattened-time-first": (TimeMajorTokens, {"target_modules": ["lin", "out"]}),
    "experts": (OfExperts, {"target_modules": ["lin"], "target_parameters": ["bank.weight"]}),
    "recurrent": (Recurrent, {"target_modules": ["lin"], "modules_to_save": ["gru"]}),
}


@pytest.mark.parametrize("time", [4, 5, 8])
@pytest.mark.parametrize("kind", OWN)
def test_rows_of_a_model_of_ones_own_do_not_go_by_lengths(
    kind: str, time: int, tmp_path: Path
) -> None:
    build, config = OWN[kind]
    model, handle = attached(build, tmp_path, **config)
    torch.manual_seed(1)
    assert_row_by_row(model, handle, {"x": torch.randn(4, time, 6)})


def test_tokens_sorted_over_all_rows_are_refused(tmp_path: Path) -> None:
    model, handle = attached(SortedTokens, tmp_path, target_modules=["lin", "out"])
    torch.manual_seed(1)
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match="taken apart"):
        model(torch.randn(4, 4, 6))


def test_a_layer_called_by_itself_is_refused_and_not_guessed_at(tmp_path: Path) -> None:
    model, handle = attached(Transposed, tmp_path, target_modules=["lin"])
    lin: Any = model.lin
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match=r"lin.*adapters\.using"):
        lin(torch.randn(4, 4, 6))


def test_a_loss_over_all_rows_is_no_answer_row_by_row(tmp_path: Path) -> None:
    class WithLoss(Transposed):
        def forward(self, x: torch.Tensor) -> Any:
            return {"loss": self.lin(x).square().mean()}

    model, handle = attached(WithLoss, tmp_path, target_modules=["lin"])
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match="what comes out"):
        model(torch.randn(4, 4, 6))


def test_batch_normalization_in_training_is_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    model, handle = attached(build, tmp_path, target_modules=["0"])
    with handle.rows(ROWS):
        model.eval()(torch.randn(4, 6))
        with pytest.raises(regraft.UnsupportedError, match="normalized together"):
            model.train()(torch.randn(4, 6))


def llama4() -> Any:
    """Return a tiny Llama 4: every expert is given all tokens."""
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, intermediate_size_mlp=32,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        num_local_experts=2, attention_chunk_size=32, interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).float()


@pytest.mark.parametrize("length", [1, 4, 5])
def test_experts_that_are_given_all_tokens_know_their_rows(length: int, tmp_path: Path) -> None:
    names = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    model, handle = attached(llama4, tmp_path, target_modules=[], target_parameters=names)
    torch.manual_seed(1)
    assert_row_by_row(model, handle, {"input_ids": torch.randint(1, 60, (4, length))})


def jetmoe() -> Any:
    """Return a tiny JetMoE: an expert is given the tokens that were sent to it."""
    config = transformers.JetMoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.JetMoeForCausalLM(config)


def test_experts_that_are_given_sorted_tokens_are_refused(tmp_path: Path) -> None:
    model, handle = attached(
        jetmoe, tmp_path, target_modules=[], target_parameters=["mlp.input_linear.weight"]
    )
    ids = torch.arange(4, 24).reshape(4, 5)
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match="sent to it"):
        model(input_ids=ids)
    with handle.rows(["a"] * 4):
        same = model(input_ids=ids).logits
    with handle.using("a"):
        torch.testing.assert_close(same, model(input_ids=ids).logits)


def test_models_that_keep_time_first_are_refused(tmp_path: Path) -> None:
    def build() -> Any:
        return transformers.XLNetModel(
            transformers.XLNetConfig(vocab_size=32, d_model=8, n_layer=1, n_head=2, d_inner=16)
        )

    assert "xlnet" in OTHERWISE
    model, handle = attached(build, tmp_path, target_modules=["layer_1"])
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match="xlnet"):
        model(input_ids=torch.arange(16).reshape(4, 4))


def test_relative_positions_have_no_rows(tmp_path: Path) -> None:
    def build() -> Any:
        return transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
            )
        )

    model, handle = attached(build, tmp_path, target_modules=["relative_attention_bias"])
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match="relative"):
        model(input_ids=torch.arange(1, 17).reshape(4, 4))


def bart() -> Any:
    """Return a tiny encoder-decoder whose answers differ."""
    config = transformers.BartConfig(
        vocab_size=96, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=64, init_std=0.5,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2}], ids=str)
def test_an_encoder_runs_on_rows_and_its_decoder_on_repeats(
    settings: dict[str, int], tmp_path: Path
) -> None:
    model: Any
    model, handle = attached(bart, tmp_path, target_modules=["q_proj", "fc1"])
    torch.manual_seed(1)
    ids = torch.randint(6, 96, (4, 7))
    arguments = {"max_new_tokens": 5, "do_sample": "num_beams" not in settings, "top_k": 1}
    with handle.rows(ROWS, repeats=2):
        found = model.generate(input_ids=ids, **arguments, **settings)
    each = settings.get("num_return_sequences", 1)
    for place, row in enumerate(ROWS):
        with handle.using(row):
            alone = model.generate(input_ids=ids, **arguments, **settings)
        assert torch.equal(found[place * each], alone[place * each])
    with handle.rows(ROWS), pytest.raises(regraft.UsageError, match="repeats=num_beams"):
        model.generate(input_ids=ids, **arguments, **settings)


def llava() -> Any:
    """Return a tiny LLaVA; an image is four tokens."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=63, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config)


def with_images(*of_row: int) -> dict[str, torch.Tensor]:
    """Return inputs whose rows have so many images."""
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (len(of_row), 12))
    for row, count in enumerate(of_row):
        ids[row, 1 : 1 + 4 * count] = 63
    return {"input_ids": ids, "pixel_values": torch.randn(sum(of_row), 3, 8, 8)}


VISION = {"target_modules": r".*vision_tower.*q_proj|.*multi_modal_projector\.linear_1"}


def test_one_image_in_each_row_is_that_rows(tmp_path: Path) -> None:
    model, handle = attached(llava, tmp_path, **VISION)
    assert_row_by_row(model, handle, with_images(1, 1, 1, 1))


@pytest.mark.parametrize("of_row", [(2, 0, 1, 1), (2, 2, 2, 2), (1, 1, 1, 0)], ids=str)
def test_images_of_which_it_is_not_known_whose_they_are_are_refused(
    of_row: tuple[int, ...], tmp_path: Path
) -> None:
    model, handle = attached(llava, tmp_path, **VISION)
    with handle.rows(ROWS), pytest.raises(regraft.UnsupportedError, match=r"image"):
        model(**with_images(*of_row))


def test_adapters_on_the_text_do_not_mind_whose_images_there_are(tmp_path: Path) -> None:
    model, handle = attached(llava, tmp_path, target_modules=r".*language_model.*q_proj")
    inputs = with_images(2, 0, 1, 1)
    with handle.rows(ROWS):
        found = answer(model, inputs)
    for place, row in enumerate(ROWS):
        with handle.using(row):
            torch.testing.assert_close(
                found[place], answer(model, inputs)[place], rtol=1e-4, atol=1e-5
            )
