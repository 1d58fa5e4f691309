"""The model's operations on CUDA: cuBLAS, and the fused kernels of `kernels/gpu.py`."""

from __future__ import annotations

import torch

from pdrelay.engine.kernels.gpu import GpuKernels
from pdrelay.engine.layers import HeadNorms, Linear
from pdrelay.engine.qkv_buffer import QkvBuffer
from pdrelay.engine.remote_store import RemoteLayer


class CudaOps:
    """Results are new tensors, except the `qkv` layer's, which lies in the QkvBuffer."""

    def __init__(self, kernels: GpuKernels, buffer: QkvBuffer) -> None:
        self._kernels = kernels
        self._buffer = buffer
        self.add_rms_norm = kernels.add_rms_norm
        self.silu_mul = kernels.silu_mul

    def linear(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        transposed = weight.t()
        if name == "qkv":
            return self._into_buffer(transposed, bias)
        if bias is None:
            return lambda x: torch.mm(x, transposed)
        return lambda x: torch.addmm(bias, x, transposed)

    def _into_buffer(self, transposed: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        buffer = self._buffer
        if bias is None:
            return lambda x: torch.mm(x, transposed, out=buffer.rows(x.shape[0]))
        return lambda x: torch.addmm(bias, x, transposed, out=buffer.rows(x.shape[0]))

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        rope_table: torch.Tensor,
        norms: HeadNorms | None,
        kv_layer: torch.Tensor,
        remote: RemoteLayer | None = None,
        keep_keys: bool = False,
    ) -> torch.Tensor:
        self._kernels.rope_write_kv(
            qkv,
            positions,
            slots,
            rope_table,
            norms,
            kv_layer,
            None if remote is None else remote.pages,
            None if remote is None else remote.slots,
            keep_keys,
        )
        num_kv_heads, head_dim = kv_layer.shape[3:]
        return qkv[:, : qkv.shape[1] - 2 * num_kv_heads * head_dim]
