"""Which operations and which attention run a model on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdrelay.core.rank_config import AttentionName
from pdrelay.engine.attention.base import AttentionBackend, AttentionShape
from pdrelay.engine.kernels import load_kernels
from pdrelay.engine.kernels.gpu import GpuKernels, PagedAttention
from pdrelay.engine.layers import KernelOps, Ops, TorchOps
from pdrelay.engine.qkv_buffer import QkvBuffer


@dataclass(frozen=True)
class Backend:
    """`keeps_keys`: attention reads fresh prompts' K in the QKV projection, so RoPE leaves it."""

    ops: Ops
    attention: AttentionBackend
    qkv_buffer: QkvBuffer | None = None
    kernels: GpuKernels | None = None

    @property
    def keeps_keys(self) -> bool:
        return self.qkv_buffer is not None


def select_backend(
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    use_kernels: bool = True,
    attention: AttentionName = "auto",
) -> Backend:
    """The fastest for this shape, dtype and device; torch alone unless `use_kernels`. On CUDA
    `attention` names what reads the pages. Raises LaunchError when that is not to be had."""
    from pdrelay.engine.attention.sdpa import SdpaAttention

    if use_kernels and device.type == "cuda":
        return cuda_backend(shape, dtype, device, attention=attention)
    kernels = load_kernels() if use_kernels else None
    if kernels is None or dtype != torch.float32 or device.type != "cpu":
        return Backend(TorchOps(), SdpaAttention(shape))
    from pdrelay.engine.attention.cpu import CpuAttention

    supported = CpuAttention.supports(shape, kernels)
    chosen = CpuAttention(shape, kernels) if supported else SdpaAttention(shape)
    return Backend(KernelOps(kernels), chosen)


def cuda_backend(
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    kernels: GpuKernels | None = None,
    attention: AttentionName = "auto",
) -> Backend:
    """Triton kernels unless others are given (torch's own, in tests without a GPU).

    `attention` "auto" is "triton". Raises LaunchError for an "fa3" that is not installed or does
    not take the shape.
    """
    from pdrelay.engine.attention.cuda import CudaAttention
    from pdrelay.engine.cuda_ops import CudaOps
    from pdrelay.engine.kernels.gpu import TritonKernels

    chosen = TritonKernels(device) if kernels is None else kernels
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    buffer = QkvBuffer(width, dtype, device)
    paged: PagedAttention = chosen
    if attention == "fa3":
        from pdrelay.engine.attention.fa3 import load_fa3

        paged = load_fa3(shape, dtype, device)
    return Backend(CudaOps(chosen, buffer), CudaAttention(shape, paged, buffer), buffer, chosen)
