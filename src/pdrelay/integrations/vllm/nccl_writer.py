"""The producer's way into one consumer's pages by NCCL: a thread that gathers and sends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pdrelay.errors import PdrelayError, ProtocolError, TransportError
from pdrelay.integrations.vllm.nccl_wire import NcclMessage, Placed, Put
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.integrations.vllm.pages import Move
from pdrelay.integrations.vllm.staging import Part, Staging, staging_bytes
from pdrelay.transport.device import Copy, Device, Event
from pdrelay.transport.nccl_end import Ended, NcclEnd

_JOIN_S = 10.0  # the thread's waits end at once when told to; the device may take longer


@dataclass(frozen=True)
class _Batch:
    """Moves that fit the staging memory, behind the event `after`."""

    moves: list[Move]
    after: Event | None


class NcclWriter:
    """`write` and `fence` only queue and look; everything else happens on the thread. That it
    ended before all was placed is what later calls raise."""

    def __init__(
        self,
        end: NcclEnd[NcclMessage],
        layout: PageLayout,
        addresses: Sequence[int],
        make_device: Callable[[], Device],
        written: Callable[[], Event | None],
    ) -> None:
        """`addresses`: one a region of the producer's `layout`. `written`: behind the KV that may
        be read when it is called."""
        self._end = end
        self._layout = layout
        self._addresses = addresses
        self._make_device = make_device
        self._written = written
        self._changed = threading.Condition()
        self._queue: deque[_Batch] = deque()
        self._num_queued = self._num_gathered = self._num_placed = 0  # since the start
        self._problem = ""
        self._over = False  # nothing reads pages or is sent any more
        self._gather: Copy | None = None  # the thread's latest
        self._thread = threading.Thread(target=self._run, name="pdrelay-nccl-put", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        with self._changed:
            return self._over

    # ---- the engine's and the service's thread

    def write(self, moves: Sequence[Move]) -> int:
        after = self._written()
        batches = [_Batch(batch, after) for batch in cut(self._layout, moves)]
        with self._changed:
            if self._over:
                raise TransportError(self._problem)
            self._queue.extend(batches)
            self._num_queued += len(batches)
        self._end.nudge()
        return len(batches)

    def fence(self) -> NcclFence:
        with self._changed:
            return NcclFence(self, self._num_queued)

    def wait_gathered(self) -> None:
        """Until no page of what is queued is read any more."""
        with self._changed:
            all_of_it = self._num_queued
            self._changed.wait_for(lambda: self._over or self._num_gathered >= all_of_it)

    def close(self) -> None:
        self._end.end()
        self._thread.join(_JOIN_S)

    def placed(self, position: int) -> bool:
        """Whether the first `position` batches are in the consumer's pages. Raises TransportError
        when they never will be."""
        with self._changed:
            if self._num_placed >= position:
                return True
            if self._over:
                raise TransportError(self._problem)
            return False

    def wait_placed(self, position: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._num_placed >= position)

    # ---- the thread

    def _run(self) -> None:
        problem = "the writer was closed"
        try:
            self._serve()
        except Ended:
            problem = "the consumer closed the NCCL link"
        except (OSError, PdrelayError) as error:
            problem = f"the NCCL link to the consumer broke: {error}"
        with self._changed:
            self._problem = problem
            self._over = True
            self._queue.clear()
            self._changed.notify_all()

    def _serve(self) -> None:
        staging = None
        try:
            staging = Staging(self._layout, self._addresses, self._make_device)
            self._end.greet()
            while True:
                self._hear()
                batch = self._next()
                if batch is None:
                    self._end.idle(due=self._num_placed < self._num_gathered)
                else:
                    self._send(batch, staging)
        finally:
            if self._gather is not None:
                self._gather.wait()
            if self._end.close() and staging is not None:  # else the device may still read it
                staging.close()

    def _hear(self) -> None:
        for message in self._end.heard():
            if not isinstance(message, Placed):
                raise ProtocolError("the consumer does not follow the protocol")
            with self._changed:
                self._num_placed = message.num_puts
                self._changed.notify_all()

    def _next(self) -> _Batch | None:
        with self._changed:
            return self._queue.popleft() if self._queue else None

    def _send(self, batch: _Batch, staging: Staging) -> None:
        pages = [Part(move.layer, list(move.src_blocks)) for move in batch.moves]
        self._gather = staging.gather(pages, batch.after)
        self._end.wait(self._gather)
        with self._changed:
            self._num_gathered += 1
            self._changed.notify_all()
        self._end.say(Put([Part(move.layer, list(move.dst_blocks)) for move in batch.moves]))
        self._end.send([(staging.address, staging.num_bytes(pages))], staging.stream.handle)
        self._end.wait(staging.stream.record())


class NcclFence:
    """Behind the first `position` batches of a writer."""

    def __init__(self, writer: NcclWriter, position: int) -> None:
        self._writer, self._position = writer, position

    def done(self) -> bool:
        return self._writer.placed(self._position)

    def wait(self) -> None:
        self._writer.wait_placed(self._position)


def cut(layout: PageLayout, moves: Sequence[Move]) -> Iterator[list[Move]]:
    """The moves in lists that fit the staging memory, moves cut where they do not."""
    limit = staging_bytes(layout)
    room, batch = limit, list[Move]()
    for move in moves:
        size = layout.layers[move.layer].block_bytes
        start = 0
        while start < len(move.src_blocks):
            stop = start + min(room // size, len(move.src_blocks) - start)
            if stop == start:
                yield batch
                room, batch = limit, []
                continue
            batch.append(Move(move.layer, move.src_blocks[start:stop], move.dst_blocks[start:stop]))
            room -= (stop - start) * size
            start = stop
    if batch:
        yield batch
