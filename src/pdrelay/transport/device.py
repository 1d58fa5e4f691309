"""The accelerator as transports see it: pages, copies on a side stream, events, peer memory.

`transport/cuda/` is the real one, `HostDevice` the fake: its streams complete when told to. Torch
is not needed to move bytes; only `transport/cuda/pages.py` makes tensors, for the engine.

Two streams matter. The engine launches layers on the *compute stream*; transports copy on a *side
stream* of their own, behind an event of the compute stream, so that neither waits for the host.
Nothing here blocks except `Event.wait`, which only threads of a transport call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pdrelay.core.kv_layout import KVLayout, contiguous_runs

if TYPE_CHECKING:
    from pdrelay.transport.checksum import U64


@dataclass(frozen=True, slots=True)
class PagePool:
    """Pages at an address that the device reaches: its own, or a peer's that it opened."""

    layout: KVLayout
    address: int


class BlockPairs:
    """Blocks of one pool and where they go in another, as several layers share them."""

    __slots__ = ("dst", "runs", "src")

    def __init__(self, src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> None:
        assert src_blocks and len(src_blocks) == len(dst_blocks)
        self.src: npt.NDArray[np.int32] = np.array(src_blocks, np.int32)
        self.dst: npt.NDArray[np.int32] = np.array(dst_blocks, np.int32)
        self.runs = list(contiguous_runs(src_blocks, dst_blocks))

    def __len__(self) -> int:
        return len(self.src)


@dataclass(frozen=True, slots=True)
class PageMove:
    """One layer of blocks."""

    layer: int
    pairs: BlockPairs


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous copy between two addresses that the device reaches (its own, a peer's, pinned
    host memory)."""

    dst: int
    src: int
    num_bytes: int


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
    device: Device
    address: int

    def ipc_handle(self) -> bytes:
        """Raises TransportError where the driver does not share memory between processes."""

    def sampled(self, blocks: Sequence[int]) -> U64:
        """What `checksum` folds in mode `sample`."""

    def summed(self, blocks: Sequence[int]) -> U64:
        """What `checksum` folds in mode `full`."""

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


def move_runs(source: PagePool, target: PagePool, moves: Sequence[PageMove]) -> list[Run]:
    """The moves in as few runs as there are."""
    size = source.layout.layer_block_bytes
    runs = []
    for move in moves:
        src = source.address + source.layout.offset(move.layer, 0)
        dst = target.address + target.layout.offset(move.layer, 0)
        runs += [Run(dst + b * size, src + a * size, n * size) for a, b, n in move.pairs.runs]
    return runs


def latest(order: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Of the layers `wanted`, the one that comes last in `order`; None unless all are there."""
    places = {layer: place for place, layer in enumerate(order)}
    if not all(layer in places for layer in wanted):
        return None
    return max(wanted, key=places.__getitem__)


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
