"""Attention written out: the yardstick of the other backends. Any dtype, any device, slow."""

from __future__ import annotations

import torch

from pdrelay.engine.attention.base import AttentionShape
from pdrelay.engine.attention.context import ForwardContext


class ReferenceAttention:
    """For every row: gather its keys and values, softmax over all of them, in float32."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape

    def __call__(
        self, q: torch.Tensor, kv_layer: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for segment in context.prefills:
            for i in range(segment.length):
                row, num_keys = segment.start + i, segment.context_len + i + 1
                out[row] = self._attend(q[row], kv_layer, list(segment.block_table), num_keys)
        if context.decode is not None:
            for b, num_keys in enumerate(context.decode.seq_lens.tolist()):
                row, table = context.decode.start + b, context.decode.block_tables[b].tolist()
                out[row] = self._attend(q[row], kv_layer, table, num_keys)
        return out

    def _attend(
        self, q: torch.Tensor, kv_layer: torch.Tensor, table: list[int], num_keys: int
    ) -> torch.Tensor:
        shape, block_size = self._shape, kv_layer.shape[2]
        out = torch.empty(shape.num_heads, shape.head_dim)
        for head, query in enumerate(q.float().view(shape.num_heads, shape.head_dim)):
            keys, values = [], []
            for position in range(num_keys):
                block, offset = table[position // block_size], position % block_size
                keys.append(kv_layer[block, 0, offset, head // shape.group].float())
                values.append(kv_layer[block, 1, offset, head // shape.group].float())
            weights = torch.softmax(torch.stack(keys) @ query * shape.scale, dim=0)
            out[head] = weights @ torch.stack(values)
        return out.view(-1).to(q.dtype)
