"""How many KV blocks fit a CUDA device: what is left of the rank's share after everything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdrelay.core.kv_layout import KVLayout
from pdrelay.engine.attention.context import ForwardContext, PrefillSegment
from pdrelay.engine.models.registry import CausalLM
from pdrelay.engine.sampler import draw
from pdrelay.engine.step_executor import StepLimits
from pdrelay.engine.step_input import DRAW_COLUMNS
from pdrelay.errors import LaunchError

_GIB = 1 << 30
# CUDA context, cuBLAS and cuDNN workspaces, Triton modules: outside torch's allocator. Measured
# by nobody in advance, so a bound; a rank that finds less free memory than this leaves takes less.
_OUTSIDE_BYTES = _GIB
# Private memory of the graphs besides decode's logits: one step of the largest prefill bucket, in
# which the others fit, and the graphs themselves.
_GRAPH_BYTES = _GIB // 2


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device, as one rank sees it."""

    total: int
    free: int  # after weights are loaded and the profile's memory is given back
    peak: int  # weights and the largest step, in torch's allocator
    resident: int  # of these, still held


def num_kv_blocks(
    memory: DeviceMemory, share: float, block_bytes: int, graph_logits_bytes: int
) -> int:
    """Blocks for the pool when this rank may use `share` of the device. May be 0 or less.

    As in vLLM: share of the total, less the peak of a full step. It is bounded by what is free
    now, so that another process on the device is an honest smaller pool, not an error later.
    """
    reserve = _OUTSIDE_BYTES + _GRAPH_BYTES + graph_logits_bytes
    budget = int(memory.total * share) - memory.peak - reserve
    activations = memory.peak - memory.resident
    possible = memory.free - activations - _GRAPH_BYTES - graph_logits_bytes
    return min(budget, possible) // block_bytes


def profile(model: CausalLM, layout: KVLayout, limits: StepLimits) -> None:
    """Run the largest step there may be, storing no K and V: a prompt as long as the token budget,
    and a draw for as many requests as run at once. `layout`: of one block."""
    device = torch.device("cuda", torch.cuda.current_device())
    num_tokens = limits.max_num_batched_tokens
    pool = torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype), device=device)
    context = ForwardContext(
        kv_pool=pool,
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
        prefills=[PrefillSegment(0, num_tokens, 0, ())],
    )
    positions = torch.arange(num_tokens, device=device).clamp_(max=limits.max_model_len - 1)
    with torch.inference_mode():
        hidden = model.forward(torch.zeros_like(positions), positions, context)
        rows = hidden[: limits.max_num_seqs]
        columns = torch.full((DRAW_COLUMNS, rows.shape[0]), 0.5, dtype=torch.float64, device=device)
        draw(model.raw_logits(rows).float(), columns, truncates=True, has_min_p=True)
    torch.cuda.synchronize(device)


def measure(model: CausalLM, layout: KVLayout, limits: StepLimits) -> DeviceMemory:
    """Profile the largest step. Raises LaunchError when it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        profile(model, layout, limits)
    except torch.cuda.OutOfMemoryError as error:
        raise LaunchError(
            f"a step of {limits.max_num_batched_tokens} tokens does not fit the GPU beside the "
            "weights: lower --max-num-batched-tokens, or use a --tp of more ranks"
        ) from error
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return DeviceMemory(total, free, peak, torch.cuda.memory_allocated())


def check_capacity(num_blocks: int, limits: StepLimits, share: float) -> None:
    """Raises LaunchError when one request of the longest length does not fit the pool."""
    capacity = max(num_blocks, 0) * limits.block_size
    if capacity >= limits.max_model_len:
        return
    raise LaunchError(
        f"the KV cache in {share:.0%} of the GPU's memory holds {capacity} tokens, one request may "
        f"have {limits.max_model_len}: pass --max-model-len {max(capacity, 1)}, or raise "
        "--gpu-memory-utilization"
    )
