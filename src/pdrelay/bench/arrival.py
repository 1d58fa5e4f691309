"""When bytes arrived, as the socket is read: not when the task that waits for them has its turn.

The tokens of one decode step arrive on many connections at once. Were each stamped where it is
parsed, the last would carry the parsing of all before it, and the order of tasks would show as ITL.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from pdrelay.core.clock import monotonic_ns


class _StampingHandler(ResponseHandler):
    """One connection. aiohttp wakes its reader in the loop's next turn, before anything newer on
    this connection is read: `arrived_ns` is the time of what the reader gets."""

    arrived_ns = 0

    def data_received(self, data: bytes) -> None:
        if data:  # aiohttp itself passes none
            self.arrived_ns = monotonic_ns()
        super().data_received(data)


class StampingConnector(aiohttp.TCPConnector):
    """Needs a running event loop.

    aiohttp has no setting for it, so this relies on `_factory`, seen in 3.10 to 3.14. Should it go,
    `ArrivalClock` tells the time of the reading task's turn, which is later.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        factory: Any = functools.partial(_StampingHandler, loop=asyncio.get_running_loop())
        self._factory = factory


class ArrivalClock:
    """Of one response."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        connection = response.connection  # None: the whole answer is here
        protocol = connection.protocol if connection is not None else None
        self._handler = protocol if isinstance(protocol, _StampingHandler) else None

    def now_ns(self) -> int:
        """When the bytes that were read last had arrived, CLOCK_MONOTONIC."""
        return monotonic_ns() if self._handler is None else self._handler.arrived_ns
