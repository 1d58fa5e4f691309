"""Checksums in mode `sample` by one launch that reads and writes pinned memory: no copies.

Both sides of a hand-over make one before its end, so what counts is the host's time: the same by
torch (upload, gather, download, and folding on the host) took it 1.0 ms on an H200's host
(docs/LOG.md, 2026-12-01).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.checksum import GOLDEN, MIX, SHIFT_1, SHIFT_2
from pdrelay.transport.cuda.device import CudaDevice
from pdrelay.transport.cuda.tensors import on_stream, tensor_at
from pdrelay.transport.device import Event, PinnedMemory
from pdrelay.transport.host_device import HostMemory

WORD_BYTES = 8
ENDS = 4  # words of a page: the first and the last of K and of V
CHUNK = 1024  # words that a program reads at once
MOST_PROGRAMS = 32
_HEAD_BYTES = 8 * MOST_PROGRAMS
_LEAST_BLOCKS = 1 << 9
_NUM_SLOTS = 64
_SPIN_NS = 1_000_000  # a thread that sleeps is woken half a millisecond late


def takes(layout: KVLayout) -> bool:
    """Whether K and V of a page are made of whole words of this kernel's."""
    return gcd(layout.layer_block_bytes // 2, WORD_BYTES) == WORD_BYTES


class _Slot:
    """Memory that host and device see: sums of programs, then ids of blocks."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.address: int = memory.ctypes.data
        self.sums: npt.NDArray[np.uint64] = memory[:_HEAD_BYTES].view(np.uint64)
        self.ids: npt.NDArray[np.int32] = memory[_HEAD_BYTES:].view(np.int32)
        self.busy: Event | None = None  # behind the launch that uses it

    def free(self) -> bool:
        return self.busy is None or self.busy.done()


class PageSampler:
    """Of the pool at `address`, on `device`; without one, of host memory, which only Triton's
    interpreter can read. For one thread, whose current device it is."""

    def __init__(self, address: int, layout: KVLayout, device: CudaDevice | None) -> None:
        assert takes(layout)
        self._device = device
        self._layout = layout
        ordinal = None if device is None else device.ordinal
        num_words = layout.total_bytes // WORD_BYTES
        self._pool = tensor_at(address, (num_words,), "int64", ordinal)
        self._address = address
        self._kernel: Any = None  # compiled
        self._pinned = None if device is None else device.pinned
        self._memories: list[PinnedMemory] = []
        self._slots: list[_Slot] = []  # nobody's
        self._make(_NUM_SLOTS, _LEAST_BLOCKS)  # ahead, as pinning memory takes long

    def prepare(self, blocks: Sequence[int], stream: int) -> PreparedSample:
        """`stream`: the raw handle of where to launch."""
        slot = self._take(len(blocks))
        slot.ids[: len(blocks)] = blocks
        return PreparedSample(self, slot, len(blocks), stream)

    def _take(self, num_blocks: int) -> _Slot:
        """A further one where none is free: what one stream uses is free in order."""
        for index, slot in enumerate(self._slots):
            if len(slot.ids) >= num_blocks and slot.free():
                return self._slots.pop(index)
        self._make(_NUM_SLOTS, max(_LEAST_BLOCKS, 1 << (num_blocks - 1).bit_length()))
        return self._slots.pop()

    def _make(self, count: int, num_blocks: int) -> None:
        size = _HEAD_BYTES + 4 * num_blocks
        memory = (self._pinned or HostMemory)(count * size)
        self._memories.append(memory)
        self._slots += [_Slot(part) for part in memory.array.reshape(count, size)]

    def give_back(self, slot: _Slot) -> None:
        if self._memories:
            self._slots.append(slot)

    def launch(self, slot: _Slot, num_blocks: int, stream: int) -> int:
        """Returns how many of the slot's sums the kernel will write."""
        layout = self._layout
        count = layout.num_layers * ENDS * num_blocks
        programs = min(MOST_PROGRAMS, -(-count // CHUNK))
        width = layout.layer_block_bytes // WORD_BYTES
        sums, ids = slot.address, slot.address + _HEAD_BYTES
        if self._kernel is not None:
            # Triton's way to launch what is compiled: `page_copy.py`.
            self._kernel[(programs, 1, 1)](
                self._address,
                ids,
                sums,
                num_blocks,
                layout.num_blocks,
                width,
                count,
                CHUNK,
                stream=stream,
            )
            return programs
        ordinal = None if self._device is None else self._device.ordinal
        with on_stream(stream, ordinal):
            self._kernel = _sample_pages[(programs,)](
                self._pool,
                tensor_at(ids, (len(slot.ids),), "int32", ordinal),
                tensor_at(sums, (MOST_PROGRAMS,), "int64", ordinal),
                num_blocks,
                layout.num_blocks,
                width,
                count,
                CHUNK=CHUNK,
                num_warps=4,
            )
        if self._device is not None:
            self._device.make_current()  # Triton's first launch leaves torch's own device current
        return programs

    def behind(self, stream: int) -> Event | None:
        return None if self._device is None else self._device.behind(stream)

    def close(self) -> None:
        """Nothing launched may still use the slots."""
        self._slots.clear()
        for memory in self._memories:
            memory.close()
        self._memories.clear()


class PreparedSample:
    """The blocks are where the kernel reads them. Also what comes of `begin`."""

    def __init__(self, sampler: PageSampler, slot: _Slot, num_blocks: int, stream: int) -> None:
        self._sampler = sampler
        self._slot = slot
        self._num_blocks = num_blocks
        self._stream = stream
        self._num_sums = 0

    def begin(self) -> PreparedSample:
        self._num_sums = self._sampler.launch(self._slot, self._num_blocks, self._stream)
        self._slot.busy = self._sampler.behind(self._stream)
        return self

    def done(self) -> bool:
        return self._slot.free()

    def result(self) -> int:
        assert self._num_sums, "not begun"
        busy = self._slot.busy
        if busy is not None:
            until_ns = monotonic_ns() + _SPIN_NS
            while not busy.done() and monotonic_ns() < until_ns:
                pass
            busy.wait()
        return int(np.add.reduce(self._slot.sums[: self._num_sums]))

    def __del__(self) -> None:
        self._sampler.give_back(self._slot)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


_GOLDEN: tl.constexpr = tl.constexpr(_signed(int(GOLDEN)))
_MIX: tl.constexpr = tl.constexpr(_signed(int(MIX)))
_SHIFT_1: tl.constexpr = tl.constexpr(int(SHIFT_1))
_SHIFT_2: tl.constexpr = tl.constexpr(int(SHIFT_2))
# Of what a shift to the right leaves of an unsigned number.
_LEFT_1: tl.constexpr = tl.constexpr((1 << (64 - int(SHIFT_1))) - 1)
_LEFT_2: tl.constexpr = tl.constexpr((1 << (64 - int(SHIFT_2))) - 1)


@triton.jit(do_not_specialize=["num_ids", "num_blocks", "width", "count"])
def _sample_pages(
    pool_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_ids: int,
    num_blocks: int,
    width: int,
    count: int,
    CHUNK: tl.constexpr,
) -> None:
    """Each program's part of `checksum._fold` over `checksum._sampled`; place i is layer
    i // (4 * num_ids), end (i // num_ids) % 4, block i % num_ids."""
    total = tl.zeros((CHUNK,), tl.int64)
    half = width // 2
    for first in range(tl.program_id(0) * CHUNK, count, tl.num_programs(0) * CHUNK):
        place = first + tl.arange(0, CHUNK)
        inside = place < count
        layer = (place // (4 * num_ids)).to(tl.int64)
        end = (place // num_ids) % 4
        block = tl.load(ids_ptr + place % num_ids, mask=inside, other=0)
        # 0, half - 1, half, width - 1
        word = tl.where(end >= 2, half, 0) + tl.where(end % 2 == 1, half - 1, 0)
        x = tl.load(pool_ptr + (layer * num_blocks + block) * width + word, mask=inside, other=0)
        x = x ^ ((place + 1).to(tl.int64) * _GOLDEN)
        x = x * _GOLDEN
        x = x ^ ((x >> _SHIFT_1) & _LEFT_1)
        x = x * _MIX
        x = x ^ ((x >> _SHIFT_2) & _LEFT_2)
        total += tl.where(inside, x, 0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))
