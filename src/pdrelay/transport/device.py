"""The accelerator as transports see it: pages, copies on a side stream, events, peer memory.

`transport/cuda/` is the real one, `HostDevice` the fake: its streams complete when told to. Torch
is not needed to move bytes; only `transport/cuda/pages.py` makes tensors, for the engine.

Two streams matter. The engine launches layers on the *compute stream*; transports copy on a *side
stream* of their own, behind an event of the compute stream, so that neither waits for the host.
Nothing here blocks except `Event.wait`, which only threads of a transport call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import KVLayout, contiguous_runs

if TYPE_CHECKING:
    from pdrelay.transport.checksum import PreparedChecksum


Blocks: TypeAlias = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagePool:
    """Pages at an address that the device reaches: its own, or a peer's that it opened."""

    layout: KVLayout
    address: int


class BlockPairs:
    """Blocks of one pool and where they go in another, as several layers share them.

    `runs`: int64 [3, number of runs], what `contiguous_runs` finds: first source block, first
    destination block and number of blocks of each.
    """

    __slots__ = ("_breaks", "_runs", "dst", "num_runs", "src")

    def __init__(self, src_blocks: Blocks, dst_blocks: Blocks) -> None:
        """Arrays are kept, not copied, where they are int32."""
        assert len(src_blocks) > 0 and len(src_blocks) == len(dst_blocks)
        self.src: npt.NDArray[np.int32] = np.asarray(src_blocks, np.int32)
        self.dst: npt.NDArray[np.int32] = np.asarray(dst_blocks, np.int32)
        src, dst = self.src, self.dst
        self._breaks = ((src[1:] - src[:-1] != 1) | (dst[1:] - dst[:-1] != 1)).nonzero()[0]
        self._runs: npt.NDArray[np.int64] | None = None
        self.num_runs = len(self._breaks) + 1

    @property
    def runs(self) -> npt.NDArray[np.int64]:
        """Made when asked for: a kernel that copies pages needs only their number."""
        if self._runs is None:
            self._runs = _block_runs(self.src, self.dst, self._breaks)
        return self._runs

    def __len__(self) -> int:
        return len(self.src)


def _block_runs(
    src: npt.NDArray[np.int32], dst: npt.NDArray[np.int32], breaks: npt.NDArray[np.intp]
) -> npt.NDArray[np.int64]:
    """`breaks`: the pairs behind which a run ends, but for the last."""
    if not len(breaks):  # a fresh pool, mostly
        return np.array([[src[0]], [dst[0]], [len(src)]], np.int64)
    runs = np.empty((3, len(breaks) + 1), np.int64)
    starts = runs[2]
    starts[0] = 0
    np.add(breaks, 1, out=starts[1:])
    runs[0] = src[starts]
    runs[1] = dst[starts]
    starts[:-1] = starts[1:] - starts[:-1]  # from here on, lengths
    starts[-1] = len(src) - starts[-1]
    return runs


class PageMove(msgspec.Struct, frozen=True):
    """One layer of blocks. (A Struct: a hand-over makes one a layer, and a frozen dataclass takes
    five times as long.)"""

    layer: int
    pairs: BlockPairs


def alike(moves: Sequence[PageMove]) -> list[tuple[BlockPairs, list[int]]]:
    """Pairs and the layers that they move, of neighbours in `moves` that share them."""
    groups: list[tuple[BlockPairs, list[int]]] = []
    pairs: BlockPairs | None = None
    layers: list[int] = []
    for move in moves:
        if move.pairs is not pairs:
            pairs, layers = move.pairs, []
            groups.append((pairs, layers))
        layers.append(move.layer)
    return groups


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous copy between two addresses that the device reaches (its own, a peer's, pinned
    host memory)."""

    dst: int
    src: int
    num_bytes: int


class RunTable(Sequence[Run]):
    """Runs as numbers that a driver takes as they are: `table`, int64 [3, number of runs], holds
    destination addresses, source addresses and bytes."""

    __slots__ = ("table",)

    def __init__(self, table: npt.NDArray[np.int64]) -> None:
        assert table.flags.c_contiguous
        self.table = table

    @classmethod
    def of(cls, runs: Sequence[Run]) -> RunTable:
        if isinstance(runs, RunTable):
            return runs
        rows = [[run.dst, run.src, run.num_bytes] for run in runs]
        return cls(np.array(rows, np.int64).reshape(len(rows), 3).T.copy())

    def __len__(self) -> int:
        return int(self.table.shape[1])

    def __iter__(self) -> Iterator[Run]:
        for dst, src, num_bytes in self.table.T.tolist():
            yield Run(dst, src, num_bytes)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class Event(Protocol):
    """A place in a stream."""

    def done(self) -> bool:
        """Whether all before it is complete. Raises TransportError when the device failed."""

    def wait(self) -> None:
        """Block this thread until `done`. Raises as `done` does."""


class Copy(Event, Protocol):
    """Behind a batch of runs."""

    def busy_ns(self) -> int:
        """Device time inside the runs; once done."""


class PinnedMemory(Protocol):
    """Host memory that the device copies to and from."""

    address: int
    array: npt.NDArray[np.uint8]

    def close(self) -> None: ...


class DeviceStream(Protocol):
    """A queue of device work of its own, driven by one thread."""

    handle: Any  # what libraries take as a stream

    def wait(self, event: Event) -> None:
        """What comes next waits for `event`, on the device."""

    def record(self) -> Event:
        """Behind everything put on the stream so far."""

    def copy(self, runs: Sequence[Run]) -> Copy:
        """Copies of one batch are in no order. Raises TransportError."""

    def close(self) -> None: ...


class Device(Protocol):
    """One accelerator of this process. The engine's thread calls everything but `Event.wait`."""

    name: str  # "cuda:0"
    uuid: str  # the same in every process that sees this accelerator

    def written(self, layer: int) -> None:
        """The engine has just launched the writes of `layer`'s K and V."""

    def writes_of(self, *layers: int) -> Event:
        """Behind the latest `written` of each of `layers`; behind all that was launched, if one of
        them has none."""

    def launched(self) -> Event:
        """Behind everything the engine launched so far."""

    def copy(self, runs: Sequence[Run], after: Event | None) -> Copy:
        """Copy on the side stream, behind its earlier copies and `after`. Copies of one batch are
        in no order. Raises TransportError."""

    def copy_pages(
        self,
        source: PagePool,
        target: PagePool,
        moves: Sequence[PageMove],
        after: Event | None,
    ) -> Copy:
        """Copy pages of compatible layouts, however many layers, as `copy` does: on the side
        stream, as one batch. Raises TransportError."""

    def prepare_page_copies(self, pool: PagePool) -> None:
        """So that no later `copy_pages` to or from pages like these has to compile. May store
        block 0 of the pool into itself."""

    def open_peer(self, handle: bytes, num_bytes: int) -> int:
        """Map another process's pages; returns their address. Raises TransportError."""

    def close_peer(self, address: int) -> None:
        """Unmap. No launched work may still touch it."""

    def stream(self) -> DeviceStream:
        """A further stream, behind nothing."""

    def allocate(self, num_bytes: int) -> int:
        """Address of device memory. Raises TransportError."""

    def free(self, address: int) -> None: ...

    def make_current(self) -> None:
        """This thread's library calls are for this device."""

    def pinned(self, num_bytes: int) -> PinnedMemory:
        """Raises TransportError."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Make host memory that exists reachable by `copy`. Raises TransportError."""

    def unpin(self, address: int) -> None: ...

    def peer_tensor(self, layout: KVLayout, address: int) -> Any:
        """Opened memory as what the engine's kernels take, shaped `layout.shape`."""

    def close(self) -> None: ...


class DevicePages(Protocol):
    """One rank's KV pool on an accelerator: one allocation, of which `ipc_handle` names all."""

    layout: KVLayout
    address: int

    @property
    def device(self) -> Device: ...

    def ipc_handle(self) -> bytes:
        """Raises TransportError where the driver does not share memory between processes."""

    def checksum(self, blocks: Sequence[int], in_order: bool, *, full: bool) -> PreparedChecksum:
        """What `prepare_checksum` returns in mode `sample` or `full`."""

    def close(self) -> None: ...


def page_runs(
    src_layout: KVLayout,
    src: int,
    dst_layout: KVLayout,
    dst: int,
    layer: int,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
) -> list[Run]:
    """One layer of blocks between the pools at `src` and `dst`, in as few runs as there are."""
    size = src_layout.layer_block_bytes
    return [
        Run(dst + dst_layout.offset(layer, b), src + src_layout.offset(layer, a), n * size)
        for a, b, n in contiguous_runs(src_blocks, dst_blocks)
    ]


def move_runs(source: PagePool, target: PagePool, moves: Sequence[PageMove]) -> RunTable:
    """The moves in as few runs as there are."""
    groups = alike(moves)
    table = np.empty((3, sum(pairs.num_runs * len(layers) for pairs, layers in groups)), np.int64)
    size = source.layout.layer_block_bytes
    done = 0
    for pairs, layers in groups:
        end = done + pairs.num_runs * len(layers)
        part = table[:, done:end].reshape(3, len(layers), pairs.num_runs)
        src, dst, num_blocks = pairs.runs * size
        number = np.array(layers, np.int64)[:, None]
        np.add(number * target.layout.offset(1, 0) + target.address, dst, out=part[0])
        np.add(number * source.layout.offset(1, 0) + source.address, src, out=part[1])
        part[2] = num_blocks
        done = end
    return RunTable(table)


def latest(order: dict[int, Any], wanted: Sequence[int]) -> int | None:
    """Of the layers `wanted`, the one that comes last in `order`; None unless all are there."""
    if not all(map(order.__contains__, wanted)):
        return None
    return next((layer for layer in reversed(list(order)) if layer in wanted), None)


class Done:
    """The event of what never started."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def busy_ns(self) -> int:
        return 0


class AllOf:
    """Behind several events."""

    def __init__(self, *events: Event) -> None:
        self._events = events

    def done(self) -> bool:
        return all(event.done() for event in self._events)

    def wait(self) -> None:
        for event in self._events:
            event.wait()
