"""The fake of the NCCL seam: two ranks of one process over HostDevices.

A send completes when the matching receive is there, as NCCL's do, and both hang where there is no
peer, until they are aborted.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pdrelay.errors import TransportError
from pdrelay.transport.host_device import HostStream
from pdrelay.transport.nccl_library import UNIQUE_ID_BYTES, Pieces


@dataclass(eq=False)
class _Operation:
    pieces: Pieces
    complete: bool = False


@dataclass
class _World:
    """The communicators of one unique id."""

    ranks: dict[int, _Communicator] = field(default_factory=dict)
    sends: deque[_Operation] = field(default_factory=deque)
    receives: deque[_Operation] = field(default_factory=deque)
    streams: list[HostStream] = field(default_factory=list)


@dataclass(eq=False)
class _Communicator:
    world: _World
    rank: int
    aborted: bool = False


class FakeNccl:
    """`dead_after`: operations of the sender are lost from this one on, as if it had died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worlds: dict[bytes, _World] = {}
        self.dead_after: int | None = None
        self.num_sends = 0
        self.num_aborts = 0

    def unique_id(self) -> bytes:
        return secrets.token_bytes(UNIQUE_ID_BYTES)

    def join(self, unique_id: bytes, rank: int) -> _Communicator:
        with self._lock:
            world = self._worlds.setdefault(unique_id, _World())
            communicator = _Communicator(world, rank)
            world.ranks[rank] = communicator
            return communicator

    def ready(self, communicator: Any) -> bool:
        if communicator.aborted:
            raise TransportError("the communicator was aborted")
        return len(communicator.world.ranks) == 2

    def send(self, communicator: Any, pieces: Pieces, stream: Any) -> None:
        with self._lock:
            self.num_sends += 1
            lost = self.dead_after is not None and self.num_sends > self.dead_after
        queue: deque[_Operation] = deque() if lost else communicator.world.sends
        self._post(communicator, queue, pieces, stream)

    def receive(self, communicator: Any, pieces: Pieces, stream: Any) -> None:
        self._post(communicator, communicator.world.receives, pieces, stream)

    def _post(
        self,
        communicator: _Communicator,
        queue: deque[_Operation],
        pieces: Pieces,
        stream: HostStream,
    ) -> None:
        """The operation takes part once the stream has come to it."""
        operation = _Operation(pieces)
        posted = False

        def progress() -> bool:
            nonlocal posted
            with self._lock:
                if not posted:
                    posted = True
                    queue.append(operation)
                self._match(communicator.world)
                return operation.complete or communicator.aborted

        with self._lock:
            if stream not in communicator.world.streams:
                communicator.world.streams.append(stream)
        stream.put(progress)
        self._run(communicator.world)

    def _run(self, world: _World) -> None:
        """Let streams go on whose operation is complete."""
        with self._lock:
            streams = list(world.streams)
        for stream in streams:
            stream.run()

    def _match(self, world: _World) -> None:
        while world.sends and world.receives:
            send, receive = world.sends.popleft(), world.receives.popleft()
            assert [n for _, n in send.pieces] == [n for _, n in receive.pieces], "out of step"
            for (src, num_bytes), (dst, _) in zip(send.pieces, receive.pieces, strict=True):
                ctypes.memmove(dst, src, num_bytes)
            send.complete = receive.complete = True

    def abort(self, communicator: Any) -> None:
        with self._lock:
            self.num_aborts += 1
            communicator.aborted = True
        self._run(communicator.world)
