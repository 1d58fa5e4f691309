"""Where a prefill step stores its K and V besides its own pages: a peer's pool, mapped here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class RemoteLayer(NamedTuple):
    """One layer of a `RemoteStore`: `pages` [num_blocks', 2, block_size, Hkv, D], int64 slots."""

    pages: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class RemoteStore:
    """`pool`: the peer's `[num_layers, num_blocks', 2, block_size, num_kv_heads, head_dim]`,
    reachable by kernels of this rank's device. `slots`: int64 [T] on this device, the slot of
    each row of the flat batch in that pool, block * block_size + offset; -1: not for the peer.
    """

    pool: torch.Tensor
    slots: torch.Tensor

    def layer(self, index: int) -> RemoteLayer:
        return RemoteLayer(self.pool[index], self.slots)
