"""The model's operations on CUDA: cuBLAS, and the fused kernels of `kernels/gpu.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdrelay.engine.kernels.gpu import GpuKernels
from pdrelay.engine.layers import HeadNorms, Linear
from pdrelay.engine.qkv_buffer import QkvBuffer
from pdrelay.engine.remote_store import RemoteLayer

# What one tile of the own kernels holds. A step of the 8B shape with o and down by them and by
# cuBLAS: 4.31 and 4.49 ms with 2 rows, 4.83 and 5.00 with 16, 5.43 and 5.33 with 24 (H200,
# docs/LOG.md 2026-11-30).
SMALL_ROWS = 16


@dataclass(frozen=True)
class CudaLinear:
    """`into`: where results go instead of new memory."""

    weight: torch.Tensor  # [out, in]
    transposed: torch.Tensor  # a view
    bias: torch.Tensor | None
    into: QkvBuffer | None
    ops: CudaOps

    def out(self, num_rows: int) -> torch.Tensor | None:
        return None if self.into is None else self.into.rows(num_rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        out = self.out(num_rows)
        if self.ops.takes_small(num_rows, self.weight.shape[0]):
            return self.ops.kernels.small_linear(x, self.weight, self.bias, out)
        if self.bias is None:
            return torch.mm(x, self.transposed, out=out)
        return torch.addmm(self.bias, x, self.transposed, out=out)


class CudaOps:
    """Results are new tensors, except the `qkv` layer's, which lies in the QkvBuffer.

    Batches of at most `small_rows` take own linear kernels where those read the weights faster than
    cuBLAS; one row, they do norm and activation on the way. Batches of at most `gate_up_rows` do
    the activation of the gate_up layer on the way, where that is no slower.
    """

    def __init__(
        self,
        kernels: GpuKernels,
        buffer: QkvBuffer,
        *,
        small_rows: int = SMALL_ROWS,
        gate_up_rows: int | None = None,
    ) -> None:
        """`gate_up_rows` None: all that the kernel takes."""
        most = kernels.max_small_rows
        self.gate_up_rows = most if gate_up_rows is None else gate_up_rows
        assert small_rows >= 0 and 0 <= self.gate_up_rows <= most
        self.kernels = kernels
        self.small_rows = min(small_rows, most)
        self._buffer = buffer
        self.add_rms_norm = kernels.add_rms_norm
        self.silu_mul = kernels.silu_mul

    def takes_small(self, num_rows: int, out_features: int) -> bool:
        return num_rows <= self.small_rows and self.kernels.small_linear_wins(
            num_rows, out_features
        )

    def linear(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        into = self._buffer if name == "qkv" else None
        return CudaLinear(weight, weight.t(), bias, into, self)

    def gate_up_silu(self, x: torch.Tensor, gate_up: Linear) -> torch.Tensor:
        assert isinstance(gate_up, CudaLinear)
        num_rows, out_features = x.shape[0], gate_up.weight.shape[0] // 2
        fits = num_rows <= self.gate_up_rows and gate_up.bias is None
        if fits and self.kernels.small_gate_up_wins(num_rows, out_features):
            return self.kernels.small_gate_up(x, gate_up.weight)
        return self.silu_mul(gate_up(x))

    def norm_linear(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        linear: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(linear, CudaLinear)
        num_rows = residual.shape[0]
        if num_rows > min(1, self.small_rows):
            return linear(self.add_rms_norm(x, residual, norm_weight, eps)), residual
        return self.kernels.small_norm_linear(
            x, residual, norm_weight, eps, linear.weight, linear.bias, linear.out(num_rows)
        )

    def norm_gate_up(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        gate_up: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(gate_up, CudaLinear)
        if residual.shape[0] > min(1, self.small_rows) or gate_up.bias is not None:
            h = self.add_rms_norm(x, residual, norm_weight, eps)
            return self.gate_up_silu(h, gate_up), residual
        return self.kernels.small_norm_gate_up(x, residual, norm_weight, eps, gate_up.weight)

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
        self.kernels.rope_write_kv(
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
