"""The operations a model is written in, on torch or on the C kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from pdrelay.engine.kernels import Kernels
from pdrelay.engine.kernels.workspace import Workspace
from pdrelay.engine.remote_store import RemoteLayer
from pdrelay.model.config import Llama3RopeScaling, ModelConfig


class Linear(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], both contiguous."""


@dataclass(frozen=True)
class HeadNorms:
    """Qwen3's RMSNorm weights of each query and key head, [head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


class Ops(Protocol):
    """One implementation of the model's operations. Results are valid until the next call of the
    same operation (or of the linear layers of the same name).
    """

    def linear(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """A layer of `weight` [out, in], which it may copy into a layout of its own."""

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add x to `residual` [T, H] in place, then RMSNorm of the residual."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 * I] -> silu(first half) * second half, [T, I]."""

    def gate_up_silu(self, x: torch.Tensor, gate_up: Linear) -> torch.Tensor:
        """`silu_mul` of `gate_up`, [T, I]."""

    def norm_linear(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        linear: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`linear` of `add_rms_norm`, and residual + x, which may be `residual` itself."""

    def norm_gate_up(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        gate_up: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`gate_up_silu` of `add_rms_norm`, and residual + x."""

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
        """Norm and rotate q and k of [T, (Hq + 2 * Hkv) * D]; write k and v into the pages.

        `kv_layer` [num_blocks, 2, block_size, Hkv, D]. `remote`: a peer's pages that get the same;
        `keep_keys`: k is rotated in `qkv` too. Both on CUDA only; elsewhere remote is None.
        Returns q, [T, Hq * D], maybe strided.
        """


class _Unfused:
    """Norm, projection and activation one after the other."""

    def norm_linear(
        self: Ops,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        linear: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return linear(self.add_rms_norm(x, residual, norm_weight, eps)), residual

    def gate_up_silu(self: Ops, x: torch.Tensor, gate_up: Linear) -> torch.Tensor:
        return self.silu_mul(gate_up(x))

    def norm_gate_up(
        self: Ops,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        gate_up: Linear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.add_rms_norm(x, residual, norm_weight, eps)
        return self.gate_up_silu(h, gate_up), residual


class TorchOps(_Unfused):
    """Any dtype, any device."""

    def linear(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return lambda x: functional.linear(x, weight, bias)

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
        remote: RemoteLayer | None = None,
        keep_keys: bool = False,
    ) -> torch.Tensor:
        assert remote is None and not keep_keys
        block_size, num_kv_heads, head_dim = kv_layer.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
        table = rope_table[positions]
        blocks, offsets = slots // block_size, slots % block_size
        kv_layer[blocks, 0, offsets] = rotate(k, table)
        kv_layer[blocks, 1, offsets] = v
        return rotate(q, table).flatten(1)


class KernelOps(_Unfused):
    """float32 on CPU. A row's result has the same bits in any batch (see cpu.c)."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._workspace = Workspace()

    def linear(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return _PackedLinear(name, weight, bias, self._kernels, self._workspace)

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        num_rows, width = residual.shape
        assert residual.is_contiguous() and (x is None or x.is_contiguous())
        out = self._workspace.take("norm", num_rows, width)
        self._kernels.add_rms_norm(
            None if x is None else x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            num_rows,
            width,
            eps,
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_rows, width = gate_up.shape
        assert gate_up.is_contiguous()
        out = self._workspace.take("silu_mul", num_rows, width // 2)
        self._kernels.silu_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, width // 2)
        return out

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
        assert remote is None and not keep_keys
        block_size, num_kv_heads, head_dim = kv_layer.shape[2:]
        num_rows, width = qkv.shape
        q_width = width - 2 * num_kv_heads * head_dim
        assert positions.dtype == slots.dtype == torch.int64
        assert qkv.is_contiguous() and kv_layer.is_contiguous()
        assert kv_layer.dtype == torch.float32
        self._kernels.rope_write_kv(
            qkv.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            rope_table.data_ptr(),
            None if norms is None else norms.q.data_ptr(),
            None if norms is None else norms.k.data_ptr(),
            0.0 if norms is None else norms.eps,
            kv_layer.data_ptr(),
            num_rows,
            q_width // head_dim,
            num_kv_heads,
            head_dim,
            block_size,
        )
        return qkv[:, :q_width]


class _PackedLinear:
    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kernels: Kernels,
        workspace: Workspace,
    ) -> None:
        weight = weight.contiguous()
        self._name = name
        self._out_features, self._in_features = weight.shape
        panels = -(-self._out_features // kernels.panel_width)
        self._packed = torch.empty(panels * kernels.panel_width * self._in_features)
        kernels.pack(
            weight.data_ptr(), self._out_features, self._in_features, self._packed.data_ptr()
        )
        self._packed_at = self._packed.data_ptr()
        self._bias = None if bias is None else bias.contiguous()
        self._bias_at = None if self._bias is None else self._bias.data_ptr()
        self._linear = kernels.linear
        self._take = workspace.take

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous() and x.shape[1] == self._in_features
        num_rows = x.shape[0]
        out = self._take(self._name, num_rows, self._out_features)
        self._linear(
            x.data_ptr(),
            self._packed_at,
            self._bias_at,
            out.data_ptr(),
            num_rows,
            self._out_features,
            self._in_features,
        )
        return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension (Zhang & Sennrich, 2019), computed in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """RoPE in the half-split form of Llama checkpoints. `x` [T, H, D]; `table` [T, D]: cos, sin."""
    cos, sin = table[:, None].chunk(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_table(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """float32 [max_position_embeddings, head_dim]: D/2 cosines, then D/2 sines of each position."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inverse = 1.0 / (config.rope_theta**half)
    if config.rope_scaling is not None:
        inverse = _llama3_frequencies(inverse, config.rope_scaling)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, inverse)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _llama3_frequencies(inverse: torch.Tensor, scaling: Llama3RopeScaling) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the rest blended."""
    wavelength = 2 * math.pi / inverse
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - keep) * inverse / scaling.factor + keep * inverse
