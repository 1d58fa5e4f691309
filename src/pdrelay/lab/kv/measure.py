"""Measures every combination of transport, mode, placement, page size and length, interleaved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.lab.host_load import foreign_cores, sample
from pdrelay.lab.kv.config import GPU, KvConfig
from pdrelay.lab.kv.model import Compute, Link, Roofline
from pdrelay.lab.kv.pair import POOL_REQUESTS, Pair
from pdrelay.lab.kv.rundir import SampleRecord
from pdrelay.lab.kv.wire import Mode, Transfer, Up
from pdrelay.model.config import ModelConfig, kv_layout

ROUNDS = 2  # visits of each page size, in opposite orders
SLACK_BLOCKS = 16  # so that a contiguous run does not always begin at block 0
# Stand-in computation is cut off here. A core's prefill of a long prompt takes seconds, and overlap
# needs it longer than the transfer, not that long; a GPU's is as long as prefill.
_MAX_COMPUTE_S = {"cpu": 0.03, "cuda": 0.3}
_CORE_BYTES_PER_S = 1e10


@dataclass(frozen=True)
class Cell:
    """One combination."""

    transport: str
    mode: Mode
    placement: str
    tokens: int


def cells_of(config: KvConfig, *, with_copy: bool = True) -> list[Cell]:
    """What each repeat measures, before shuffling."""
    cells = []
    for tokens in config.lengths:
        cells.append(Cell("", "compute", "contiguous", tokens))
        if with_copy:
            cells.append(Cell("", "copy", "contiguous", tokens))
        for transport in config.transports:
            for placement in config.placements:
                cells.append(Cell(transport, "bulk", placement, tokens))
                cells.append(Cell(transport, "layerwise", placement, tokens))
    return cells


def rounds_of(config: KvConfig) -> list[tuple[int, range]]:
    """(page size, its repeats) in order: forth, then back."""
    half = -(-config.repeats // ROUNDS)
    halves = [range(half), range(half, config.repeats)]
    forth = [(size, halves[0]) for size in config.block_sizes]
    back = [(size, halves[1]) for size in reversed(config.block_sizes)]
    return [(size, repeats) for size, repeats in forth + back if len(repeats)]


def num_samples(config: KvConfig) -> int:
    """Samples of a run, for progress."""
    return len(cells_of(config)) * config.repeats * len(config.block_sizes)


class Measurement:
    """One run. `tell(done, words)` after each repeat; `note` where something is left out."""

    def __init__(
        self,
        config: KvConfig,
        shape: ModelConfig,
        tell: Callable[[int, str], None],
        note: Callable[[str], None],
    ) -> None:
        self._config = config
        self._shape = shape
        self._tell = tell
        self._note = note
        self.up: Up | None = None
        self.foreign_cores: list[float | None] = []  # kept busy by others, a round

    def run(self) -> Iterator[list[SampleRecord]]:
        """Samples, a list a repeat. A pair that fails is noted and its round left out."""
        done = 0
        for block_size, repeats in rounds_of(self._config):
            done_then = done + len(repeats) * len(cells_of(self._config))
            try:
                for samples in self._round(block_size, repeats):
                    done += len(samples)
                    self._tell(done, f"pages of {block_size} tokens")
                    yield samples
            except TransportError as error:
                self._note(f"pages of {block_size} tokens: {error}")
            done = done_then

    def _round(self, block_size: int, repeats: range) -> Iterator[list[SampleRecord]]:
        config = self._config
        layout = layout_of(config, self._shape, block_size)
        with Pair(
            layout,
            config.transports,
            config.devices,
            timeout_s=config.timeout_s,
            log=config.out / "endpoints.log",
        ) as pair:
            self.up = self.up or pair.up
            if not pair.up.has_copy:
                self._note(
                    "no plain copy between the two pools: transfers have no peak beside them"
                )
            self._warm_up(pair, layout)
            before = sample(pair.pids)
            for rep in repeats:
                rng = random.Random(f"{config.seed}/{block_size}/{rep}")
                cells = cells_of(config, with_copy=pair.up.has_copy)
                rng.shuffle(cells)
                yield [self._sample(pair, cell, layout, rep, rng) for cell in cells]
            self.foreign_cores.append(foreign_cores(before, sample(pair.pids)))

    def _warm_up(self, pair: Pair, layout: KVLayout) -> None:
        """Connections, threads and page tables of both ends; the longest prompt once each way."""
        rng = random.Random(0)
        for cell in cells_of(self._config, with_copy=pair.up.has_copy):
            if cell.tokens == max(self._config.lengths):
                self._sample(pair, cell, layout, -1, rng)

    def _sample(
        self, pair: Pair, cell: Cell, layout: KVLayout, rep: int, rng: random.Random
    ) -> SampleRecord:
        count = -(-cell.tokens // layout.block_size)
        num_blocks = layout.num_blocks
        transfer = Transfer(
            transfer_id=f"{cell.transport}-{cell.mode}-{rng.getrandbits(64):016x}",
            transport=cell.transport,
            mode=cell.mode,
            src_blocks=place(cell.placement, count, num_blocks, rng),
            dst_blocks=place(cell.placement, count, num_blocks, rng),
            units=0 if cell.mode in ("bulk", "copy") else self._units(cell.tokens, pair.up),
        )
        figures = msgspec.structs.asdict(pair.run(transfer))
        del figures["transfer_id"]
        return SampleRecord(
            transport=cell.transport,
            mode=cell.mode,
            placement=cell.placement,
            block_size=layout.block_size,
            tokens=cell.tokens,
            rep=rep,
            **figures,
        )

    def _units(self, tokens: int, up: Up) -> int:
        """Units of computation a layer: as long as the roofline's prefill, or the limit."""
        if not up.unit_ns:
            return 0
        config = self._config
        memory = _CORE_BYTES_PER_S if config.device == "cpu" else GPU.bytes_per_s
        compute = Compute("this device", up.flops_per_s, memory, "measured")
        model = Roofline(self._shape, config.dtype, 1, compute, Link("", 1.0, False, ""))
        seconds = min(model.prefill_s(tokens) / config.tp, _MAX_COMPUTE_S[config.device])
        return max(1, round(seconds * 1e9 / self._shape.num_layers / up.unit_ns))


def layout_of(config: KvConfig, shape: ModelConfig, block_size: int) -> KVLayout:
    """One rank's pool: the longest prompt, and slack."""
    num_blocks = -(-max(config.lengths) // block_size) + SLACK_BLOCKS
    return kv_layout(shape, block_size, num_blocks, config.dtype, config.tp)


def pool_bytes(config: KvConfig, shape: ModelConfig) -> int:
    """Memory that the processes and the shared pool take at once, at the most."""
    largest = max(layout_of(config, shape, size).total_bytes for size in config.block_sizes)
    return largest * (2 + (POOL_REQUESTS if "pool" in config.transports else 0))


def place(placement: str, count: int, num_blocks: int, rng: random.Random) -> list[int]:
    """`count` block ids: one run, or in random order."""
    if placement == "scattered":
        return rng.sample(range(num_blocks), count)
    start = rng.randrange(num_blocks - count + 1)
    return list(range(start, start + count))
