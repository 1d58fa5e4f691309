"""Copies of many pages in one launch, by a few thread blocks.

A driver copy costs the host some 8 µs, whatever its size, and shuffled blocks are a copy a page: at
64 KiB the host is what bounds a hand-over. Here the host uploads a list of pages instead. Few
thread blocks saturate a link, and leave the other multiprocessors to the engine's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from pdrelay.transport.cuda.tensors import tensor_at
from pdrelay.transport.device import Event, PageMove, PagePool

DEFAULT_CTAS = 16
# Of one thread block: four independent 16-byte loads a thread, so that 16 blocks have the 0.5 MB in
# flight that a link of 390 GB/s needs over a latency of about 1 µs.
CHUNK_BYTES = 32 << 10
NUM_WARPS = 16
_MIN_IDS = 1 << 16  # 0.25 MB: 32,768 pages, more than a prompt of 8,192 tokens has
_NUM_LISTS = 4  # made ahead: pinning memory takes long


def page_ids(
    source: PagePool, target: PagePool, moves: Sequence[PageMove], out: npt.NDArray[np.int32]
) -> None:
    """Fill `out`, int32 [2, number of pages]: which page of `source`, and which of `target`, where
    page `layer * num_blocks + block` is one layer of a block."""
    done = 0
    for _, group in groupby(moves, lambda move: id(move.pairs)):
        alike = list(group)
        pairs = alike[0].pairs
        layers = np.array([move.layer for move in alike], np.int32)[:, None]
        end = done + len(alike) * len(pairs)
        for row, blocks, pool in ((0, pairs.src, source), (1, pairs.dst, target)):
            ids = out[row, done:end].reshape(len(alike), len(pairs))
            np.add(layers * np.int32(pool.layout.num_blocks), blocks, out=ids)
        done = end
    assert done == out.shape[1]


class _Ids:
    """A list of pages: written here by the host, read by one launch at a time."""

    def __init__(self, num_ids: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # an engine's thread makes it, others may write to it
            self.host = torch.empty(num_ids, dtype=torch.int32, pin_memory=device.type == "cuda")
            self.device = (
                self.host if device.type == "cpu" else torch.empty_like(self.host, device=device)
            )
        self.array: npt.NDArray[np.int32] = self.host.numpy()
        self.busy: Event | None = None  # behind the launch that reads it

    def free(self) -> bool:
        return self.busy is None or self.busy.done()


class PageCopier:
    """Launches on `stream`, a raw handle, of `cuda:ordinal`; without an ordinal, over memory of the
    host, which only Triton's interpreter can do. For one thread."""

    def __init__(self, ordinal: int | None, stream: int = 0) -> None:
        self._ordinal = ordinal
        self._device = torch.device("cpu" if ordinal is None else f"cuda:{ordinal}")
        self._stream: Any = None
        if ordinal is not None:
            external = torch.cuda.ExternalStream
            self._stream = external(stream, device=self._device)  # type: ignore[no-untyped-call]
        self._tensors: dict[int, torch.Tensor] = {}  # by address
        # Made on our stream: of torch's memory, what others freed may still be in use by theirs.
        with self._on_stream():
            self._ids = [_Ids(_MIN_IDS, self._device) for _ in range(_NUM_LISTS)]

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def launch(
        self,
        source: PagePool,
        target: PagePool,
        moves: Sequence[PageMove],
        *,
        num_ctas: int = DEFAULT_CTAS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> _Ids:
        """Enqueue. The caller sets `busy` of what this returns to an event behind the launch."""
        num_pages = sum(len(move.pairs) for move in moves)
        with self._on_stream():
            ids = self._free_ids(2 * num_pages)
            used = slice(2 * num_pages)
            page_ids(source, target, moves, ids.array[used].reshape(2, num_pages))
            if ids.device is not ids.host:
                ids.device[used].copy_(ids.host[used], non_blocking=True)
            self._enqueue(source, target, ids, num_pages, num_ctas, chunk_bytes)
        return ids

    def close(self) -> None:
        """Free the lists of pages while their stream is alive: torch's pinned memory records an
        event on the streams that it was used on when it is freed, and one that is destroyed by then
        ends the process."""
        self._ids.clear()
        self._tensors.clear()

    def forget(self, address: int) -> None:
        """The pool at `address` is gone."""
        self._tensors.pop(address, None)

    def _enqueue(
        self,
        source: PagePool,
        target: PagePool,
        ids: _Ids,
        num_pages: int,
        num_ctas: int,
        chunk_bytes: int,
    ) -> None:
        page_bytes = source.layout.layer_block_bytes
        assert target.layout.layer_block_bytes == page_bytes
        copy_pages(
            self._tensor(source),
            self._tensor(target),
            ids.device,
            num_pages,
            page_bytes,
            num_ctas=num_ctas,
            chunk_bytes=chunk_bytes,
        )

    def _free_ids(self, num_ids: int) -> _Ids:
        for ids in self._ids:
            if len(ids.array) >= num_ids and ids.free():
                return ids
        self._ids = [ids for ids in self._ids if not ids.free()]  # the free ones are too small
        ids = _Ids(max(_MIN_IDS, 1 << (num_ids - 1).bit_length()), self._device)
        self._ids.append(ids)
        return ids

    def _tensor(self, pool: PagePool) -> torch.Tensor:
        """The pool as flat words, of the kind that `word_bytes` names."""
        tensor = self._tensors.get(pool.address)
        size = word_bytes(pool.layout.layer_block_bytes)
        count = pool.layout.total_bytes // size
        if tensor is None or tensor.numel() != count or tensor.element_size() != size:
            tensor = tensor_at(pool.address, (count,), f"int{8 * size}", self._ordinal)
            self._tensors[pool.address] = tensor
        return tensor


def word_bytes(page_bytes: int) -> int:
    """The largest word that a page is made of: 8 bytes or 4."""
    size = gcd(page_bytes, 8)
    assert size >= 4, f"a page of {page_bytes} bytes is not made of words"
    return size


def copy_pages(
    source: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    num_pages: int,
    page_bytes: int,
    *,
    num_ctas: int = DEFAULT_CTAS,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Copy page `ids[i]` of `source` to page `ids[num_pages + i]` of `target`, on the current
    stream.

    `source`, `target`: whole pools, flat, int64 or int32 (`word_bytes`), which may be on different
    devices; `ids`: int32, at least [2 * num_pages]. Copies of one launch are in no order.
    """
    size = source.element_size()
    assert source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
    assert ids.dtype == torch.int32 and ids.numel() >= 2 * num_pages and page_bytes % size == 0
    words = page_bytes // size
    chunk = min(chunk_bytes // size, triton.next_power_of_2(words))
    num_chunks = num_pages * triton.cdiv(words, chunk)
    if num_chunks == 0:
        return
    warps = max(1, min(NUM_WARPS, chunk * size // (16 * 32)))
    _copy_pages[(min(num_ctas, num_chunks),)](
        source, target, ids, num_pages, num_chunks, WORDS=words, CHUNK=chunk, num_warps=warps
    )


@triton.jit(do_not_specialize=["num_pages", "num_chunks"])
def _copy_pages(
    # Typed arguments on purpose: through a pointer that was itself loaded from memory, Triton would
    # store 2 bytes at a time.
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pages: int,
    num_chunks: int,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    CHUNKS_A_PAGE: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    columns = tl.arange(0, CHUNK)
    for number in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        place = number // CHUNKS_A_PAGE
        at = (number % CHUNKS_A_PAGE) * CHUNK + columns
        source = tl.load(ids_ptr + place).to(tl.int64) * WORDS
        target = tl.load(ids_ptr + num_pages + place).to(tl.int64) * WORDS
        if WORDS % CHUNK == 0:
            words = tl.load(source_ptr + source + at)
            tl.store(target_ptr + target + at, words)
        else:
            words = tl.load(source_ptr + source + at, mask=at < WORDS)
            tl.store(target_ptr + target + at, words, mask=at < WORDS)
