"""What a hand-over must cost: KV bytes, a roofline of prefill, and where the two cross.

Pure arithmetic. The roofline, for a prompt of T tokens on `tp` ranks:

    FLOP(T)     = 2 * W * T  +  4 * L * H * D * T^2 / 2  +  2 * V * hidden
    prefill(T)  = max(FLOP(T) / (tp * flops_per_s), weight bytes / (tp * bytes_per_s))
    transfer(T) = T * KV bytes a token / link

W: weights of the layers, through which every token passes. L layers, H query heads, D head_dim; a
causal score matrix is half full, and QK^T and PV take 2 FLOP each a score and channel. The head
(V x hidden) runs once a prompt. Left out: norms, RoPE, activations, TP's all-reduces, and any
latency of launch or link. Times are seconds, rates bytes or FLOP a second, sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from pdrelay.core.kv_layout import DTYPE_BYTES
from pdrelay.model.config import ModelConfig, check_tp


@dataclass(frozen=True)
class KvBytes:
    """KV bytes of one token, and the factors they are the product of."""

    num_layers: int
    num_kv_heads: int  # of the whole model
    head_dim: int
    dtype: str
    tp: int

    @property
    def per_token(self) -> int:
        """All ranks together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def per_token_rank(self) -> int:
        return self.per_token // self.tp

    @property
    def arithmetic(self) -> str:
        """The product, spelt out."""
        size = DTYPE_BYTES[self.dtype]
        text = (
            f"2 (K, V) × {self.num_layers} layers × {self.num_kv_heads} KV heads × "
            f"{self.head_dim} head_dim × {size} B ({self.dtype}) = {self.per_token:,} B a token"
        )
        if self.tp > 1:
            text += f"; on each of {self.tp} ranks {self.per_token_rank:,} B"
        return text


def kv_bytes(model: ModelConfig, dtype: str, tp: int = 1) -> KvBytes:
    """Raises ModelError when KV heads do not divide among `tp` ranks."""
    check_tp(model, tp)
    return KvBytes(model.num_layers, model.num_kv_heads, model.head_dim, dtype, tp)


@dataclass(frozen=True)
class Link:
    """`bytes_per_s` in one direction. `per_rank`: every rank has one; else the ranks share it."""

    name: str
    bytes_per_s: float
    per_rank: bool
    source: str  # "assumed: ..." or "measured in this run: ..."


@dataclass(frozen=True)
class Compute:
    """One rank's rates as prefill reaches them, not the data sheet's peaks."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Roofline:
    """Prefill and hand-over of one model on `tp` ranks a side."""

    model: ModelConfig
    dtype: str
    tp: int
    compute: Compute
    link: Link

    # ---- prefill

    @property
    def layer_weights(self) -> int:
        """Weights of all layers, biases and norms left out."""
        m = self.model
        attention = m.hidden_size * m.head_dim * 2 * (m.num_heads + m.num_kv_heads)
        return m.num_layers * (attention + 3 * m.hidden_size * m.intermediate_size)

    @property
    def linear_flop(self) -> int:
        """FLOP a token in the layers' matrices."""
        return 2 * self.layer_weights

    @property
    def attention_flop(self) -> int:
        """FLOP of causal attention, to be multiplied by T^2."""
        m = self.model
        return 2 * m.num_layers * m.num_heads * m.head_dim

    @property
    def head_flop(self) -> int:
        """FLOP of the last token's logits."""
        return 2 * self.model.vocab_size * self.model.hidden_size

    def prefill_flop(self, tokens: int) -> int:
        return self.linear_flop * tokens + self.attention_flop * tokens**2 + self.head_flop

    @property
    def prefill_floor_s(self) -> float:
        """Every weight is read once."""
        weights = self.layer_weights + self.model.vocab_size * self.model.hidden_size
        return weights * DTYPE_BYTES[self.dtype] / (self.tp * self.compute.bytes_per_s)

    def prefill_s(self, tokens: int) -> float:
        flops_per_s = self.tp * self.compute.flops_per_s
        return max(self.prefill_flop(tokens) / flops_per_s, self.prefill_floor_s)

    def kv_production(self, tokens: int) -> float:
        """Bytes/s at which prefill makes KV: the link that just keeps up."""
        return self.transfer_bytes(tokens) / self.prefill_s(tokens)

    # ---- hand-over

    @property
    def kv(self) -> KvBytes:
        m = self.model
        return KvBytes(m.num_layers, m.num_kv_heads, m.head_dim, self.dtype, self.tp)

    def transfer_bytes(self, tokens: int) -> int:
        """Of all ranks."""
        return tokens * self.kv.per_token

    @property
    def link_bytes_per_s(self) -> float:
        """All ranks' links together."""
        return self.link.bytes_per_s * (self.tp if self.link.per_rank else 1)

    def transfer_s(self, tokens: int) -> float:
        """Of the whole prompt at once, after prefill: all of it is exposed."""
        return self.transfer_bytes(tokens) / self.link_bytes_per_s

    def exposed_s(self, tokens: int) -> float:
        """What is left to move when prefill ends, if each layer leaves as soon as it is computed.

        A link that is faster than prefill has one layer left; a slower one has fallen behind.
        """
        layers = self.model.num_layers
        layer, computed = self.transfer_s(tokens) / layers, self.prefill_s(tokens) / layers
        return layer if layer <= computed else layers * layer - (layers - 1) * computed

    # ---- crossover

    def crossover(self, exposed_share: float = 1.0) -> Crossover:
        """Between which prompt lengths `exposed_share` of the transfer exceeds prefill."""
        flops_per_s = self.tp * self.compute.flops_per_s
        per_token = exposed_share * self.kv.per_token / self.link_bytes_per_s
        c, d = self.linear_flop / flops_per_s, self.attention_flop / flops_per_s
        fixed = self.head_flop / flops_per_s
        # Above the floor: d T^2 + (c - per_token) T + fixed = 0 has the crossings as its roots.
        slope = per_token - c
        discriminant = slope * slope - 4 * d * fixed
        if slope <= 0 or discriminant < 0:
            return Crossover(None, None)
        low, high = ((slope + sign * sqrt(discriminant)) / (2 * d) for sign in (-1, 1))
        low = max(low, self.prefill_floor_s / per_token)
        return Crossover(low, high) if low < high else Crossover(None, None)

    def layerwise_crossover(self) -> Crossover:
        """Where the part that layer-wise hand-over exposes exceeds prefill.

        Exposed = transfer - (L - 1)/L prefill > prefill: the transfer takes (2 L - 1)/L prefills.
        """
        layers = self.model.num_layers
        return self.crossover(layers / (2 * layers - 1))


@dataclass(frozen=True)
class Crossover:
    """Tokens. Between them moving takes longer than prefill; shorter prompts have the floor of
    reading the weights, longer ones attention's square. Both None: never."""

    above: float | None
    below: float | None

    @property
    def exists(self) -> bool:
        return self.above is not None
