"""The consumer's side of NCCL: a thread a producer, which receives what is put and places it.

NCCL writes into staging memory, and a copy brings it to the pages unless the offer was closed
meanwhile: a receive that was posted cannot be called back, and blocks of a producer that is given
up are somebody else's at once.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence

from pdrelay.errors import PdrelayError, ProtocolError
from pdrelay.integrations.vllm.nccl_wire import NcclMessage, Placed, Put
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.integrations.vllm.staging import Staging, staging_bytes
from pdrelay.transport.device import Device
from pdrelay.transport.nccl_end import Ended, NcclEnd

_log = logging.getLogger(__name__)


class NcclTaker:
    """An offer: see `pages.Offer`."""

    def __init__(
        self,
        handle: bytes,
        offered: socket.socket,
        end: NcclEnd[NcclMessage],
        layout: PageLayout,
        addresses: Sequence[int],
        make_device: Callable[[], Device],
    ) -> None:
        """`offered` goes to the producer; `addresses`: one a region of the consumer's `layout`."""
        self.handles = [handle]
        self.fds = (offered.fileno(),)
        self._offered = offered
        self._end = end
        self._layout = layout
        self._addresses = addresses
        self._make_device = make_device
        self._num_placed = 0
        self._lock = threading.Lock()  # of `_closed`, and held while pages are stored into
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pdrelay-nccl-take", daemon=True)
        self._thread.start()

    def passed_on(self) -> None:
        self._offered.close()

    def close(self) -> None:
        with self._lock:  # waits for one short copy at most
            self._closed = True
        self._offered.close()
        self._end.end()

    # ---- the thread

    def _run(self) -> None:
        try:
            self._serve()
        except Ended:
            return
        except (OSError, PdrelayError) as error:
            # The writer finds its link closed, and the producer says so.
            _log.warning("the NCCL link to a producer broke: %s", error)

    def _serve(self) -> None:
        staging = None
        try:
            unique_id = self._end.hear_join()
            staging = Staging(self._layout, self._addresses, self._make_device)
            self._end.answer(unique_id)
            while True:
                self._end.idle()
                for message in self._end.heard():
                    if not isinstance(message, Put):
                        raise ProtocolError("the producer does not follow the protocol")
                    self._take(message, staging)
        finally:
            if self._end.close() and staging is not None:  # else the device may still write it
                staging.close()

    def _take(self, put: Put, staging: Staging) -> None:
        num_bytes = self._checked_bytes(put, staging)
        self._end.receive([(staging.address, num_bytes)], staging.stream.handle)
        self._end.wait(staging.stream.record())
        with self._lock:
            if self._closed:
                raise Ended
            staging.scatter(put.parts).wait()
        self._num_placed += 1
        self._end.say(Placed(self._num_placed))

    def _checked_bytes(self, put: Put, staging: Staging) -> int:
        """Raises ProtocolError for pages that do not exist."""
        num_layers, num_blocks = len(self._layout.layers), self._layout.num_blocks
        for part in put.parts:
            if part.layer >= num_layers or any(block >= num_blocks for block in part.blocks):
                raise ProtocolError("a page that does not exist")
        num_bytes = staging.num_bytes(put.parts)
        if not 0 < num_bytes <= staging_bytes(self._layout):
            raise ProtocolError(f"{num_bytes} bytes in one piece")
        return num_bytes
