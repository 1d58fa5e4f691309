"""Model stand-ins that live on their KV pages: the fakes of the runner seam.

It writes a value for every (layer, token) into the pool and chooses the next token from what it
reads back for the whole context, so a page that is missing, stale or swapped changes the output.
No torch; microseconds a token. `FakeRunner` is synchronous; `AsyncFakeRunner` computes on a thread
of its own, later than the loop plans, as a device does.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import TokenLogprobs
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.engine.step import DoneStep, LayerHook, RemoteSlots, StepTokens
from pdrelay.engine.step_news import StepNews
from pdrelay.transport.host_device import HostPages
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


class _Pages:
    """The fake model on the pages of a `fake_layout`."""

    def __init__(self, pages: SharedPages | HostPages) -> None:
        layout = pages.layout
        self.layout = layout
        self._kv = pages.array.view(np.uint64).reshape(
            layout.num_layers, layout.num_blocks, 2, layout.block_size
        )

    def write(self, row: _Row, layer: int) -> None:
        size = self.layout.block_size
        for position, token_id in enumerate(row.token_ids, row.start):
            value = _value(layer, position, token_id)
            self._kv[layer, row.block_table[position // size], :, position % size] = value

    def next_token(self, row: _Row) -> int:
        size = self.layout.block_size
        total = 0
        for layer in range(self.layout.num_layers):
            for position in range(row.start + len(row.token_ids)):
                page = self._kv[layer, row.block_table[position // size]]
                key, value = int(page[0, position % size]), int(page[1, position % size])
                total += (key if key == value else 1) * (position + 1 + layer)
        return total % VOCAB_SIZE


@dataclass
class _Row:
    """A chunk as its step saw it at launch."""

    request_id: str
    start: int
    token_ids: list[int]  # [-1]: being sampled by the step before
    block_table: list[int]
    samples: bool

    @classmethod
    def of(cls, chunk: Chunk) -> _Row:
        request, stop = chunk.request, chunk.start + chunk.length
        token_ids = [-1] if chunk.token_pending else request.token_ids[chunk.start : stop].tolist()
        return cls(
            request.request_id, chunk.start, token_ids, list(request.block_table), chunk.samples
        )


def _tokens(token_ids: list[int]) -> StepTokens:
    logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
    return StepTokens(token_ids, logprobs, {})


class _IdleWork:
    """`idle_pieces` of it are left; `before_piece` runs before each and may wait."""

    def __init__(self) -> None:
        self.idle_pieces = 0
        self.pieces_per_pool = 0  # due with each peer's pool
        self.before_piece: Callable[[], None] | None = None  # tests interfere here

    @property
    def has_idle_work(self) -> bool:
        return self.idle_pieces > 0

    def do_idle_work(self) -> None:
        if self.before_piece is not None:
            self.before_piece()
        self.idle_pieces -= 1

    def pool_opened(self, pool: Any) -> None:
        self.idle_pieces += self.pieces_per_pool

    def pool_closed(self, pool: Any) -> None:
        pass


class FakeRunner(_IdleWork):
    """Computes a plan when it is launched."""

    depth = 1

    def __init__(self, pages: SharedPages) -> None:
        super().__init__()
        self._pages = _Pages(pages)
        self.before_layer: Callable[[int], None] | None = None  # tests interfere here

    def launch(
        self, plan: StepPlan, after_layer: LayerHook | None, remote: RemoteSlots | None
    ) -> DoneStep:
        assert remote is None
        assert not any(chunk.token_pending for chunk in plan.chunks)
        rows = [_Row.of(chunk) for chunk in plan.chunks]
        for layer in range(self._pages.layout.num_layers):
            if self.before_layer is not None:
                self.before_layer(layer)
            for row in rows:
                self._pages.write(row, layer)
            if after_layer is not None:
                after_layer(layer)
        return DoneStep(_tokens([self._pages.next_token(row) for row in rows if row.samples]))

    def fileno(self) -> int | None:
        return None

    def drain_news(self) -> None:
        pass


class AsyncFakeRunner(_IdleWork):
    """Computes launched steps in order on a thread. `before_step(number)` runs on it and may wait.

    A layer hook is called when the step is read: its pages are written then. On pages of a host
    device, what is put on its compute stream behind a step happens behind that step.
    """

    depth = 2

    def __init__(self, pages: SharedPages | HostPages) -> None:
        super().__init__()
        self._pages = _Pages(pages)
        self._device = pages.device if isinstance(pages, HostPages) else None
        self._news = StepNews()
        self._queue: queue.SimpleQueue[_FakeStep | None] = queue.SimpleQueue()
        self._sampled: dict[str, int] = {}  # by the last step: what a pending token becomes
        self.num_launched = 0
        self.before_step: Callable[[int], None] | None = None  # tests interfere here
        self._thread = threading.Thread(target=self._compute, name="fake-device", daemon=True)
        self._thread.start()

    def launch(
        self, plan: StepPlan, after_layer: LayerHook | None, remote: RemoteSlots | None
    ) -> _FakeStep:
        assert remote is None
        rows = [_Row.of(chunk) for chunk in plan.chunks]
        step = _FakeStep(self.num_launched, rows, after_layer, self._pages.layout.num_layers)
        self.num_launched += 1
        self._queue.put(step)
        if self._device is not None:
            self._device.launch_until(step.computed.is_set)
        return step

    def fileno(self) -> int | None:
        return self._news.fileno()

    def drain_news(self) -> None:
        self._news.drain()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._news.close()

    def _compute(self) -> None:
        while (step := self._queue.get()) is not None:
            if self.before_step is not None:
                self.before_step(step.number)
            for row in step.rows:
                if row.token_ids == [-1]:
                    row.token_ids = [self._sampled[row.request_id]]
            for layer in range(self._pages.layout.num_layers):
                for row in step.rows:
                    self._pages.write(row, layer)
            sampling = [row for row in step.rows if row.samples]
            token_ids = [self._pages.next_token(row) for row in sampling]
            self._sampled = {
                row.request_id: token for row, token in zip(sampling, token_ids, strict=True)
            }
            step.token_ids = token_ids
            step.computed.set()
            if self._device is not None:
                self._device.run()
            self._news.ring()


class _FakeStep:
    """A step on the fake device."""

    def __init__(
        self, number: int, rows: list[_Row], after_layer: LayerHook | None, num_layers: int
    ) -> None:
        self.number = number
        self.rows = rows
        self.token_ids: list[int] = []
        self.computed = threading.Event()
        self._after_layer = after_layer
        self._num_layers = num_layers

    def done(self) -> bool:
        return self.computed.is_set()

    def result(self) -> StepTokens:
        self.computed.wait()
        if self._after_layer is not None:
            for layer in range(self._num_layers):
                self._after_layer(layer)
        return _tokens(self.token_ids)
