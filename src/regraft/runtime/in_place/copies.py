"""The adapters of a merge in memory, as they were when it was made.

They are copied, because an undo has to compute with what the merge computed with: training goes on,
and adapters are deleted. A copy is small beside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from regraft.deltas.kernels.weights import Bytes, Floats, Weights
from regraft.deltas.views import View
from regraft.merging.compute.factors import check_values
from regraft.runtime.in_place.weights import bytes_of
from regraft.runtime.model.live_base import spec_of
from regraft.runtime.model.matching import LiveAdapter, Tensors
from regraft.tensors import TensorSpec


class Copies:
    """Copies of adapters on the CPU; a :class:`regraft.merging.compute.factors.FactorSource`.

    Attributes:
        adapters: the adapters, with their tensors copied.
    """

    def __init__(self, adapters: Sequence[LiveAdapter]) -> None:
        """Copy adapters.

        Raises:
            AdapterError: one holds NaN or infinity.
        """
        self.adapters = tuple(_copied(adapter) for adapter in adapters)
        self._tensors = Tensors(self.adapters)

    @property
    def nbytes(self) -> int:
        """The bytes that the copies take."""
        return sum(adapter.nbytes for adapter in self.adapters)

    def matrix(self, view: View, adapter: int) -> Floats:
        """Return a view's matrix, contiguous."""
        part = self._tensors.matrix(adapter, view)
        values = part.numpy() if part.dtype == torch.float32 else part.to(torch.float32).numpy()
        return np.ascontiguousarray(values)

    def read(self, adapter: int, spec: TensorSpec, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with bytes of a whole tensor."""
        whole = self._tensors.whole(adapter, spec.name).contiguous()
        buffer[:] = bytes_of(whole)[offset : offset + buffer.size]


def _copied(adapter: LiveAdapter) -> LiveAdapter:
    tensors = {}
    for key, tensor in adapter.tensors.items():
        spec = replace(spec_of(key, tensor.shape, tensor.dtype), path=Path(adapter.name))
        # By numpy: on tensors of this size, torch would wait for its threads most of the time.
        raw = bytes_of(tensor.detach().cpu().contiguous()).copy()
        check_values(spec, Weights.of_bytes(raw, spec.dtype).floats())
        tensors[key] = torch.from_numpy(raw).view(tensor.dtype).reshape(tensor.shape)
    return LiveAdapter(adapter.name, adapter.config, adapter.adapter, tensors, adapter.metadata)
