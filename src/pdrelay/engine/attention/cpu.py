"""Attention by the C kernels: reads K and V straight from the pages, float32, one thread."""

from __future__ import annotations

import torch

from pdrelay.engine.attention.base import AttentionShape
from pdrelay.engine.attention.context import ForwardContext
from pdrelay.engine.kernels import Kernels
from pdrelay.engine.kernels.workspace import Workspace


class CpuAttention:
    """A row's result has the same bits in any batch and any chunking (see cpu.c)."""

    def __init__(self, shape: AttentionShape, kernels: Kernels) -> None:
        assert self.supports(shape, kernels)
        self._shape = shape
        self._kernels = kernels
        self._workspace = Workspace()

    @staticmethod
    def supports(shape: AttentionShape, kernels: Kernels) -> bool:
        head_dim = shape.head_dim
        return head_dim <= kernels.max_head_dim and head_dim % kernels.vector_width == 0

    def __call__(
        self, q: torch.Tensor, kv_layer: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        shape, kernels = self._shape, self._kernels
        num_rows, width = q.shape
        assert q.dtype == kv_layer.dtype == torch.float32 and kv_layer.is_contiguous()
        stride = q.stride(0)
        out = self._workspace.take("attention", num_rows, width)
        q_at, out_at, kv_at = q.data_ptr(), out.data_ptr(), kv_layer.data_ptr()
        heads = (
            stride,
            kv_layer.shape[2],
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.scale,
        )
        status = 0
        decode = context.decode
        if decode is not None:
            tables, seq_lens = decode.block_tables, decode.seq_lens
            assert tables.dtype == seq_lens.dtype == torch.int32 and tables.is_contiguous()
            status |= kernels.attend_decode(
                q_at + 4 * decode.start * stride,
                out_at + 4 * decode.start * width,
                kv_at,
                tables.data_ptr(),
                seq_lens.data_ptr(),
                tables.shape[0],
                tables.shape[1],
                *heads,
            )
        for segment, table in zip(context.prefills, context.prefill_tables, strict=True):
            status |= kernels.attend_prefill(
                q_at + 4 * segment.start * stride,
                out_at + 4 * segment.start * width,
                kv_at,
                table.data_ptr(),
                segment.length,
                segment.context_len,
                *heads,
            )
        if status:
            raise MemoryError("no memory for the attention kernel's buffers")
        return out
