"""A model that no library knows, made of the layer kinds that language models lack.

It exists so that convolutions of one, two and three dimensions, grouped convolutions and
``nn.MultiheadAttention`` can be adapted, merged, saved and loaded like any other model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

LENGTH = 16  # tokens per row: the feature maps below are reshaped to 4 x 4


class ToyConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of a :class:`ToyNet`; ``model_type`` is registered with no Auto class."""

    model_type = "regraft_toy"

    def __init__(
        self, vocab_size: int = 37, width: int = 12, num_labels: int = 11, **kwargs: Any
    ) -> None:
        self.vocab_size = vocab_size
        self.width = width
        super().__init__(num_labels=num_labels, **kwargs)


class ToyNet(PreTrainedModel):  # type: ignore[misc]
    """Tokens -> embedding -> attention -> norm -> conv 1d, 2d, grouped, 1x1, 3d -> head."""

    config_class = ToyConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        width = config.width
        self.embed = nn.Embedding(config.vocab_size, width)
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.conv1d = nn.Conv1d(width, 10, 3, padding=1)
        self.conv2d = nn.Conv2d(10, 14, (3, 2), stride=(1, 2), padding=(1, 0))
        self.grouped = nn.Conv2d(14, 14, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(14, 15, 1, bias=False)
        self.conv3d = nn.Conv3d(3, 7, (2, 3, 1), stride=(1, 1, 2), padding=(0, 1, 0))
        self.head = nn.Linear(7, config.num_labels)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return logits of shape (batch, num_labels) for ids of shape (batch, LENGTH)."""
        x = self.embed(input_ids)
        attended, _weights = self.attention(x, x, x, need_weights=False)
        x = self.norm(x + attended).transpose(1, 2)  # (batch, width, 16)
        x = torch.tanh(self.conv1d(x)).unflatten(2, (4, 4))  # (batch, 10, 4, 4)
        x = torch.tanh(self.conv2d(x))  # (batch, 14, 4, 2)
        x = torch.tanh(self.grouped(x))
        x = self.pointwise(x).unflatten(1, (3, 5))  # (batch, 3, 5, 4, 2)
        x = torch.tanh(self.conv3d(x)).mean(dim=(2, 3, 4))  # (batch, 7)
        return self.head(x)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed
