"""The attention seam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pdrelay.engine.attention.context import ForwardContext


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
