"""The toy models of PEFT's tests of custom models, and the LoRA configs of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as tf
from torch import nn

from practice.bases import Base

Settings = dict[str, Any]


class Chain(nn.Module):  # type: ignore[misc]
    """Layers and functions that run one after the other, by name."""

    def __init__(self, shape: tuple[int, ...] = (), **steps: Any) -> None:
        super().__init__()
        self.shape, self.steps = shape, tuple(steps)
        for name, step in steps.items():
            setattr(self, name, step)

    def forward(self, x: Any) -> Any:
        x = x.reshape(self.shape) if self.shape else x
        for name in self.steps:
            x = getattr(self, name)(x)
        return x


class Attended(nn.Module):  # type: ignore[misc]
    """Attention of ten features, where the first axis is time."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Any) -> Any:
        return self.lin0(self.mha(x, x, x)[0]).log_softmax(-1)


class Multiplied(nn.Module):  # type: ignore[misc]
    """A linear layer that is no ``nn.Linear``: its weight is a parameter of (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


class Recurrent(nn.Module):  # type: ignore[misc]
    """A recurrent layer between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.fc = nn.Linear(10, 20), nn.Linear(20, 2)
        self.gru = nn.GRU(20, 20, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.fc(self.gru(self.lin0(x).relu()[:, None])[0][:, 0])


class Siblings(nn.Module):  # type: ignore[misc]
    """Two embeddings, where the name of one begins with the name of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_tokens_extra = nn.Embedding(100, 5), nn.Embedding(100, 5)
        self.lin0 = nn.Linear(5, 2)

    def forward(self, x: Any) -> Any:
        return self.lin0(self.embed_tokens(x) + self.embed_tokens_extra(x))

    def get_input_embeddings(self) -> Any:
        return self.embed_tokens


class Embedded(Chain):
    """An embedding that the model names as its own, as models of transformers do."""

    def get_input_embeddings(self) -> Any:
        return self.embed_tokens


class Blocks(nn.Module):  # type: ignore[misc]
    """Twelve blocks of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (Chain(**_ends(10, 10, 10)) for _ in range(12))
        self.layers, self.out = nn.ModuleList(blocks), nn.Linear(10, 2)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


def _ends(inputs: int, inner: int, outputs: int, bias: bool = True) -> dict[str, nn.Module]:
    """Return the steps of a perceptron with dropout."""
    return {
        "lin0": nn.Linear(inputs, inner, bias=bias),
        "relu": nn.ReLU(),
        "drop": nn.Dropout(0.5),
        "lin1": nn.Linear(inner, outputs, bias=bias),
    }


def _last(**steps: Any) -> dict[str, Any]:
    return {**steps, "sm": nn.LogSoftmax(-1)}


def _convolved(layer: nn.Module, features: int, name: str = "conv1d") -> dict[str, Any]:
    """Return the steps of a convolution, and a linear layer on what comes out of it."""
    linear = nn.Linear(features, 2)
    return _last(**{name: layer, "relu": nn.ReLU(), "flat": nn.Flatten(), "lin0": linear})


def _wide_and_norms() -> Any:
    return Chain(
        **_last(
            layernorm0=nn.LayerNorm(10),
            lin0=nn.Linear(10, 20),
            relu=nn.ReLU(),
            layernorm1=nn.LayerNorm(20),
            lin1=nn.Linear(20, 2),
        )
    )


def _same_shapes() -> Any:
    sizes = ((10, 20), (20, 20), (20, 20), (20, 2))
    layers = {f"lin{n}": nn.Linear(*size) for n, size in enumerate(sizes)}
    return Chain(**_last(**{"lin0": layers.pop("lin0"), "relu": nn.ReLU(), **layers}))


def _embedded(name: str = "emb", kind: type[Chain] = Chain) -> Any:
    steps = {name: nn.Embedding(100, 5)}
    return kind(**steps, **_convolved(tf.pytorch_utils.Conv1D(1, 5), 10))


def _between(convolution: nn.Module, inputs: int, outputs: int, shape: tuple[int, ...]) -> Any:
    """Return a convolution between two linear layers."""
    return Chain(
        (9, 10) if inputs == 10 else (1, 90),
        **_last(
            lin0=nn.Linear(inputs, outputs),
            relu=nn.ReLU(),
            shaped=nn.Unflatten(-1, shape),
            joined=nn.Flatten(0, -len(shape)) if inputs == 90 else nn.Identity(),
            conv2d=convolution,
            flat=nn.Flatten(-3),
            lin1=nn.Linear(convolution.out_channels, 2),
        ),
    )


def _repeated(channels: int, convolution: nn.Module, features: int) -> Any:
    """Return a convolution whose input channels are all the same."""
    return Chain((9, 1, 10), more=_Repeat(channels), **_convolved(convolution, features))


class _Repeat(nn.Module):  # type: ignore[misc]
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Any) -> Any:
        return x.expand(-1, self.channels, *x.shape[2:])


MODELS: dict[str, Callable[[], Any]] = {
    "MLP": lambda: Chain(**_last(**_ends(10, 20, 2))),
    "MLP without bias": lambda: Chain(**_last(**_ends(10, 20, 2, bias=False))),
    "MLP2": lambda: Chain(**_last(**_ends(10, 32, 2))),
    "MLP with norms": _wide_and_norms,
    "MLP of equal shapes": _same_shapes,
    "MLP of parameters": lambda: Chain(
        **_last(lin0=Multiplied(10, 20), relu=nn.ReLU(), lin1=Multiplied(20, 2))
    ),
    "deep MLP": Blocks,
    "GRU": Recurrent,
    "MHA": Attended,
    "EmbConv1D": _embedded,
    "embed_tokens": lambda: _embedded("embed_tokens", Embedded),
    "embed_tokens and a sibling": Siblings,
    "Conv1d": lambda: Chain((9, 1, 10), **_convolved(nn.Conv1d(1, 1, 2), 9)),
    "Conv1d, bigger": lambda: _repeated(64, nn.Conv1d(64, 16, 2), 144),
    "Conv1d, groups": lambda: _repeated(8, nn.Conv1d(8, 8, 3, groups=2), 64),
    "Conv1d, kernel 1": lambda: Chain((3, 3, 10), **_convolved(nn.Conv1d(3, 10, 1), 100)),
    "Conv2d": lambda: Chain((-1, 5, 3, 3), **_convolved(nn.Conv2d(5, 10, 3), 10, "conv2d")),
    "Conv2d without bias": lambda: Chain(
        (-1, 5, 3, 3), **_convolved(nn.Conv2d(5, 10, 3, bias=False), 10, "conv2d")
    ),
    "Conv2d2": lambda: _between(nn.Conv2d(8, 32, 3), 10, 72, (8, 3, 3)),
    "Conv2d, 1x1": lambda: Chain((10, 1, 3, 3), **_convolved(nn.Conv2d(1, 10, 1), 90, "conv2d")),
    "Conv2d, groups": lambda: _between(nn.Conv2d(16, 16, 3, groups=8), 90, 288, (2, 16, 3, 3)),
    "Conv2d, groups 2": lambda: Chain(
        (1, 16, 4, 4),
        **_convolved(nn.Conv2d(16, 32, 3, padding=1, groups=2), 512, "conv2d"),
    ),
    "Conv3d": lambda: Chain((-1, 5, 3, 3, 3), **_convolved(nn.Conv3d(5, 10, 3), 10, "conv3d")),
}
"""PEFT's toy models by name."""

SIZES = {
    "Conv2d, groups 2": (1, 256),
    "Conv3d": (6, 135),
    "Conv2d": (6, 45),
    "Conv2d without bias": (6, 45),
}
"""The shape of what a toy is asked, where that is not 9 rows of 10."""

LIN0, BOTH, CONV2D = ["lin0"], ["lin0", "lin1"], ["conv2d"]


def _velora(kind: str) -> Settings:
    return {"velora_config": peft.VeloraConfig(num_groups=2, init_type=kind)}


def _bdlora(**settings: Any) -> Settings:
    return {"target_modules": BOTH, "use_bdlora": peft.tuners.lora.config.BdLoraConfig(**settings)}


def _table() -> dict[tuple[str, str], Settings]:
    return {
        ("MLP", "a name"): {"target_modules": "lin0"},
        ("MLP", "a list"): {"target_modules": LIN0},
        ("MLP", "the other layer"): {"target_modules": ["lin1"]},
        ("MLP", "both layers"): {"target_modules": BOTH},
        ("MLP", "a head saved"): {"target_modules": LIN0, "modules_to_save": ["lin1"]},
        ("MLP", "dropout"): {"target_modules": LIN0, "lora_alpha": 4, "lora_dropout": 0.1},
        ("MLP", "DoRA"): {"target_modules": LIN0, "use_dora": True},
        ("MLP", "DoRA, both"): {"target_modules": BOTH, "use_dora": True},
        ("MLP", "DoRA, alpha"): {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32},
        ("MLP", "KaSA"): {"target_modules": LIN0, "kasa_config": peft.KasaConfig(), "r": 4},
        ("MLP", "MiCA"): {"target_modules": LIN0, "init_lora_weights": "mica", "r": 4},
        ("MLP", "VeLoRA, random"): {"target_modules": LIN0, **_velora("random")},
        ("MLP", "VeLoRA, average"): {"target_modules": BOTH, **_velora("batch_average")},
        ("MLP", "VeLoRA, once"): {"target_modules": LIN0, **_velora("batch_average_once")},
        ("MLP", "MonteCLoRA"): {
            "target_modules": LIN0,
            "monteclora_config": peft.MontecloraConfig(num_samples=2),
        },
        ("MLP", "BD-LoRA, A"): _bdlora(target_modules_bd_a=["lin0"], match_strict=False),
        ("MLP", "BD-LoRA, B"): _bdlora(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False),
        ("MLP", "BD-LoRA"): _bdlora(
            target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2
        ),
        ("MLP", "a bias of B"): {"target_modules": BOTH, "lora_bias": True, "lora_alpha": 32},
        ("MLP", "a parameter too"): {"target_modules": LIN0, "target_parameters": ["lin1.weight"]},
        ("MLP", "ranks and alphas"): {
            "target_modules": BOTH,
            "rank_pattern": {"lin0": 2},
            "alpha_pattern": {"lin1": 3},
        },
        ("MLP", "OLoRA"): {"target_modules": LIN0, "init_lora_weights": "olora", "r": 4},
        ("MLP", "PiSSA"): {"target_modules": LIN0, "init_lora_weights": "pissa", "r": 4},
        ("MLP", "orthogonal"): {"target_modules": LIN0, "init_lora_weights": "orthogonal"},
        ("MLP without bias", "both layers"): {"target_modules": BOTH},
        ("MLP2", "both layers"): {"target_modules": BOTH},
        ("MLP with norms", "a norm saved"): {
            "target_modules": LIN0,
            "modules_to_save": ["layernorm0"],
        },
        ("MLP of equal shapes", "equal layers"): {"target_modules": ["lin1", "lin2"]},
        ("MLP of parameters", "a parameter"): {"target_parameters": ["lin0.weight"]},
        ("MLP of parameters", "both"): {"target_parameters": ["lin0.weight", "lin1.weight"]},
        ("deep MLP", "some layers"): {
            "target_modules": LIN0,
            "layers_to_transform": [1, 5],
            "layers_pattern": "layers",
        },
        ("deep MLP", "ranks by layer"): {
            "target_modules": BOTH,
            "rank_pattern": {"layers.1.lin0": 2, r"layers\.1\d\.lin1": 6},
        },
        ("GRU", "the recurrent layer saved"): {"target_modules": LIN0, "modules_to_save": ["gru"]},
        ("MHA", "attention"): {"target_modules": ["mha"]},
        ("MHA", "attention and a layer"): {"target_modules": ["mha", "lin0"]},
        ("EmbConv1D", "transposed"): {"target_modules": ["conv1d"]},
        ("EmbConv1D", "embedding"): {"target_modules": ["emb"]},
        ("EmbConv1D", "both"): {"target_modules": ["emb", "conv1d"]},
        ("EmbConv1D", "transposed, DoRA"): {"target_modules": ["conv1d"], "use_dora": True},
        ("EmbConv1D", "embedding, DoRA"): {"target_modules": ["emb"], "use_dora": True},
        ("EmbConv1D", "both, DoRA"): {"target_modules": ["emb", "conv1d"], "use_dora": True},
        ("EmbConv1D", "token rows"): {
            "target_modules": ["conv1d"],
            "trainable_token_indices": {"emb": [0, 10]},
        },
        ("embed_tokens", "embedding"): {"target_modules": ["embed_tokens", "lin0"]},
        ("embed_tokens", "token rows by the model's name"): {
            "target_modules": LIN0,
            "trainable_token_indices": [0, 1, 3],
        },
        ("embed_tokens and a sibling", "embedding"): {"target_modules": r"^embed_tokens$"},
        ("Conv1d", "plain"): {"target_modules": ["conv1d"]},
        ("Conv1d", "DoRA"): {"target_modules": ["conv1d"], "use_dora": True},
        ("Conv1d, bigger", "plain"): {"target_modules": ["conv1d"]},
        ("Conv1d, groups", "plain"): {"target_modules": ["conv1d"]},
        ("Conv1d, kernel 1", "plain"): {"target_modules": ["conv1d"]},
        ("Conv1d, kernel 1", "DoRA"): {"target_modules": ["conv1d"], "use_dora": True},
        ("Conv2d", "plain"): {"target_modules": CONV2D},
        ("Conv2d", "and a layer"): {"target_modules": ["conv2d", "lin0"]},
        ("Conv2d", "DoRA"): {"target_modules": CONV2D, "use_dora": True},
        ("Conv2d", "and a layer, DoRA"): {"target_modules": ["conv2d", "lin0"], "use_dora": True},
        ("Conv2d", "a bias of B"): {"target_modules": CONV2D, "lora_bias": True, "lora_alpha": 32},
        ("Conv2d without bias", "plain"): {"target_modules": CONV2D},
        ("Conv2d2", "plain"): {"target_modules": CONV2D},
        ("Conv2d, 1x1", "plain"): {"target_modules": CONV2D},
        ("Conv2d, groups", "plain"): {"target_modules": CONV2D},
        ("Conv2d, groups", "DoRA"): {"target_modules": CONV2D, "use_dora": True},
        ("Conv2d, groups 2", "plain"): {"target_modules": CONV2D},
        ("Conv2d, groups 2", "DoRA"): {"target_modules": CONV2D, "use_dora": True},
        ("Conv3d", "plain"): {"target_modules": ["conv3d"]},
        ("Conv3d", "and a layer"): {"target_modules": ["conv3d", "lin0"]},
        ("Conv3d", "DoRA"): {"target_modules": ["conv3d"], "use_dora": True},
        ("Conv3d", "and a layer, DoRA"): {"target_modules": ["conv3d", "lin0"], "use_dora": True},
        ("Conv3d", "a bias of B"): {
            "target_modules": ["conv3d"],
            "lora_bias": True,
            "lora_alpha": 32,
        },
    }


TABLE = _table()
"""LoRA's rows of PEFT's table of custom models: (model, name) to the config."""


def toy(name: str) -> Base:
    """Return a toy model as a base."""
    asked = "ids_of_rows" if "mb" in name else "features"
    return Base(name, MODELS[name], (), asked=asked, size=SIZES.get(name, (9, 10)))
