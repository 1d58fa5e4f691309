"""The transport seam: KV from a producer's pages to a consumer's pages.

A transport knows pages, not schedules. The engine drives it from one thread per rank:

    producer rank                              consumer rank
    ------------                               -------------
    link = transport.connect(hello, fds)       hello, fds = transport.descriptor()
    link.begin(transfer_id, keys)              transport.expect(transfer_id, blocks, keys)
    link.send(transfer_id, layer, src, dst)
      ... once per layer and chunk ...
    link.flush(transfer_id)
    link.finish(transfer_id)
    link.poll() -> [Sent]                      transport.commit(transfer_id, num_pages)
                                               transport.poll() -> [Arrived]

Rules every transport keeps (tests/transport/conformance):
- `send` may return before the bytes are read; source pages stay untouched until `Sent`.
- `commit` follows `Sent` and tells the consumer how many (layer, block) pages were sent: all that
  it expects, or the transfer fails. `Arrived` follows when exactly those are in its pages, bit for
  bit what the producer's pages held. It comes over the engine's control link, so it may overtake
  data.
- `abort` is idempotent on both sides, and after the producer's `abort` returned True, it stores
  nothing more into the consumer's pages; after False, once `Stopped` was polled (stores of a device
  are asynchronous). The consumer's late data for an aborted transfer is discarded:
  after the consumer's `abort` returned, no thread of its own writes the blocks.
- Each transfer ends in one `Sent` and one `Arrived`, or in `TransferFailed`; after `abort` no news
  of it is made but `Stopped` (what was made before may still be polled). Unknown ids are ignored
  by `commit` and `abort`, refused with TransportError by `send` and `finish`.
- Nothing blocks longer than a copy: a stalled peer shows as `TransferFailed` after the deadline
  (of the producer: no progress; of the consumer: from `commit` on, as prefill may take its time).
- The fds of `descriptor()` stay the transport's; `connect` owns those it is given, in every case.
- No pickle; descriptors are msgpack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.device import Device


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do."""

    name: str
    needs_slots: bool  # `send` needs the consumer's block ids
    prefix_store: bool  # keeps pages by key for any instance to load
    remote_stores: bool = False  # a producer's device stores into the consumer's pages


@dataclass(frozen=True)
class TransferReport:
    """What one side saw of one transfer. Times are CLOCK_MONOTONIC ns."""

    transfer_id: str
    transport: str
    num_bytes: int
    num_pieces: int  # contiguous copies or messages
    start_ns: int  # first piece begun (0 when nothing was sent)
    end_ns: int  # last piece done
    busy_ns: int  # inside copies or socket calls


@dataclass(frozen=True)
class Sent:
    """Producer side: the source pages may be reused."""

    report: TransferReport


@dataclass(frozen=True)
class Arrived:
    """Consumer side: all committed pages are in place."""

    report: TransferReport


@dataclass(frozen=True)
class TransferFailed:
    transfer_id: str
    message: str


@dataclass(frozen=True)
class Stopped:
    """Producer side, after an `abort` that returned False: nothing is stored any more."""

    transfer_id: str


@dataclass(frozen=True)
class RemotePool:
    """A consumer's pages that this rank's kernels can store into."""

    layout: KVLayout
    tensor: Any  # torch, shaped `layout.shape` (a fake device has its own kind)


@dataclass(frozen=True)
class Descriptor:
    """What a producer needs to reach a consumer: msgpack bytes and open file descriptors."""

    data: bytes
    fds: tuple[int, ...] = field(default=())


class ProducerLink(Protocol):
    """A producer's end towards one consumer incarnation."""

    remote_pool: RemotePool | None  # None where kernels cannot reach the consumer's pages

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        """Open a transfer. `keys[i]` names block i of the request (content hash, or unique)."""

    def send(
        self,
        transfer_id: str,
        layer: int,
        first_block: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> None:
        """Move one layer of request blocks `first_block ..`, whole blocks, from local pages.

        `dst_blocks` is empty where the transport does not need slots. Raises TransportError when
        the link is broken.
        """

    def flush(self, transfer_id: str) -> None:
        """No further `send` follows at once: what was sent may start. Without it a link may keep
        pieces together until `finish`. Unknown ids are ignored."""

    def stored(self, transfer_id: str, num_pages: int, num_pieces: int, start_ns: int) -> None:
        """Through `remote_pool`, a step that is complete stored (layer, block) pages of the
        transfer, beginning at `start_ns`. They count as if sent."""

    def finish(self, transfer_id: str) -> None:
        """No further `send` follows."""

    def poll(self) -> Sequence[Sent | Stopped | TransferFailed]: ...

    def abort(self, transfer_id: str) -> bool:
        """Returns whether all stores are over; if not, `Stopped` follows."""

    def close(self) -> None: ...

    def quiet(self) -> bool:
        """After `close`: whether nothing is stored any more."""


class HostLink:
    """What links have in common whose pages only the host stores."""

    remote_pool: RemotePool | None = None

    def flush(self, transfer_id: str) -> None:
        """Sends start by themselves."""

    def stored(self, transfer_id: str, num_pages: int, num_pieces: int, start_ns: int) -> None:
        raise TransportError("kernels cannot store through this link")

    def quiet(self) -> bool:
        return True


class PrefixStore(Protocol):
    """Pages kept by key outside every pool (transport `pool`)."""

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading keys the store holds now."""

    def load(self, keys: Sequence[bytes], dst_blocks: Sequence[int]) -> int:
        """Copy the pages of leading keys into local pages; returns how many were still there."""


class Transport(Protocol):
    """One rank's transport: its consumer side, and the factory of its producer links."""

    capabilities: Capabilities
    prefix_store: PrefixStore | None
    device: Device | None  # whose pages it moves; None for pages of the host

    def descriptor(self) -> Descriptor: ...

    def connect(self, layout: KVLayout, descriptor: Descriptor) -> ProducerLink:
        """Reach a consumer. Raises TransportError when layouts do not fit or it is gone."""

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        """Request blocks `first_block ..` will arrive in local `blocks`.

        `keys` names all blocks of the request, as in `begin`.
        """

    def commit(self, transfer_id: str, num_pages: int) -> None: ...

    def poll(self) -> list[Arrived | TransferFailed]: ...

    def abort(self, transfer_id: str) -> None: ...

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when `poll` of either side has news, if any."""

    def close(self) -> None: ...
