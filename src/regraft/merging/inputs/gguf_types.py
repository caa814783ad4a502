"""Which ggml types the weights of a GGUF output have."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from regraft.quant.formats.gguf import UNQUANTIZED, GgufDecoder, block_size
from regraft.quant.weight import QuantizedWeight


def target_type(weight: QuantizedWeight, dtype: str | None) -> str:
    """Return the ggml type that a weight has in the output.

    Vectors keep theirs, as in llama.cpp's own files; so do matrices whose rows are no whole blocks,
    unless plain numbers are asked for.
    """
    own = weight.codec.name
    if dtype is None or len(weight.shape) < 2:
        return own
    if dtype not in UNQUANTIZED and weight.shape[-1] % block_size(dtype)[0]:
        return own
    return dtype


@dataclass(frozen=True)
class OfType:
    """Gives weights as they are to be stored.

    Attributes:
        dtype: ggml type of matrices; None for each one's own.
    """

    dtype: str | None

    def __call__(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return a weight as it is to be stored."""
        type_ = target_type(weight, self.dtype)
        if not isinstance(weight.codec, GgufDecoder) or type_ == weight.codec.type:
            return weight
        return replace(weight, codec=replace(weight.codec, type=type_))

    def nbytes(self, weight: QuantizedWeight) -> int:
        """Return the bytes of a weight's blocks as they are to be stored."""
        elements, nbytes = block_size(target_type(weight, self.dtype))
        return math.prod(weight.shape) // elements * nbytes
