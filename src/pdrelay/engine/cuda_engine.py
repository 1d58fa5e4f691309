"""One rank's CUDA engine, from loaded weights to a runner that is warm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.rank_config import RankConfig
from pdrelay.engine.accelerator import CudaAccelerator
from pdrelay.engine.attention.cuda import CUDNN_STEP, CudaAttention
from pdrelay.engine.communicator import Communicator
from pdrelay.engine.cuda_runner import CudaFollower, CudaRunner
from pdrelay.engine.decode_buckets import decode_buckets
from pdrelay.engine.device_memory import check_capacity, measure, num_kv_blocks
from pdrelay.engine.models.registry import CausalLM
from pdrelay.engine.startup_clock import StartupClock
from pdrelay.engine.step_executor import StepExecutor, StepLimits
from pdrelay.errors import LaunchError
from pdrelay.model.config import ModelConfig


def open_device(name: str) -> torch.device:
    """Make `name` ("cuda:1") the current device. Raises LaunchError when it cannot be used."""
    device = torch.device(name)
    if not torch.cuda.is_available():
        raise LaunchError(
            f"torch {torch.__version__} finds no CUDA device: install a CUDA build of torch and a "
            "driver for it, or pass --device cpu"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise LaunchError(
            f"no {name}: torch sees {torch.cuda.device_count()} GPUs; check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(device)
    return device


def step_limits(config: RankConfig) -> StepLimits:
    return StepLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
    )


def prepare_backend(
    model: CausalLM, config: ModelConfig, limits: StepLimits, world_size: int = 1
) -> None:
    """Give the model's shared buffers their final size: CUDA graphs will keep their addresses."""
    backend = model.backend
    assert backend.qkv_buffer is not None and backend.kernels is not None
    # One step of padding behind the longest batch, which the last prompt's attention may read.
    num_rows = max(limits.max_num_batched_tokens, limits.max_num_seqs)
    backend.qkv_buffer.reserve(num_rows + CUDNN_STEP)
    backend.kernels.reserve(
        limits.max_num_seqs, config.num_heads // world_size, config.head_dim, config.vocab_size
    )


def size_pool(
    config: RankConfig,
    model_config: ModelConfig,
    model: CausalLM,
    communicator: Communicator,
    one_block: KVLayout,
) -> int:
    """Blocks of the KV pool: as asked, or what the device has room for; equal on all ranks.

    Raises LaunchError when that is less than one request may need.
    """
    if config.num_blocks:
        return config.num_blocks
    limits, share = step_limits(config), config.gpu_memory_utilization
    memory = measure(model, one_block, limits)
    graph_rows = sum(decode_buckets(config.max_num_seqs))
    logits_bytes = 2 * graph_rows * model_config.vocab_size
    blocks = num_kv_blocks(memory, share, one_block.block_bytes, logits_bytes)
    everyone = communicator.all_gather_last_dim(
        torch.tensor([[blocks]], dtype=torch.int64, device=config.device)
    )
    blocks = int(everyone.min())
    check_capacity(blocks, limits, share)
    return blocks


@dataclass(frozen=True)
class CudaEngine:
    """`runner` is rank 0's, `follower` the other ranks'."""

    executor: StepExecutor
    accelerator: CudaAccelerator
    limits: StepLimits

    @cached_property
    def runner(self) -> CudaRunner:
        return CudaRunner(self.executor, self.accelerator, self.limits)

    @cached_property
    def follower(self) -> CudaFollower:
        return CudaFollower(self.executor, self.accelerator, self.limits)


def build_engine(
    model: CausalLM, kv_pool: torch.Tensor, limits: StepLimits, startup: StartupClock
) -> CudaEngine:
    """Build attention plans and graphs; what is compiled on the way is compiled."""
    accelerator = CudaAccelerator(kv_pool.device)
    executor = StepExecutor(model, kv_pool, accelerator, limits)
    attention = model.backend.attention
    if isinstance(attention, CudaAttention):
        with startup.phase("cuDNN plans"):
            attention.build_plans(limits.max_num_batched_tokens)
            accelerator.synchronize()
    with startup.phase("prefill graphs"):
        executor.capture_prefill_graphs()
        accelerator.synchronize()
    with startup.phase("decode graphs"):
        executor.capture_graphs()
        accelerator.synchronize()
    return CudaEngine(executor, accelerator, limits)
