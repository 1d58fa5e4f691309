"""Llama and Qwen3: a pre-norm transformer with RoPE, grouped KV heads and a SiLU-gated MLP.

Tensor parallel as in Megatron-LM (Shoeybi et al., 2019): the fused QKV and gate_up layers are cut
by output channel, the o and down layers by input channel with a sum over ranks behind them, the
embedding and lm_head by vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from pdrelay.core.rank_config import AttentionName
from pdrelay.engine.attention import AttentionShape, ForwardContext
from pdrelay.engine.backend import Backend, select_backend
from pdrelay.engine.communicator import Communicator
from pdrelay.engine.layers import HeadNorms, Linear, Ops, rope_table
from pdrelay.engine.weights import EMBEDDING, FINAL_NORM, LM_HEAD, WeightSource, layer_prefix
from pdrelay.model.config import ModelConfig


@dataclass(frozen=True)
class DecoderLayer:
    """This rank's weights of one layer."""

    input_norm: torch.Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    o: Linear
    post_attention_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class LlamaForCausalLM:
    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        communicator: Communicator,
        use_kernels: bool = True,
        backend: Backend | None = None,
        attention: AttentionName = "auto",
    ) -> None:
        self._config = config
        self._communicator = communicator
        shape = AttentionShape(
            num_heads=config.num_heads // communicator.world_size,
            num_kv_heads=config.num_kv_heads // communicator.world_size,
            head_dim=config.head_dim,
        )
        self.backend = backend or select_backend(shape, dtype, device, use_kernels, attention)
        self._ops, self._attention = self.backend.ops, self.backend.attention
        self._rope_table = rope_table(config, device)
        loader = _Loader(config, weights, self._ops, dtype, device, communicator)
        self._embedding = loader.vocabulary(EMBEDDING)
        self._first_token = communicator.rank * self._embedding.shape[0]
        self._layers = [loader.layer(i) for i in range(config.num_layers)]
        self._final_norm = loader.whole(FINAL_NORM, config.hidden_size)
        head = self._embedding if config.tie_word_embeddings else loader.vocabulary(LM_HEAD)
        self._lm_head = self._ops.linear("lm_head", head, None)

    @torch.inference_mode()
    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        ops, after_layer = self._ops, context.after_layer
        slots, remote = context.slot_mapping, context.remote
        keep_keys = self.backend.keeps_keys and context.has_fresh_prompt
        residual = self._embed(token_ids)
        x: torch.Tensor | None = None  # this rank's part of what the residual still lacks
        for i, (layer, kv) in enumerate(zip(self._layers, context.kv_pool.unbind(0), strict=True)):
            qkv, residual = self._norm_linear(x, residual, layer.input_norm, layer.qkv)
            q = ops.rope_write_kv(
                qkv,
                positions,
                slots,
                self._rope_table,
                layer.head_norms,
                kv,
                None if remote is None else remote.layer(i),
                keep_keys,
            )
            if after_layer is not None:
                after_layer(i)
            x = layer.o(self._attention(q, kv, context))
            h, residual = self._norm_gate_up(x, residual, layer.post_attention_norm, layer.gate_up)
            x = layer.down(h)
        assert x is not None
        return residual.add_(self._communicator.all_reduce_(x))

    def _norm_linear(
        self, x: torch.Tensor | None, residual: torch.Tensor, norm: torch.Tensor, linear: Linear
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Ops.norm_linear` of x summed over ranks."""
        eps, communicator = self._config.rms_norm_eps, self._communicator
        if x is not None:
            h = communicator.all_reduce_add_rms_norm(x, residual, norm, eps)
            if h is not None:
                return linear(h), residual
            x = communicator.all_reduce_(x)
        return self._ops.norm_linear(x, residual, norm, eps, linear)

    def _norm_gate_up(
        self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, gate_up: Linear
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Ops.norm_gate_up` of x summed over ranks."""
        eps, communicator = self._config.rms_norm_eps, self._communicator
        h = communicator.all_reduce_add_rms_norm(x, residual, norm, eps)
        if h is not None:
            return self._ops.gate_up_silu(h, gate_up), residual
        x = communicator.all_reduce_(x)
        return self._ops.norm_gate_up(x, residual, norm, eps, gate_up)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # A copy: the layer's buffer is used again by the next call.
        return self.raw_logits(hidden).to(torch.float32, copy=True)

    @torch.inference_mode()
    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        eps = self._config.rms_norm_eps
        shard, _ = self._ops.norm_linear(
            None, hidden.contiguous(), self._final_norm, eps, self._lm_head
        )
        shards = self._communicator.all_gather_last_dim(shard)
        return shards[:, : self._config.vocab_size]

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._communicator.world_size == 1:
            return functional.embedding(token_ids, self._embedding)
        local = token_ids - self._first_token
        foreign = (local < 0) | (local >= self._embedding.shape[0])
        rows = functional.embedding(local.masked_fill(foreign, 0), self._embedding)
        return self._communicator.all_reduce_(rows.masked_fill_(foreign[:, None], 0.0))


class _Loader:
    """Cuts this rank's part out of each parameter and fuses what runs together."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        communicator: Communicator,
    ) -> None:
        self._config = config
        self._weights = weights
        self._ops = ops
        self._dtype = dtype
        self._device = device
        self._rank = communicator.rank
        self._world_size = communicator.world_size

    def layer(self, index: int) -> DecoderLayer:
        config, prefix = self._config, layer_prefix(index)
        hidden, bias = config.hidden_size, config.attention_bias
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        qkv = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        gate_up = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        return DecoderLayer(
            input_norm=self.whole(f"{prefix}input_layernorm.weight", hidden),
            qkv=self._column_parallel("qkv", f"{prefix}self_attn.", qkv, bias),
            head_norms=self._head_norms(prefix) if config.qk_norm else None,
            o=self._row_parallel("o", f"{prefix}self_attn.o_proj", q_width, bias),
            post_attention_norm=self.whole(f"{prefix}post_attention_layernorm.weight", hidden),
            gate_up=self._column_parallel("gate_up", f"{prefix}mlp.", gate_up, config.mlp_bias),
            down=self._row_parallel(
                "down", f"{prefix}mlp.down_proj", config.intermediate_size, config.mlp_bias
            ),
        )

    def whole(self, name: str, size: int) -> torch.Tensor:
        """A vector that every rank holds."""
        return self._place(self._weights.tensor(name, (size,)))

    def vocabulary(self, name: str) -> torch.Tensor:
        """This rank's rows of a [vocab, hidden] table; ranks get equal parts, padded with zeros."""
        config = self._config
        rows = -(-config.vocab_size // self._world_size)
        start = min(self._rank * rows, config.vocab_size)
        stop = min(start + rows, config.vocab_size)
        shape = (config.vocab_size, config.hidden_size)
        table = self._place(self._weights.tensor(name, shape, 0, start, stop))
        return functional.pad(table, (0, 0, 0, rows - (stop - start))).contiguous()

    def _head_norms(self, prefix: str) -> HeadNorms:
        q, k = (
            self.whole(f"{prefix}self_attn.{name}.weight", self._config.head_dim)
            for name in ("q_norm", "k_norm")
        )
        return HeadNorms(q, k, self._config.rms_norm_eps)

    def _column_parallel(
        self, name: str, prefix: str, parts: dict[str, int], with_bias: bool
    ) -> Linear:
        hidden = self._config.hidden_size
        weights, biases = [], []
        for part, width in parts.items():
            rows = (0, *self._share(width))
            weights.append(self._weights.tensor(f"{prefix}{part}.weight", (width, hidden), *rows))
            if with_bias:
                biases.append(self._weights.tensor(f"{prefix}{part}.bias", (width,), *rows))
        bias = self._place(torch.cat(biases)) if biases else None
        return self._ops.linear(name, self._place(torch.cat(weights)), bias)

    def _row_parallel(self, name: str, prefix: str, in_features: int, with_bias: bool) -> Linear:
        hidden = self._config.hidden_size
        share = self._share(in_features)
        weight = self._weights.tensor(f"{prefix}.weight", (hidden, in_features), 1, *share)
        bias = None
        if with_bias and self._rank == 0:  # the sum over ranks must count it once
            bias = self._place(self._weights.tensor(f"{prefix}.bias", (hidden,)))
        return self._ops.linear(name, self._place(weight), bias)

    def _share(self, size: int) -> tuple[int, int]:
        part = size // self._world_size
        return self._rank * part, (self._rank + 1) * part

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()
