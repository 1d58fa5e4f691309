"""The kernels that the CUDA engine is built on: one interface, Triton on GPUs, torch anywhere.

`TorchKernels` is the slow, obvious implementation: the reference of every test, and what lets the
CUDA runner's logic run on a machine without a GPU.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from pdrelay.engine.kernels.decode_cut import DecodeCut
from pdrelay.engine.layers import HeadNorms, rms_norm, rotate


class PagedAttention(Protocol):
    """Attention that reads pages where they are."""

    def paged_decode(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        cut: DecodeCut,
    ) -> None:
        """`out` [B, Hq * D]: row b of q over its first seq_lens[b] keys; 0 marks a padding row.
        `cut`: the step's, of the same kernels and `seq_lens`."""

    def paged_prefill(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        block_table: torch.Tensor,
        context_len: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """`out` [T, Hq * D]: row i of a chunk over the first context_len + i + 1 keys."""


class GpuKernels(PagedAttention, Protocol):
    """Launches on the current stream, never synchronises, and can be captured in a CUDA graph."""

    max_small_rows: int  # of the `small_` operations

    def reserve(self, max_batch: int, num_heads: int, head_dim: int, vocab_size: int) -> None:
        """Make the workspaces of the largest batch: before graphs are captured, which keep them."""

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """As `Ops.add_rms_norm`, into a new tensor."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As `Ops.silu_mul`, into a new tensor."""

    def small_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """[M, K] @ [N, K].T + [N] for a few rows, at most `max_small_rows`."""

    def small_linear_wins(self, num_rows: int, out_features: int) -> bool:
        """Whether `small_linear` of such a shape is worth taking instead of cuBLAS."""

    def small_norm_linear(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(small_linear of RMSNorm(residual + x), residual + x), both new or `out`."""

    def small_gate_up(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, new, where (gate, up) = x @ `weight` [2 * I, K].T; max_small_rows at
        most."""

    def small_gate_up_wins(self, num_rows: int, out_features: int) -> bool:
        """Whether `small_gate_up` is worth taking instead of cuBLAS and `silu_mul`."""

    def small_norm_gate_up(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(silu(gate) * up of `weight` [2 * I, K], residual + x), both new."""

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        rope_table: torch.Tensor,
        norms: HeadNorms | None,
        kv_layer: torch.Tensor,
        remote_layer: torch.Tensor | None,
        remote_slots: torch.Tensor | None,
        keep_keys: bool,
    ) -> None:
        """Norm and rotate q in `qkv` [T, (Hq + 2 * Hkv) * D] in place, with `keep_keys` k too;
        store k and v at `slots` int64 [T] (-1: nowhere), and in a peer's pages."""

    def argmax_rows(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """`out` int64 [B]: the first index of each row's maximum."""

    def decode_cut(
        self, seq_lens: torch.Tensor, bucket: int, num_kv_heads: int, max_seq_len: int
    ) -> DecodeCut:
        """For `paged_decode` of these `seq_lens`, int32 [B], B <= `bucket`; once a step. All rows
        by batch bucket and the longest sequence there may be, too long ones by their lengths."""


class TorchKernels:
    """Any device, any dtype."""

    max_small_rows = 8

    def reserve(self, max_batch: int, num_heads: int, head_dim: int, vocab_size: int) -> None:
        pass

    def small_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        result = functional.linear(x, weight, bias)
        return result if out is None else out.copy_(result)

    def small_linear_wins(self, num_rows: int, out_features: int) -> bool:
        return True

    def small_norm_linear(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual.clone()
        h = self.add_rms_norm(x, residual, norm_weight, eps)
        return self.small_linear(h, weight, bias, out), residual

    def small_gate_up(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.silu_mul(functional.linear(x, weight))

    def small_gate_up_wins(self, num_rows: int, out_features: int) -> bool:
        return True

    def small_norm_gate_up(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual.clone()
        h = self.add_rms_norm(x, residual, norm_weight, eps)
        return self.small_gate_up(h, weight), residual

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if x is not None:
            residual.add_(x)
        return rms_norm(residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        rope_table: torch.Tensor,
        norms: HeadNorms | None,
        kv_layer: torch.Tensor,
        remote_layer: torch.Tensor | None,
        remote_slots: torch.Tensor | None,
        keep_keys: bool,
    ) -> None:
        num_kv_heads, head_dim = kv_layer.shape[3:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        table = rope_table[positions]
        if norms is None:
            new_q, new_k = rotate(q, table), rotate(k, table)
        else:
            new_q = rotate(rms_norm(q, norms.q, norms.eps), table)
            new_k = rotate(rms_norm(k, norms.k, norms.eps), table)
        _store(kv_layer, slots, new_k, v)
        if remote_layer is not None and remote_slots is not None:
            _store(remote_layer, remote_slots, new_k, v)
        q.copy_(new_q)
        if keep_keys:
            k.copy_(new_k)

    def paged_decode(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        cut: DecodeCut,
    ) -> None:
        for row, (table, length) in enumerate(zip(block_tables, seq_lens.tolist(), strict=True)):
            if length == 0:
                out[row] = 0
                continue
            self.paged_prefill(
                q[row : row + 1], kv_layer, table, length - 1, scale, out[row : row + 1]
            )

    def paged_prefill(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        block_table: torch.Tensor,
        context_len: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        block_size, num_kv_heads, head_dim = kv_layer.shape[2:]
        num_keys = context_len + q.shape[0]
        table = block_table[: -(-num_keys // block_size)].long()
        pages = kv_layer[table].transpose(0, 1).flatten(1, 2)[:, :num_keys].float()
        heads = q.float().view(q.shape[0], num_kv_heads, -1, head_dim)
        scores = torch.einsum("tkgd,skd->kgts", heads, pages[0]) * scale
        visible = torch.ones(q.shape[0], num_keys, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~visible.tril(context_len), -torch.inf)
        result = torch.einsum("kgts,skd->tkgd", scores.softmax(dim=-1), pages[1])
        out.copy_(result.flatten(1))

    def argmax_rows(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(logits.argmax(dim=-1))

    def decode_cut(
        self, seq_lens: torch.Tensor, bucket: int, num_kv_heads: int, max_seq_len: int
    ) -> DecodeCut:
        return DecodeCut()


def _store(pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    block_size = pages.shape[2]
    wanted = slots >= 0
    blocks, offsets = slots[wanted] // block_size, slots[wanted] % block_size
    pages[blocks, 0, offsets] = k[wanted]
    pages[blocks, 1, offsets] = v[wanted]


def gathered_prefill(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`GpuKernels.paged_prefill` by FlashAttention-2 over gathered pages. CUDA only.

    Its causal mask is aligned to the bottom right when there are more keys than queries, as a
    chunk behind cached tokens needs it.
    """
    num_rows, num_keys = q.shape[0], context_len + q.shape[0]
    pages = kv_layer.transpose(0, 1).index_select(1, block_table)
    k, v = pages.flatten(1, 2)[:, None, :num_keys]
    heads = q.unflatten(1, (-1, kv_layer.shape[4]))[None]
    result = torch.ops.aten._flash_attention_forward(
        heads, k, v, None, None, num_rows, num_keys, 0.0, True, False, scale=scale
    )[0]
    out.copy_(result.view(num_rows, -1))


class TritonKernels:
    """The kernels of `pdrelay.engine.kernels.triton` on one device and one stream.

    `pdl`: programmatic dependent launch. `gathers_chunks`: chunks behind a prefix by
    FlashAttention-2 over gathered pages instead of the kernel that reads them in place.
    """

    def __init__(
        self, device: torch.device, *, pdl: bool = True, gathers_chunks: bool = True
    ) -> None:
        from pdrelay.engine.kernels.triton import (
            activation,
            attention_decode,
            attention_prefill,
            decode_parts,
            linear_small,
            norm,
            rope,
            sample,
        )
        from pdrelay.engine.kernels.triton.launch import num_sms

        self.pdl = pdl
        # Of the decode kernel; None: its rule's, and `pdl`.
        self.decode_depth: int | None = None
        self.decode_pdl: bool | None = None
        self.gathers_chunks = gathers_chunks
        self.max_small_rows: int = linear_small.MAX_ROWS
        self._device = device
        self._num_sms = num_sms(device)
        self._norm, self._activation, self._rope = norm, activation, rope
        self._decode, self._prefill = attention_decode, attention_prefill
        self._parts = decode_parts
        self._linear, self._sample = linear_small, sample
        self._max_batch = 0
        self._workspace: attention_decode.DecodeWorkspace | None = None
        self._argmax_workspace: sample.ArgmaxWorkspace | None = None

    def reserve(self, max_batch: int, num_heads: int, head_dim: int, vocab_size: int) -> None:
        self._max_batch = max_batch
        self._workspace = self._decode.DecodeWorkspace(max_batch, num_heads, head_dim, self._device)
        self._argmax_workspace = self._sample.ArgmaxWorkspace(max_batch, vocab_size, self._device)

    def small_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return self._linear.linear_small(x, weight, bias, out, pdl=self.pdl)

    def small_linear_wins(self, num_rows: int, out_features: int) -> bool:
        return self._linear.beats_cublas(num_rows, out_features, self._num_sms)

    def small_norm_linear(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.empty_like(residual)
        result = self._linear.norm_linear(
            x, residual, norm_weight, eps, weight, bias, total, out, pdl=self.pdl
        )
        return result, total

    def small_gate_up(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._linear.gate_up_silu(x, weight, pdl=self.pdl)

    def small_gate_up_wins(self, num_rows: int, out_features: int) -> bool:
        return self._linear.gate_up_beats_cublas(num_rows, out_features, self._num_sms)

    def small_norm_gate_up(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.empty_like(residual)
        result = self._linear.norm_gate_up_silu(
            x, residual, norm_weight, eps, weight, total, pdl=self.pdl
        )
        return result, total

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self._norm.add_rms_norm(x, residual, weight, eps, pdl=self.pdl)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._activation.silu_mul(gate_up, pdl=self.pdl)

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        rope_table: torch.Tensor,
        norms: HeadNorms | None,
        kv_layer: torch.Tensor,
        remote_layer: torch.Tensor | None,
        remote_slots: torch.Tensor | None,
        keep_keys: bool,
    ) -> None:
        self._rope.rope_write_kv(
            qkv,
            positions,
            slots,
            rope_table,
            None if norms is None else norms.q,
            None if norms is None else norms.k,
            0.0 if norms is None else norms.eps,
            kv_layer,
            remote_layer,
            remote_slots,
            keep_keys=keep_keys,
            pdl=self.pdl,
        )

    def paged_decode(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        cut: DecodeCut,
    ) -> None:
        self._decode.paged_decode(
            q,
            kv_layer,
            block_tables,
            seq_lens,
            scale,
            out,
            self._workspace,
            cut,
            depth=self.decode_depth,
            pdl=self.pdl if self.decode_pdl is None else self.decode_pdl,
        )

    def paged_prefill(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        block_table: torch.Tensor,
        context_len: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        chunk = gathered_prefill if self.gathers_chunks else self._prefill.paged_prefill
        chunk(q, kv_layer, block_table, context_len, scale, out)

    def argmax_rows(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        workspace = self._argmax_workspace if logits.shape[0] <= self._max_batch else None
        self._sample.argmax_rows(logits, out, workspace, pdl=self.pdl)

    def decode_cut(
        self, seq_lens: torch.Tensor, bucket: int, num_kv_heads: int, max_seq_len: int
    ) -> DecodeCut:
        num_splits = self._decode.split_rule(bucket, num_kv_heads, max_seq_len, self._num_sms)
        if num_splits == self._decode.MAX_SPLITS:
            return DecodeCut(num_splits)
        extra = self._parts.extra_parts(seq_lens, num_splits, num_kv_heads, self._num_sms)
        return DecodeCut(num_splits, extra)
