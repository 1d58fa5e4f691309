"""FlashAttention-3 of an installed vLLM, for decode and for chunks behind cached tokens. Optional.

FA3 wants K and V as [num_blocks, block_size, Hkv, D] each; in a layer of our pool, [num_blocks, 2,
block_size, Hkv, D], they are two views of which only the outermost stride differs. Its kernels take
every stride but the last as an argument, so nothing is copied.

How it splits a decode row's keys depends on the batch and on the width of the block tables. A row's
bits may therefore differ between a CUDA graph, whose tables are as wide as the longest request, and
a step with prompts: with `triton` they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from pdrelay.engine.attention.base import AttentionShape
from pdrelay.engine.kernels.decode_cut import DecodeCut
from pdrelay.errors import LaunchError

Attend = Callable[..., Any]  # vllm.vllm_flash_attn.flash_attn_varlen_func

_MAX_HEAD_DIM = 256
_VECTOR = 8  # elements of 16 bytes: rows and heads begin at multiples of it
_CAPABILITY = 9  # Hopper; FA3 has no kernels for others
_FIX = "use --attention-backend triton"


class Fa3Paged:
    """Implements `kernels.gpu.PagedAttention`."""

    def __init__(self, shape: AttentionShape, device: torch.device, attend: Attend) -> None:
        self._shape = shape
        self._attend = attend
        self._device = device
        self._starts = torch.arange(1025, dtype=torch.int32, device=device)
        # All layers of a step ask for the same.
        self._bounds_of = lru_cache(maxsize=16)(self._bounds)

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
        """`cut` is the Triton kernel's; FA3 has a rule of its own."""
        batch = q.shape[0]
        if batch >= len(self._starts):
            self._starts = torch.arange(2 * batch, dtype=torch.int32, device=self._device)
        longest = block_tables.shape[1] * kv_layer.shape[2]
        starts = self._starts[: batch + 1]
        self._run(q, kv_layer, block_tables, seq_lens, scale, out, starts, 1, longest)

    def paged_prefill(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        block_table: torch.Tensor,
        context_len: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Its causal mask is aligned to the bottom right, as a chunk behind cached tokens needs."""
        length = q.shape[0]
        starts, used = self._bounds_of(length, context_len)
        longest = context_len + length
        self._run(q, kv_layer, block_table[None], used, scale, out, starts, length, longest)

    def _bounds(self, length: int, context_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the chunk begins and ends among the queries, and its keys, int32 [2] and [1]; by
        kernels, as a copy from the host would be waited for."""
        device = self._device
        starts = torch.arange(0, length + 1, length, dtype=torch.int32, device=device)
        return starts, torch.full((1,), context_len + length, dtype=torch.int32, device=device)

    def _run(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        tables: torch.Tensor,
        num_keys: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        starts: torch.Tensor,
        max_queries: int,
        max_keys: int,
    ) -> None:
        """`starts`: int32 [B + 1], rows of q where each sequence begins; `num_keys`: int32 [B]."""
        heads = (-1, self._shape.head_dim)
        self._attend(
            q.unflatten(1, heads),
            kv_layer[:, 0],
            kv_layer[:, 1],
            max_seqlen_q=max_queries,
            cu_seqlens_q=starts,
            max_seqlen_k=max_keys,
            seqused_k=num_keys,
            softmax_scale=scale,
            causal=True,
            block_table=tables,
            out=out.unflatten(1, heads),
            fa_version=3,
        )


def load_fa3(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Fa3Paged:
    """Raises LaunchError where there is no FA3, or it does not take these heads."""
    head_dim = shape.head_dim
    if dtype not in (torch.bfloat16, torch.float16):
        raise LaunchError(f"FlashAttention-3 has no kernels for {dtype}: {_FIX}")
    if head_dim % _VECTOR or head_dim > _MAX_HEAD_DIM:
        raise LaunchError(
            f"FlashAttention-3 takes a head_dim that {_VECTOR} divides, up to {_MAX_HEAD_DIM}, not "
            f"{head_dim}: {_FIX}"
        )
    major = torch.cuda.get_device_capability(device)[0]
    if major != _CAPABILITY:
        raise LaunchError(f"FlashAttention-3 needs a Hopper GPU, {device} is sm_{major}x: {_FIX}")
    return Fa3Paged(shape, device, _installed())


def _installed() -> Attend:
    try:
        from vllm import vllm_flash_attn
    except (ImportError, OSError) as error:  # none, or built for another torch
        raise LaunchError(
            f"no FlashAttention-3 here ({error}): install a vLLM built for torch "
            f"{torch.__version__} beside pdrelay, or {_FIX}"
        ) from error
    reason = vllm_flash_attn.fa_version_unsupported_reason(3)
    if reason:
        raise LaunchError(f"the installed vLLM has no FlashAttention-3 ({reason}): {_FIX}")
    attend: Attend = vllm_flash_attn.flash_attn_varlen_func
    return attend
