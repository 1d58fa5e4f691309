"""Attention by torch's own operators, over gathered pages: any dtype, no compiler needed."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from pdrelay.engine.attention.base import AttentionShape
from pdrelay.engine.attention.context import ForwardContext


class SdpaAttention:
    """Gathers each request's pages, then one or two fused attention calls."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape

    def __call__(
        self, q: torch.Tensor, kv_layer: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        shape = self._shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        heads = q.view(-1, shape.num_heads, shape.head_dim)
        for segment, table in zip(context.prefills, context.prefill_tables, strict=True):
            rows = slice(segment.start, segment.start + segment.length)
            k, v = self._gather(kv_layer, table, segment.context_len + segment.length)
            out[rows] = self._chunk(heads[rows], k, v, segment.context_len)
        if context.decode is not None:
            lengths = context.decode.seq_lens.tolist()
            for b, (table, num_keys) in enumerate(
                zip(context.decode.block_tables, lengths, strict=True)
            ):
                row = context.decode.start + b
                k, v = self._gather(kv_layer, table, num_keys)
                out[row] = self._visible(heads[row : row + 1], k, v)
        return out

    def _gather(
        self, kv_layer: torch.Tensor, table: torch.Tensor, num_keys: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as [num_kv_heads, num_keys, head_dim]."""
        used = -(-num_keys // kv_layer.shape[2])
        pages = kv_layer.index_select(0, table[:used].to(kv_layer.device))
        k, v = pages.transpose(0, 1).flatten(1, 2)[:, :num_keys].transpose(1, 2).unbind(0)
        return k, v

    def _visible(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Queries [T, H, D] that see every key. Returns [T, H * D].

        The query heads of a KV head are stacked along the query axis: nothing is expanded.
        """
        return self._unfold(scaled_dot_product_attention(self._fold(q), k[None], v[None])[0])

    def _chunk(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context_len: int
    ) -> torch.Tensor:
        """A chunk [T, H, D] behind `context_len` keys that all of it sees. Returns [T, H * D].

        `is_causal` is aligned to the top left, so the chunk's own keys and the earlier ones are
        two calls, merged by their log-sum-exp.
        """
        length = q.shape[0]
        if length == 1:
            return self._visible(q, k, v)
        if q.device.type != "cpu":
            return self._masked(q, k, v, context_len)
        own = (self._expand(x[:, context_len:]) for x in (k, v))
        out, lse = _flash(q.transpose(0, 1)[None], *own, causal=True)
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)[..., None]  # [T, H, D], [T, H, 1]
        if context_len:
            past = (x[None, :, :context_len] for x in (k, v))
            out_past, lse_past = _flash(self._fold(q), *past, causal=False)
            out_past = self._unfold(out_past[0]).view(q.shape)
            lse_past = self._unfold(lse_past[0][..., None])[..., None]
            total = torch.logaddexp(lse, lse_past)
            out = out * (lse - total).exp() + out_past * (lse_past - total).exp()
        return out.reshape(length, -1).to(q.dtype)

    def _masked(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context_len: int
    ) -> torch.Tensor:
        mask = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool, device=q.device)
        mask = mask.tril(context_len)
        k, v = self._expand(k), self._expand(v)
        out = scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask)
        return out[0].transpose(0, 1).reshape(q.shape[0], -1)

    def _expand(self, x: torch.Tensor) -> torch.Tensor:
        """[Hkv, S, D] -> [1, H, S, D]"""
        return x.repeat_interleave(self._shape.group, dim=0)[None]

    def _fold(self, q: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [1, Hkv, group * T, D]"""
        shape = self._shape
        grouped = q.reshape(-1, shape.num_kv_heads, shape.group, shape.head_dim)
        return grouped.permute(1, 2, 0, 3).flatten(1, 2)[None]

    def _unfold(self, x: torch.Tensor) -> torch.Tensor:
        """[Hkv, group * T, D] -> [T, H * D]"""
        shape = self._shape
        grouped: torch.Tensor = x.unflatten(1, (shape.group, -1))
        return grouped.permute(2, 0, 1, 3).flatten(1)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp [1, H, T] of torch's CPU flash attention."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse
