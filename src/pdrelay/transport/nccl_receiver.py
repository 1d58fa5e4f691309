"""The consumer's side of transport `nccl`: a thread a producer, which receives what is announced.

NCCL writes into staging memory of the device, and a copy under the transfer's lock brings it to the
pages: a receive that was posted cannot be called back, and pages of an aborted transfer are
somebody else's at once.
"""

from __future__ import annotations

import socket
import threading

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.core.kv_layout import contiguous_runs
from pdrelay.errors import PdrelayError, ProtocolError
from pdrelay.transport.device import DevicePages, DeviceStream, Run
from pdrelay.transport.incoming import IncomingTransfers
from pdrelay.transport.nccl_end import Ended, NcclEnd
from pdrelay.transport.nccl_library import NcclLibrary
from pdrelay.transport.nccl_wire import STAGING_BYTES, Announce, NcclMessage


class NcclReceiver:
    """One producer's connection."""

    def __init__(
        self,
        pages: DevicePages,
        sock: socket.socket,
        offered: socket.socket,
        library: NcclLibrary,
        transfers: IncomingTransfers,
        *,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        """`offered`: the end that the descriptor names; closed once the producer has its own."""
        self._pages = pages
        self._offered: socket.socket | None = offered
        self._transfers = transfers
        self._clock = clock
        channel: Channel[NcclMessage] = Channel(sock, NcclMessage)
        self._end = NcclEnd(library, channel, timeout_s, clock)
        self._staging = 0
        self._thread = threading.Thread(target=self._run, name="kv-nccl-take", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def offered_fd(self) -> int:
        assert self._offered is not None
        return self._offered.fileno()

    def close(self) -> None:
        self._end.end()
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        device = self._pages.device
        device.make_current()
        stream = device.stream()
        problem = "the connection to the producer was lost"
        try:
            self._join()
            self._staging = device.allocate(self._staging_bytes())
            while True:
                self._end.idle()
                message = self._end.hear(timeout=False)
                if not isinstance(message, Announce):
                    raise ProtocolError("not an announcement")
                self._take(message, stream)
        except Ended:
            pass
        except (OSError, PdrelayError) as error:
            problem = f"the link to the producer broke: {error}"
        self._transfers.fail_source(self, problem)
        self._let_go()
        if self._end.close():  # else the device may still write the staging memory
            if self._staging:
                device.free(self._staging)
            stream.close()

    def _staging_bytes(self) -> int:
        return max(STAGING_BYTES, self._pages.layout.layer_block_bytes)

    def _let_go(self) -> None:
        if self._offered is not None:
            self._offered.close()
            self._offered = None

    def _join(self) -> None:
        unique_id = self._end.hear_join()
        self._let_go()
        self._end.answer(unique_id)

    def _take(self, message: Announce, stream: DeviceStream) -> None:
        """Receive one announced piece, and place it if it is still wanted."""
        layout = self._pages.layout
        size, count = layout.layer_block_bytes, sum(message.runs)
        if message.layer >= layout.num_layers or count * size > self._staging_bytes():
            raise ProtocolError(f"layer {message.layer} of {count} blocks cannot be received")
        claimed = self._transfers.claim(
            message.transfer_id.encode(), self, message.layer, message.first_block, count
        )
        start = self._clock()
        pieces, offset = [], self._staging
        for length in message.runs:
            pieces.append((offset, length * size))
            offset += length * size
        self._end.receive(pieces, stream.handle)
        self._end.wait(stream.record())
        if claimed is None:
            return
        incoming, blocks = claimed
        base = self._pages.address + layout.offset(message.layer, 0)
        runs = [
            Run(base + block * size, self._staging + index * size, length * size)
            for index, block, length in contiguous_runs(range(count), blocks)
        ]
        with incoming.lock:
            if incoming.closed:
                return
            stream.copy(runs).wait()  # short: staging to pages of one device
            incoming.meter.add(start, self._clock(), count * size, 0)
        self._transfers.received(incoming, count, len(message.runs))
