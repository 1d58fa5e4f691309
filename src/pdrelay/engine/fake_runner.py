"""A model stand-in that lives on its KV pages: the fake of the runner seam.

It writes a value for every (layer, token) into the pool and chooses the next token from what it
reads back for the whole context, so a page that is missing, stale or swapped changes the output.
No torch; microseconds a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import TokenLogprobs
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.engine.step import StepTokens
from pdrelay.transport.pages import SharedPages

VOCAB_SIZE = 900


def fake_layout(num_layers: int = 3, num_blocks: int = 64, block_size: int = 4) -> KVLayout:
    """A layout whose K (and V) of one token is one uint64."""
    return KVLayout(
        num_layers=num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=1,
        head_dim=2,
        dtype="float32",
    )


def _value(layer: int, position: int, token_id: int) -> int:
    return (token_id + 1) * 1_000_003 + layer * 7919 + position * 104_729


def expected_tokens(prompt: Sequence[int], num_tokens: int, num_layers: int = 3) -> list[int]:
    """What the fake model answers, computed without pages."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        total = sum(
            _value(layer, position, token) * (position + 1 + layer)
            for layer in range(num_layers)
            for position, token in enumerate(tokens)
        )
        tokens.append(total % VOCAB_SIZE)
    return tokens[len(prompt) :]


class FakeRunner:
    """Computes a plan on real pages of a `fake_layout`."""

    def __init__(self, pages: SharedPages) -> None:
        layout = pages.layout
        self._layout = layout
        self._kv = pages.array.view(np.uint64).reshape(
            layout.num_layers, layout.num_blocks, 2, layout.block_size
        )
        self.before_layer: Callable[[int], None] | None = None  # tests interfere here

    def execute(self, plan: StepPlan, after_layer: Callable[[int], None] | None) -> StepTokens:
        for layer in range(self._layout.num_layers):
            if self.before_layer is not None:
                self.before_layer(layer)
            for chunk in plan.chunks:
                self._write(chunk, layer)
            if after_layer is not None:
                after_layer(layer)
        token_ids = [self._next_token(chunk) for chunk in plan.chunks if chunk.samples]
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        return StepTokens(token_ids, logprobs, {})

    def _write(self, chunk: Chunk, layer: int) -> None:
        size = self._layout.block_size
        table = chunk.request.block_table
        for position in range(chunk.start, chunk.start + chunk.length):
            value = _value(layer, position, chunk.request.token_ids[position])
            self._kv[layer, table[position // size], :, position % size] = value

    def _next_token(self, chunk: Chunk) -> int:
        size = self._layout.block_size
        table = chunk.request.block_table
        total = 0
        for layer in range(self._layout.num_layers):
            for position in range(chunk.start + chunk.length):
                page = self._kv[layer, table[position // size]]
                key, value = int(page[0, position % size]), int(page[1, position % size])
                total += (key if key == value else 1) * (position + 1 + layer)
        return total % VOCAB_SIZE
