"""Copies of many pages in one launch, by a few thread blocks.

A driver copy costs the host some 8 µs, whatever its size, and shuffled blocks are a copy a page: at
64 KiB the host is what bounds a hand-over. Here the host uploads a list of pages instead. Few
thread blocks saturate a link, and leave the other multiprocessors to the engine's kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from pdrelay.transport.cuda.driver import Driver
from pdrelay.transport.cuda.tensors import on_stream, tensor_at
from pdrelay.transport.device import Event, PageMove, PagePool, alike

I32: TypeAlias = npt.NDArray[np.int32]

DEFAULT_CTAS = 16
# Of one thread block: four independent 16-byte loads a thread, so that 16 blocks have the 0.5 MB in
# flight that a link of 390 GB/s needs over a latency of about 1 µs.
CHUNK_BYTES = 32 << 10
NUM_WARPS = 16
# Made ahead, as pinning memory takes long: for all layers of 4,000 blocks, or 4,000 pages.
_MIN_IDS = 1 << 13
_NUM_LISTS = 32


def page_ids(source: PagePool, target: PagePool, moves: Sequence[PageMove], out: I32) -> None:
    """Fill `out`, int32 [2, number of pages]: which page of `source`, and which of `target`, where
    page `layer * num_blocks + block` is one layer of a block."""
    done = 0
    for pairs, layer_list in alike(moves):
        layers = np.array(layer_list, np.int32)[:, None]
        end = done + len(layer_list) * len(pairs)
        for row, blocks, pool in ((0, pairs.src, source), (1, pairs.dst, target)):
            ids = out[row, done:end].reshape(len(layer_list), len(pairs))
            np.add(layers * np.int32(pool.layout.num_blocks), blocks, out=ids)
        done = end
    assert done == out.shape[1]


def page_list(
    source: PagePool, target: PagePool, moves: Sequence[PageMove], room: Callable[[int], I32]
) -> tuple[int, int]:
    """Write what the kernel needs to know of the moves to `room(how many numbers)`: layers, then
    their source blocks, then their destination blocks. Returns how many layers and how many pairs
    of blocks. Where not all layers have the same blocks, pages are the blocks of one layer."""
    groups = alike(moves)
    if len(groups) == 1:
        ((pairs, layers),) = groups
        num_layers, num_pairs = len(layers), len(pairs)
        out = room(num_layers + 2 * num_pairs)
        out[:num_layers] = layers
        out[num_layers : num_layers + num_pairs] = pairs.src
        out[num_layers + num_pairs :] = pairs.dst
        return num_layers, num_pairs
    num_pages = sum(len(move.pairs) for move in moves)
    out = room(1 + 2 * num_pages)
    out[0] = 0
    page_ids(source, target, moves, out[1:].reshape(2, num_pages))
    return 1, num_pages


class _Ids:
    """Numbers that the host writes to `array` (int32, pinned) and one launch at a time reads at
    `device`. Raises TransportError where there is no memory for it."""

    def __init__(self, num_ids: int, driver: Driver | None) -> None:
        """Without a driver, the host's memory is the device's."""
        self._driver = driver
        self.busy: Event | None = None  # behind the launch that reads it
        if driver is None:
            self.array: I32 = np.empty(num_ids, np.int32)
            self.host = self.device = self.array.ctypes.data
            return
        self.host = driver.allocate_pinned(4 * num_ids)
        self.device = driver.allocate(4 * num_ids)
        memory = (ctypes.c_int32 * num_ids).from_address(self.host)
        self.array = np.ctypeslib.as_array(memory)

    def free(self) -> bool:
        return self.busy is None or self.busy.done()

    def upload(self, num_ids: int, stream: int) -> None:
        if self._driver is not None:
            self._driver.copy_bytes(self.device, self.host, 4 * num_ids, stream)

    def close(self) -> None:
        if self._driver is not None:
            self._driver.free(self.device)
            self._driver.free_pinned(self.host)
            self.array = np.empty(0, np.int32)


@dataclass(slots=True)
class PageLaunch:
    """Everything about one launch, so that nothing is left to do but to enqueue it. Whoever does
    sets `ids.busy` to an event behind it."""

    copier: PageCopier
    source: PagePool
    target: PagePool
    ids: _Ids
    num_layers: int
    num_pairs: int
    plan: ChunkPlan
    num_ctas: int

    def enqueue(self) -> None:
        self.copier.enqueue(self)


class PageCopier:
    """Launches on `stream`, a raw handle, of `cuda:ordinal`; without an ordinal, over memory of the
    host, which only Triton's interpreter can do. For one thread, whose current device is
    `cuda:ordinal`."""

    def __init__(self, ordinal: int | None, stream: int = 0, driver: Driver | None = None) -> None:
        assert (ordinal is None) == (driver is None)
        self._ordinal = ordinal
        self._driver = driver
        self._stream = stream
        self._compiled: dict[tuple[ChunkPlan, bool, bool], Any] = {}  # and what is aligned
        self._ids = [_Ids(_MIN_IDS, driver) for _ in range(_NUM_LISTS)]

    def prepare(
        self,
        source: PagePool,
        target: PagePool,
        moves: Sequence[PageMove],
        *,
        num_ctas: int = DEFAULT_CTAS,
    ) -> PageLaunch:
        """All but the enqueueing of a launch. One is prepared at a time."""
        page_bytes = source.layout.layer_block_bytes
        assert target.layout.layer_block_bytes == page_bytes
        ids: list[_Ids] = []

        def room(num_ids: int) -> I32:
            ids.append(self._free_ids(num_ids))
            return ids[0].array[:num_ids]

        num_layers, num_pairs = page_list(source, target, moves, room)
        plan = chunk_plan(page_bytes)
        return PageLaunch(self, source, target, ids[0], num_layers, num_pairs, plan, num_ctas)

    def enqueue(self, launch: PageLaunch) -> None:
        """Upload the list and launch."""
        launch.ids.upload(launch.num_layers + 2 * launch.num_pairs, self._stream)
        source, target = launch.source, launch.target
        # What Triton compiles a kernel anew for: see `_copy_pages`.
        key = (launch.plan, source.address % 16 == 0, target.address % 16 == 0)
        kernel = self._compiled.get(key)
        if kernel is None:
            self._compile_and_launch(key, launch)
            return
        plan, num_layers, num_pairs = launch.plan, launch.num_layers, launch.num_pairs
        num_chunks = num_layers * num_pairs * plan.chunks_a_page
        # Triton's way to launch what is compiled, with every argument in its place: 5 µs instead of
        # the 30 that it takes to look at each argument again.
        kernel[(min(launch.num_ctas, num_chunks), 1, 1)](
            source.address,
            target.address,
            launch.ids.device,
            num_layers,
            num_pairs,
            source.layout.num_blocks,
            target.layout.num_blocks,
            num_chunks,
            plan.words,
            plan.chunk,
            stream=self._stream,
        )

    def close(self) -> None:
        """Free the lists of pages. Nothing launched may still read them."""
        for ids in self._ids:
            ids.close()
        self._ids.clear()

    def _compile_and_launch(self, key: tuple[ChunkPlan, bool, bool], launch: PageLaunch) -> None:
        size, ids = launch.plan.word_bytes, launch.ids
        source, target = (
            tensor_at(
                pool.address, (pool.layout.total_bytes // size,), f"int{8 * size}", self._ordinal
            )
            for pool in (launch.source, launch.target)
        )
        numbers = tensor_at(ids.device, (len(ids.array),), "int32", self._ordinal)
        with on_stream(self._stream, self._ordinal):
            kernel = copy_pages(
                source,
                target,
                numbers,
                launch.num_layers,
                launch.num_pairs,
                launch.source.layout.num_blocks,
                launch.target.layout.num_blocks,
                launch.plan,
                num_ctas=launch.num_ctas,
            )
        if kernel is not None:  # the interpreter compiles nothing
            self._compiled[key] = kernel

    def _free_ids(self, num_ids: int) -> _Ids:
        """The one used longest ago; a further one if it is in use, as the stream is in order."""
        large = next((ids for ids in self._ids if len(ids.array) >= num_ids), None)
        if large is not None and large.free():
            self._ids.remove(large)
        else:
            large = _Ids(max(_MIN_IDS, 1 << (num_ids - 1).bit_length()), self._driver)
        self._ids.append(large)
        return large


def word_bytes(page_bytes: int) -> int:
    """The largest word that a page is made of: 8 bytes or 4."""
    size = gcd(page_bytes, 8)
    assert size >= 4, f"a page of {page_bytes} bytes is not made of words"
    return size


class ChunkPlan(NamedTuple):
    """How a page is cut into what one thread block copies at a time."""

    word_bytes: int
    words: int  # of a page
    chunk: int  # words, a power of two
    num_warps: int

    @property
    def chunks_a_page(self) -> int:
        return -(-self.words // self.chunk)


def chunk_plan(page_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> ChunkPlan:
    size = word_bytes(page_bytes)
    words = page_bytes // size
    chunk = min(chunk_bytes // size, 1 << (words - 1).bit_length())
    return ChunkPlan(size, words, chunk, max(1, min(NUM_WARPS, chunk * size // (16 * 32))))


def copy_pages(
    source: torch.Tensor,
    target: torch.Tensor,
    numbers: torch.Tensor,
    num_layers: int,
    num_pairs: int,
    source_blocks: int,
    target_blocks: int,
    plan: ChunkPlan,
    *,
    num_ctas: int = DEFAULT_CTAS,
) -> Any:
    """For each of `num_layers` layers and `num_pairs` pairs of blocks copy page
    `layer * source_blocks + block` of `source` to page `layer * target_blocks + block` of `target`,
    on the current stream. Returns the compiled kernel, or None in the interpreter.

    `source`, `target`: whole pools, flat, of words as `plan` has them (int64 or int32), which may
    be on different devices; `numbers`: int32, the layers, the source blocks, the target blocks.
    Copies of one launch are in no order.
    """
    size = plan.word_bytes
    assert source.element_size() == size and source.dtype == target.dtype
    assert source.is_contiguous() and target.is_contiguous()
    assert numbers.dtype == torch.int32 and numbers.numel() >= num_layers + 2 * num_pairs
    num_chunks = num_layers * num_pairs * plan.chunks_a_page
    assert 0 < num_chunks < 1 << 31
    return _copy_pages[(min(num_ctas, num_chunks),)](
        source,
        target,
        numbers,
        num_layers,
        num_pairs,
        source_blocks,
        target_blocks,
        num_chunks,
        WORDS=plan.words,
        CHUNK=plan.chunk,
        num_warps=plan.num_warps,
    )


@triton.jit(
    do_not_specialize=["num_layers", "num_pairs", "source_blocks", "target_blocks", "num_chunks"]
)
def _copy_pages(
    # Typed arguments on purpose: through a pointer that was itself loaded from memory, Triton would
    # store 2 bytes at a time. Only how the pointers are aligned and the constants are specialized.
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    num_layers: int,
    num_pairs: int,
    source_blocks: int,
    target_blocks: int,
    num_chunks: int,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    CHUNKS_A_PAGE: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    columns = tl.arange(0, CHUNK)
    for number in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        place = number // CHUNKS_A_PAGE
        at = (number % CHUNKS_A_PAGE) * CHUNK + columns
        layer = tl.load(numbers_ptr + place // num_pairs).to(tl.int64)
        pair_ptr = numbers_ptr + num_layers + place % num_pairs
        source = (layer * source_blocks + tl.load(pair_ptr)) * WORDS
        target = (layer * target_blocks + tl.load(pair_ptr + num_pairs)) * WORDS
        if WORDS % CHUNK == 0:
            words = tl.load(source_ptr + source + at)
            tl.store(target_ptr + target + at, words)
        else:
            words = tl.load(source_ptr + source + at, mask=at < WORDS)
            tl.store(target_ptr + target + at, words, mask=at < WORDS)
