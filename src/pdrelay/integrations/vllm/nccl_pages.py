"""KV pages that two vLLM instances move by NCCL, for GPUs that cannot reach each other's memory.

What P2pNcclConnector was, up to vLLM 0.23: a communicator of two for each pair of ranks. A writer
gathers pages into staging memory and sends it, a taker on the other GPU receives and scatters it,
each with a thread of its own, so that neither engine waits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

import msgspec

from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.errors import TransportError
from pdrelay.integrations.vllm.nccl_taker import NcclTaker
from pdrelay.integrations.vllm.nccl_wire import NcclMessage
from pdrelay.integrations.vllm.nccl_writer import NcclWriter
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.integrations.vllm.pages import Offer
from pdrelay.transport.device import Device, Event
from pdrelay.transport.nccl_end import NcclEnd
from pdrelay.transport.nccl_library import NcclLibrary
from pdrelay.transport.nccl_wire import STAGING_BYTES

TIMEOUT_S = 30.0  # of a silent peer: its GPU may be busy with a long prefill


class NcclHandle(msgspec.Struct, frozen=True, tag="nccl"):
    """Goes with one file descriptor: a connected Unix stream socket."""

    device_uuid: str


class NcclKVPages:
    transport = "nccl"
    batch_bytes = STAGING_BYTES  # one send: 0.7 ms of PCIe at 25 GB/s behind the last layer

    def __init__(
        self,
        layout: PageLayout,
        device: Device,
        addresses: Sequence[int],
        library: NcclLibrary,
        make_device: Callable[[], Device],
        *,
        on_compute_stream: Callable[[], None] = lambda: None,
        timeout_s: float = TIMEOUT_S,
        clock: Clock = monotonic_ns,
    ) -> None:
        """`addresses`: one a region. `make_device`: the same device as `device`, for the use of one
        thread. `on_compute_stream` tells `device` which stream the engine launches on now."""
        self.layout = layout
        self._device = device
        self._addresses = addresses
        self._library = library
        self._make_device = make_device
        self._on_compute_stream = on_compute_stream
        self._timeout_s = timeout_s
        self._clock = clock
        self._writers: list[NcclWriter] = []
        self.written: Event | None = None  # behind the KV that may be read

    def offer(self) -> Offer:
        ours, theirs = socket.socketpair()
        handle = msgspec.msgpack.encode(NcclHandle(self._device.uuid))
        end = self._end(ours)
        return NcclTaker(handle, theirs, end, self.layout, self._addresses, self._make_device)

    def open(self, layout: PageLayout, handles: list[bytes], fds: Sequence[int]) -> NcclWriter:
        try:
            self._check(handles, fds)
            sock = socket.socket(fileno=fds[0])
        except (TransportError, OSError) as error:
            for fd in fds:
                os.close(fd)
            raise TransportError(f"the consumer cannot be reached: {error}") from error
        self._writers = [writer for writer in self._writers if not writer.over]
        end = self._end(sock)
        writer = NcclWriter(
            end, self.layout, self._addresses, self._make_device, lambda: self.written
        )
        self._writers.append(writer)
        return writer

    def _check(self, handles: list[bytes], fds: Sequence[int]) -> None:
        if len(handles) != 1 or len(fds) != 1:
            raise TransportError("one handle with one file descriptor is due")
        try:
            handle = msgspec.msgpack.decode(handles[0], type=NcclHandle)
        except msgspec.MsgspecError as error:
            raise TransportError(f"its handle is damaged: {error}") from error
        if handle.device_uuid == self._device.uuid:
            raise TransportError(
                "NCCL refuses two ranks on one GPU: give each instance its own, or choose "
                'transport "cuda_ipc"'
            )

    def kv_written(self) -> None:
        self._on_compute_stream()
        self.written = self._device.launched()

    def before_overwrite(self) -> None:
        """Rare (a preempted or aborted prefill), and at most until all queued pages are sent."""
        for writer in self._writers:
            writer.wait_gathered()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()
        self._device.close()

    def _end(self, sock: socket.socket) -> NcclEnd[NcclMessage]:
        channel: Channel[NcclMessage] = Channel(sock, NcclMessage)
        return NcclEnd(self._library, channel, self._timeout_s, self._clock)
