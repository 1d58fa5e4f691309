"""Attention on CUDA: cuDNN or FlashAttention-2 for fresh prompts, own kernels over the pages.

- A fresh prompt's K and V lie in the layer's QKV projection (`QkvBuffer`), rotated: nothing is
  gathered. cuDNN is twice as fast as FlashAttention-2 at 2,048 tokens and more, but builds a plan
  for each new length, 36 to 43 ms: it is called only at lengths rounded up to a multiple of
  `CUDNN_STEP`, whose plans `build_plans` makes before service. The buffer's rows behind the prompt
  are read too; with causal masking they change nothing as long as they are finite, which the
  buffer guarantees, and the results of padding rows are dropped.
- Chunks behind cached tokens, and decodes, read the pages: own kernels, or others of the same
  interface (`PagedAttention`).
"""

from __future__ import annotations

import torch

from pdrelay.engine.attention.base import AttentionShape
from pdrelay.engine.attention.context import ForwardContext, PrefillSegment
from pdrelay.engine.kernels.gpu import PagedAttention
from pdrelay.engine.qkv_buffer import QkvBuffer

CUDNN_STEP = 128  # prompt lengths share a plan in steps of this
CUDNN_FROM = 256  # shorter prompts take FlashAttention-2: the gain is under 10 us a layer


class CudaAttention:
    """Bits of a row depend on the kernel that runs it, so on lengths and batch bucket, not on the
    other rows."""

    def __init__(self, shape: AttentionShape, paged: PagedAttention, buffer: QkvBuffer) -> None:
        self._shape = shape
        self._paged = paged
        self._buffer = buffer
        self._plans: set[int] = set()  # padded lengths that cuDNN has plans for; membership only
        self._q_width = shape.num_heads * shape.head_dim

    def build_plans(self, max_length: int) -> int:
        """Run cuDNN once at every padded length. Returns how many; 0 where it does not run.

        Its first result is compared with FlashAttention-2's: a cuDNN that is missing, or wrong
        with grouped heads, is left out.
        """
        lengths = range(_padded(CUDNN_FROM), _padded(max_length) + 1, CUDNN_STEP)
        if not lengths or not self._cudnn_agrees(lengths[0]):
            return 0
        for length in lengths:
            self._cudnn(0, length, length)
            self._plans.add(length)
        return len(self._plans)

    def _cudnn_agrees(self, length: int) -> bool:
        self._buffer.rows(length).normal_()
        try:
            wanted, got = self._flash(0, length), self._cudnn(0, length, length)
            return torch.allclose(wanted.float(), got.float(), atol=2e-2, rtol=2e-2)
        except (RuntimeError, NotImplementedError):
            return False
        finally:
            self._buffer.clear()

    def __call__(
        self, q: torch.Tensor, kv_layer: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        decode, prefills = context.decode, context.prefills
        if decode is None and len(prefills) == 1 and prefills[0].context_len == 0:
            return self._fresh(prefills[0])
        out = torch.empty((q.shape[0], self._q_width), dtype=q.dtype, device=q.device)
        if decode is not None:
            rows = slice(decode.start, decode.start + decode.num_rows)
            self._paged.paged_decode(
                q[rows],
                kv_layer,
                decode.block_tables,
                decode.seq_lens,
                self._shape.scale,
                out[rows],
                decode.cut,
            )
        for i, segment in enumerate(prefills):
            rows = slice(segment.start, segment.start + segment.length)
            if segment.context_len == 0:
                out[rows] = self._fresh(segment)
                continue
            self._paged.paged_prefill(
                q[rows],
                kv_layer,
                context.prefill_tables[i],
                segment.context_len,
                self._shape.scale,
                out[rows],
            )
        return out

    def _fresh(self, segment: PrefillSegment) -> torch.Tensor:
        padded = _padded(segment.length)
        if padded in self._plans and segment.start + padded <= self._buffer.num_rows:
            return self._cudnn(segment.start, segment.length, padded)
        return self._flash(segment.start, segment.length)

    def _heads(self, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of the buffer's rows as [1, H, length, D] views."""
        shape = self._shape
        rows = self._buffer.rows(start + length)[start:]
        heads = rows.view(1, length, -1, shape.head_dim).transpose(1, 2)
        sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = heads.split(sizes, dim=1)
        return q, k, v

    def _cudnn(self, start: int, length: int, padded: int) -> torch.Tensor:
        q, k, v = self._heads(start, padded)
        out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, False, 0.0, True, False, scale=self._shape.scale
        )[0]
        return out[0].transpose(0, 1)[:length].reshape(length, self._q_width)

    def _flash(self, start: int, length: int) -> torch.Tensor:
        q, k, v = self._heads(start, length)
        out: torch.Tensor
        if q.device.type == "cuda":
            out = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, True, False, scale=self._shape.scale
            )[0]
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self._shape.scale, enable_gqa=True
            )
        return out[0].transpose(0, 1).reshape(length, self._q_width)


def _padded(length: int) -> int:
    return -(-length // CUDNN_STEP) * CUDNN_STEP
