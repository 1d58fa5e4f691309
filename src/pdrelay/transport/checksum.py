"""A checksum over KV pages that both sides of a hand-over compute for themselves.

It finds pages that are missing, stale, swapped or damaged. It is not cryptographic: peers of one
server trust each other. Each word is XORed with a number for its place, mixed by two rounds of
multiply and xor-shift, and added. The multipliers are SplitMix64's (Steele, Lea, Flood: "Fast
splittable pseudorandom number generators", OOPSLA 2014); its third round would cost more than the
reads do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import contiguous_runs
from pdrelay.transport.device import DevicePages
from pdrelay.transport.pages import SharedPages

Mode = Literal["off", "sample", "full"]
U64 = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xBF58476D1CE4E5B9)
SHIFT_1, SHIFT_2 = np.uint64(32), np.uint64(29)


class PendingChecksum(Protocol):
    """A checksum that a device may still be reading pages for."""

    def done(self) -> bool: ...

    def result(self) -> int:
        """Waits for it."""


class PreparedChecksum(Protocol):
    """What can be done before the pages are there is done."""

    def begin(self) -> PendingChecksum:
        """Called once."""


class PendingWords(Protocol):
    """Words of pages, on their way to the host."""

    def done(self) -> bool: ...

    def wait(self) -> U64:
        """All of them, flat. For the thread that asked for them."""


# (blocks, in_order) -> what `prepare_checksum` returns
Checksum = Callable[[Sequence[int], bool], PreparedChecksum]


@dataclass(frozen=True)
class KnownChecksum:
    value: int

    def begin(self) -> KnownChecksum:
        return self

    def done(self) -> bool:
        return True

    def result(self) -> int:
        return self.value


@dataclass(frozen=True)
class _OfHostPages:
    pages: SharedPages
    blocks: Sequence[int]
    read: Callable[[SharedPages, Sequence[int]], U64]

    def begin(self) -> KnownChecksum:
        return KnownChecksum(_fold(self.read(self.pages, self.blocks)))


@dataclass(frozen=True)
class OfWords:
    """By the words that mode `sample` or `full` reads, folded on the host. `read` launches that."""

    read: Callable[[], PendingWords]

    def begin(self) -> _OfPendingWords:
        return _OfPendingWords(self.read())


@dataclass(frozen=True)
class _OfPendingWords:
    words: PendingWords

    def done(self) -> bool:
        return self.words.done()

    def result(self) -> int:
        return _fold(self.words.wait())


def checksum(pages: SharedPages | DevicePages, blocks: Sequence[int], mode: Mode) -> int:
    """A 64-bit number that depends on the bytes of every layer of `blocks`, in this order.

    Block ids do not enter, only positions: producer and consumer get the same number for the same
    pages. `off` is 0; `sample` reads the first and the last word of K and of V of each
    (layer, block); `full` reads every byte. 0 where `blocks` is empty.
    """
    return prepare_checksum(pages, blocks, False, mode=mode).begin().result()


def prepare_checksum(
    pages: SharedPages | DevicePages, blocks: Sequence[int], in_order: bool, *, mode: Mode
) -> PreparedChecksum:
    """`checksum`, without waiting for a device; for the engine's thread.

    `in_order`: of the pages as the steps leave them that are launched before `begin`; those
    launched later may write them. Otherwise nothing may write them before it is done, and no step
    delays it.
    """
    if mode == "off" or not blocks:
        return KnownChecksum(0)
    if isinstance(pages, SharedPages):
        return _OfHostPages(pages, blocks, sampled if mode == "sample" else summed)
    return pages.checksum(blocks, in_order, full=mode == "full")


def sampled(pages: SharedPages, blocks: Sequence[int]) -> U64:
    """The words that mode `sample` reads: `[num_layers, 4, len(blocks)]`, flat."""
    return _sampled(_words(pages), blocks)


def summed(pages: SharedPages, blocks: Sequence[int]) -> U64:
    """A value a (layer, block), which depends on every word of it: `[num_layers, blocks]`, flat."""
    return _summed(_words(pages), blocks)


def _words(pages: SharedPages) -> npt.NDArray[np.unsignedinteger]:
    """Pages as `[num_layers, num_blocks, words]` of the largest words that K and V split into."""
    size = gcd(pages.layout.layer_block_bytes // 2, 8)
    words: npt.NDArray[np.unsignedinteger] = pages.array.view(np.dtype(f"u{size}"))
    return words


def _sampled(words: npt.NDArray[np.unsignedinteger], blocks: Sequence[int]) -> U64:
    num_layers, num_blocks, width = words.shape
    ends = np.array([0, width // 2 - 1, width // 2, width - 1])
    offsets = np.arange(num_layers)[:, None] * (num_blocks * width) + ends
    index = offsets.reshape(-1, 1) + np.array(blocks, dtype=np.int64) * width
    sampled: U64 = words.reshape(-1)[index].astype(np.uint64, copy=False).ravel()
    return sampled


def _summed(words: npt.NDArray[np.unsignedinteger], blocks: Sequence[int]) -> U64:
    """One value a (layer, block): the words' sum, each weighted by its place in the page."""
    num_layers, _, width = words.shape
    weights = _weights(width)
    values = np.empty((num_layers, len(blocks)), np.uint64)
    for layer in range(num_layers):
        done = 0
        for start, _, n in contiguous_runs(blocks, blocks):
            run = words[layer, start : start + n].astype(np.uint64, copy=False)
            np.matmul(run, weights, out=values[layer, done : done + n])
            done += n
    return values.ravel()


def page_weights(width: int) -> U64:
    """The factors of a page's `width` words in mode `full`."""
    return _weights(width)


@lru_cache(maxsize=8)
def _weights(width: int) -> U64:
    """Odd weights, so that no bit of a word is lost."""
    return _mix(np.arange(1, width + 1, dtype=np.uint64)) | np.uint64(1)


@lru_cache(maxsize=8)
def _places(count: int) -> U64:
    """A number for each place. `count` is rounded up by the caller, so that few sizes occur."""
    return np.arange(1, count + 1, dtype=np.uint64) * GOLDEN


def _mix(x: U64) -> U64:
    x = x * GOLDEN
    x ^= x >> SHIFT_1
    x *= MIX
    x ^= x >> SHIFT_2
    return x


def _fold(values: U64) -> int:
    """Mix each value with its place and add up, wrapping."""
    places = _places(1 << (len(values) - 1).bit_length())[: len(values)]
    return int(np.add.reduce(_mix(values ^ places)))
