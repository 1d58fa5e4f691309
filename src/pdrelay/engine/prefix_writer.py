"""Co-located instances share prefixes through a store outside their pools (transport `pool`)."""

from __future__ import annotations

import select
import time

from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.request import Request
from pdrelay.errors import TransportError
from pdrelay.transport.base import Transport

_TIMEOUT_S = 5.0


class PrefixWriter:
    """Puts the full prompt blocks of a request into the store once they are computed."""

    def __init__(self, transport: Transport, layout: KVLayout) -> None:
        """The transport is producer and consumer at once. Blocks are reused right after
        `prefill_done`: the pool copies pages of the host within `send`, those of a device are
        waited for."""
        assert transport.prefix_store is not None
        self._transport = transport
        self._link = transport.connect(layout, transport.descriptor())
        self._num_layers = layout.num_layers

    def prefill_done(self, request: Request) -> None:
        """Best effort: a full store keeps what it has."""
        num_blocks = min(request.num_published_blocks, len(request.block_keys))
        if num_blocks == 0:
            return
        transfer_id = f"prefix-{request.request_id}"
        self._link.begin(transfer_id, request.block_keys[:num_blocks])
        try:
            for layer in range(self._num_layers):
                self._link.send(transfer_id, layer, 0, request.block_table[:num_blocks], ())
            self._link.finish(transfer_id)
        except TransportError:
            self._link.abort(transfer_id)
        if self._transport.device is not None:
            self._await(transfer_id)
        self._link.poll()
        self._transport.abort(transfer_id)  # nobody takes it: what is published stays

    def _await(self, transfer_id: str) -> None:
        """Until the device's pages were read, or a deadline passed."""
        news = self._transport.fileno()
        assert news is not None
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._link.poll():
            if time.monotonic() > deadline:
                self._link.abort(transfer_id)
                return
            select.select([news], [], [], _TIMEOUT_S)

    def close(self) -> None:
        self._link.close()
