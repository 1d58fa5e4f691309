"""The attention seam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pdrelay.engine.attention.context import ForwardContext
from pdrelay.engine.kernels import Kernels


@dataclass(frozen=True)
class AttentionShape:
    """This rank's heads. `scale` multiplies q·k before the softmax."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


class AttentionBackend(Protocol):
    """Causal attention of the batch's queries to their own and earlier tokens' pages."""

    def __call__(
        self, q: torch.Tensor, kv_layer: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """`q` [T, num_heads * head_dim], rows may be strided. `kv_layer`: one layer of the pool,
        the batch's own K and V written. Returns [T, num_heads * head_dim], contiguous, valid
        until the next call.
        """


def select_attention(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device, kernels: Kernels | None
) -> AttentionBackend:
    """The fastest backend that takes this shape, dtype and device."""
    from pdrelay.engine.attention.cpu import CpuAttention
    from pdrelay.engine.attention.sdpa import SdpaAttention

    on_cpu = dtype == torch.float32 and device.type == "cpu"
    if kernels is not None and on_cpu and CpuAttention.supports(shape, kernels):
        return CpuAttention(shape, kernels)
    return SdpaAttention(shape)
