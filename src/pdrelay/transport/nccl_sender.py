"""The producer's side of transport `nccl`: one thread a link that sends straight from pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.core.kv_layout import contiguous_runs
from pdrelay.errors import TransportError
from pdrelay.transport.device import DevicePages, DeviceStream
from pdrelay.transport.nccl_end import Ended, NcclEnd
from pdrelay.transport.nccl_library import NcclLibrary
from pdrelay.transport.nccl_wire import STAGING_BYTES, Announce, NcclMessage
from pdrelay.transport.news import Bell
from pdrelay.transport.queued_link import LinkClosed, QueuedLink, QueuedPiece


@dataclass(frozen=True)
class _Part:
    """Request blocks `first ..` of a piece: `runs` of (local block, blocks)."""

    first: int
    runs: list[tuple[int, int]]


class NcclLink(QueuedLink):
    def __init__(
        self,
        pages: DevicePages,
        peer_name: str,
        channel: Channel[NcclMessage],
        library: NcclLibrary,
        bell: Bell,
        *,
        transport: str,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        super().__init__(
            pages, peer_name, bell, transport=transport, timeout_s=timeout_s, clock=clock
        )
        self._device_pages = pages
        self._end = NcclEnd(library, channel, timeout_s, clock)
        self.start()

    def close(self) -> None:
        if not self._closing:
            self._end.end()
        super().close()

    # ---- the thread

    def _serve(self) -> None:
        device = self._device_pages.device
        device.make_current()
        stream = device.stream()
        try:
            self._end.greet()
            while True:
                self._send_piece(self._next_piece(self._end.channel.fileno()), stream)
        except Ended:
            if not self._closing:
                raise TransportError("the consumer closed the connection") from None
            raise LinkClosed from None
        finally:
            if self._end.close():
                stream.close()

    def _send_piece(self, piece: QueuedPiece, stream: DeviceStream) -> None:
        """In parts that fit the consumer's staging memory."""
        pages, start = self._device_pages, self._clock()
        size, num_sends = pages.layout.layer_block_bytes, 0
        if piece.after is not None:
            stream.wait(piece.after)
        for part in self._parts(piece):
            runs = [length for _, length in part.runs]
            transfer_id = piece.outgoing.transfer_id
            self._end.say(Announce(transfer_id, piece.layer, part.first, runs))
            addresses = [
                (pages.address + pages.layout.offset(piece.layer, block), length * size)
                for block, length in part.runs
            ]
            self._end.send(addresses, stream.handle)
            self._end.wait(stream.record())
            num_sends += len(runs)
        self._done(piece, start, 0, num_sends)

    def _parts(self, piece: QueuedPiece) -> Iterator[_Part]:
        limit = max(1, STAGING_BYTES // self._pages.layout.layer_block_bytes)
        for start in range(0, len(piece.src_blocks), limit):
            blocks = piece.src_blocks[start : start + limit]
            runs = [(block, length) for block, _, length in contiguous_runs(blocks, blocks)]
            yield _Part(piece.first_block + start, runs)
