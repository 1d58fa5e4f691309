"""Two processes of a transport benchmark: a producer here, the consumer in a process of its own.

With two GPUs the pages cross the link between them, with one they stay on it. `--device host`
rehearses the same calls on fake devices in one process, `--device process` the two processes with
pages of the host (tcp and pool).
"""

from __future__ import annotations

import os
import random
import select
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pdrelay.core.channel import Channel
from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.base import Arrived, Descriptor, ProducerLink, Sent, Transport
from pdrelay.transport.checksum import checksum
from pdrelay.transport.device import Run
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool import create_pool
from pdrelay.transport.registry import TransportOptions, create_transport

DEADLINE_S = 30.0
IN_FLIGHT = 8  # hand-overs of a train, one behind another


class Open(msgspec.Struct, tag="open"):
    """To the consumer's process; the pool's fd comes with it, if there is one."""

    transport: str
    layout: KVLayout
    pool: bytes


class Opened(msgspec.Struct, tag="opened"):
    descriptor: bytes


class Expect(msgspec.Struct, tag="expect"):
    transfer_id: str
    blocks: list[int]
    keys: list[bytes]


class Commit(msgspec.Struct, tag="commit"):
    transfer_id: str
    num_pages: int


class Done(msgspec.Struct, tag="done"):
    text: str


class Sum(msgspec.Struct, tag="sum"):
    blocks: list[int]


class Summed(msgspec.Struct, tag="summed"):
    checksum: int


Message = Open | Opened | Expect | Commit | Done | Sum | Summed


@dataclass(frozen=True)
class Shape:
    """Heads and layers of one model; blocks and pool size are varied."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def layout(self, block_size: int, num_tokens: int) -> KVLayout:
        return KVLayout(
            num_layers=self.num_layers,
            num_blocks=2 * -(-num_tokens // block_size),
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )


# ---- the consumer's process


def receive(channel: Channel[Message]) -> Message:
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while not channel.closed:
            messages = channel.receive()
            if messages:
                return messages[0]
            if not selector.select(DEADLINE_S):
                break
    raise SystemExit("the other process is gone or stalls")


def serve_consumer(fd: int, device: str) -> None:
    """Until the socket ends: one pool and transport at a time."""
    channel: Channel[Message] = Channel(socket.socket(fileno=fd), Message)
    stack = ExitStack()
    transport: Transport | None = None
    pages: Any = None
    while not channel.closed:
        match receive(channel):
            case Open(transport=name, layout=layout, pool=pool):
                stack.close()
                pages = make_pages(layout, device, None)
                stack.callback(pages.close)
                fds = list(channel.received_fds)
                channel.received_fds.clear()
                options = TransportOptions(
                    pool=pool, pool_fd=fds[0] if fds else -1, instance_index=1
                )
                transport = create_transport(name, pages, "decode-0", options)
                stack.callback(transport.close)
                descriptor = transport.descriptor()
                channel.send(Opened(descriptor.data))
            case Expect(transfer_id=transfer_id, blocks=blocks, keys=keys):
                assert transport is not None
                transport.expect(transfer_id, 0, blocks, keys)
                channel.send(Done(""))
            case Commit(transfer_id=transfer_id, num_pages=num_pages):
                assert transport is not None
                transport.commit(transfer_id, num_pages)
                channel.send(Done(await_arrival(transport)))
            case Sum(blocks=blocks):
                channel.send(Summed(checksum(pages, blocks, "full")))


def await_arrival(transport: Transport) -> str:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        for news in transport.poll():
            return "" if isinstance(news, Arrived) else str(news)
        select.select([transport.fileno()], [], [], 0.001)
    return "nothing arrived before the deadline"


def make_pages(layout: KVLayout, device: str, fabric: HostFabric | None) -> Any:
    if device == "host":
        assert fabric is not None
        return HostPages.create(layout, HostDevice(fabric))
    if device == "process":
        return SharedPages.create(layout)
    from pdrelay.transport.cuda.pages import CudaPages

    return CudaPages.create(layout, int(device.removeprefix("cuda:")))


# ---- the producer


class RemoteConsumer:
    """The consumer in its process."""

    def __init__(self, device: str) -> None:
        ours, theirs = socket.socketpair()
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "transports.py")
        command = [sys.executable, script, "--peer", str(theirs.fileno()), "--device", device]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._channel: Channel[Message] = Channel(ours, Message)
        self._pool_sent = False

    def open(self, name: str, layout: KVLayout, pool: bytes, pool_fd: int) -> Descriptor:
        self._channel.send(Open(name, layout, pool), (pool_fd,) if pool_fd >= 0 else ())
        answer = receive(self._channel)
        assert isinstance(answer, Opened)
        return Descriptor(answer.descriptor)

    def expect(self, transfer_id: str, blocks: list[int], keys: list[bytes]) -> None:
        self._ask(Expect(transfer_id, blocks, keys))

    def commit(self, transfer_id: str, num_pages: int) -> None:
        self._ask(Commit(transfer_id, num_pages))

    def checksum(self, blocks: list[int]) -> int:
        self._channel.send(Sum(blocks))
        answer = receive(self._channel)
        assert isinstance(answer, Summed)
        return answer.checksum

    def _ask(self, message: Message) -> None:
        self._channel.send(message)
        answer = receive(self._channel)
        if not isinstance(answer, Done) or answer.text:
            raise SystemExit(f"the consumer says: {answer}")

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait(timeout=DEADLINE_S)


class LocalConsumer:
    """The rehearsal's: in this process, on a fake device."""

    def __init__(self, fabric: HostFabric) -> None:
        self._fabric = fabric
        self._stack = ExitStack()
        self._transport: Transport | None = None

    def open(self, name: str, layout: KVLayout, pool: bytes, pool_fd: int) -> Descriptor:
        self._stack.close()
        self._pages = pages = make_pages(layout, "host", self._fabric)
        self._stack.callback(pages.close)
        options = TransportOptions(pool=pool, pool_fd=pool_fd, instance_index=1)
        self._transport = create_transport(name, pages, "decode-0", options)
        self._stack.callback(self._transport.close)
        return self._transport.descriptor()

    def expect(self, transfer_id: str, blocks: list[int], keys: list[bytes]) -> None:
        assert self._transport is not None
        self._transport.expect(transfer_id, 0, blocks, keys)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        assert self._transport is not None
        self._transport.commit(transfer_id, num_pages)
        problem = await_arrival(self._transport)
        if problem:
            raise SystemExit(problem)

    def checksum(self, blocks: list[int]) -> int:
        return checksum(self._pages, blocks, "full")

    def close(self) -> None:
        self._stack.close()


@dataclass
class Cell:
    seconds: float
    num_pieces: int
    busy_ns: int  # device time, with mapped
    host_s: float  # of `seconds`, until all was handed to the link


@dataclass
class DriverCopy:
    """The best of one driver copy into the consumer's pages: the floor of a hand-over."""

    num_bytes: int
    device_s: float  # between events around it
    wall_s: float  # from the call until the host saw its end


class Bench:
    """One producer's pages and the link to the consumer."""

    def __init__(
        self, stack: ExitStack, consumer: Any, name: str, layout: KVLayout, device: str, fabric: Any
    ) -> None:
        self.layout = layout
        self.name = name
        self.pages = make_pages(layout, device, fabric)
        stack.callback(self.pages.close)
        pool, pool_fd = b"", -1
        if name == "pool":
            handle = create_pool(layout, layout.num_blocks)
            stack.callback(handle.close)
            pool, pool_fd = handle.description, handle.fd
        options = TransportOptions(pool=pool, pool_fd=pool_fd, instance_index=0)
        self.producer = create_transport(name, self.pages, "prefill-0", options)
        stack.callback(self.producer.close)
        descriptor = consumer.open(name, layout, pool, pool_fd)
        self.link: ProducerLink = self.producer.connect(layout, descriptor)
        stack.callback(self.link.close)
        self.consumer = consumer
        self._number = 0

    def move(self, src: list[int], dst: list[int], *, layer_wise: bool = False) -> Cell:
        """From the first send until all is stored. `layer_wise`: the link may start each layer by
        itself, as behind the kernels of a prefill."""
        name, keys = self._expect(src, dst)
        start = time.perf_counter()
        self._hand(name, keys, src, dst, layer_wise)
        handed = time.perf_counter()
        report = self._sent().report
        end = time.perf_counter()
        self.consumer.commit(name, len(dst) * self.layout.num_layers)
        if self.name != "mapped":
            end = time.perf_counter()
        return Cell(end - start, report.num_pieces, report.busy_ns, handed - start)

    def train(self, hand_overs: Sequence[tuple[list[int], list[int]]]) -> float:
        """Seconds from the first send until all is stored, with up to IN_FLIGHT hand-overs behind
        one another, as a loaded server has them (`mapped`)."""
        waiting = [(*self._expect(src, dst), src, dst) for src, dst in hand_overs]
        num_sent, num_handed = 0, 0
        end = time.monotonic() + DEADLINE_S
        start = time.perf_counter()
        while num_sent < len(waiting):
            if num_handed < len(waiting) and num_handed - num_sent < IN_FLIGHT:
                self._hand(*waiting[num_handed], False)
                num_handed += 1
            for news in self.link.poll():
                if not isinstance(news, Sent):
                    raise SystemExit(f"failed: {news}")
                num_sent += 1
            if time.monotonic() > end:
                raise SystemExit("not sent before the deadline")
        seconds = time.perf_counter() - start
        for name, _, _, dst in waiting:
            self.consumer.commit(name, len(dst) * self.layout.num_layers)
        return seconds

    def check(self, src: list[int], dst: list[int]) -> None:
        """Move new bytes and end the program unless they are there."""
        self._fill()
        self.move(src, dst)
        if self.consumer.checksum(dst) != checksum(self.pages, src, "full"):
            raise SystemExit(f"other bytes arrived than were sent, {len(src)} blocks")

    def _fill(self) -> None:
        if hasattr(self.pages, "array"):
            rng = np.random.default_rng(self._number)
            self.pages.array[:] = rng.integers(0, 256, self.pages.array.shape, np.uint8)
            return
        import torch

        self.pages.tensor.view(torch.int16).random_(-(1 << 15), 1 << 15)  # bfloat16

    def _expect(self, src: list[int], dst: list[int]) -> tuple[str, list[bytes]]:
        self._number += 1
        name = f"t{self._number}"
        keys = [f"{name}/{i}".encode().rjust(32, b"-") for i in range(len(src))]
        self.consumer.expect(name, dst, keys)
        return name, keys

    def _hand(
        self, name: str, keys: list[bytes], src: list[int], dst: list[int], layer_wise: bool
    ) -> None:
        self.link.begin(name, keys)
        for layer in range(self.layout.num_layers):
            self.link.send(name, layer, 0, src, dst)
            if layer_wise:
                self.link.flush(name)
        self.link.finish(name)

    def _sent(self) -> Sent:
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            for news in self.link.poll():
                if isinstance(news, Sent):
                    return news
                raise SystemExit(f"failed: {news}")
            if self.name != "mapped":  # the link's thread wants the interpreter
                select.select([self.producer.fileno()], [], [], 0.001)
        raise SystemExit("not sent before the deadline")

    def driver_copy(self, num_bytes: int, repeats: int) -> DriverCopy:
        device, remote = self.pages.device, self.link._remote  # type: ignore[attr-defined]
        run = Run(remote.address, self.pages.address, min(num_bytes, self.layout.total_bytes))
        device_s, wall_s = [], []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            copy = device.copy([run], None)
            while not copy.done():
                pass
            wall_s.append(time.perf_counter() - start)
            device_s.append(copy.busy_ns() / 1e9)
        return DriverCopy(run.num_bytes, min(device_s[1:]), min(wall_s[1:]))


def block_ids(layout: KVLayout, count: int, order: str) -> tuple[list[int], list[int]]:
    if order == "run":
        return list(range(count)), list(range(layout.num_blocks - count, layout.num_blocks))
    rng = random.Random(0)
    ids = range(layout.num_blocks)
    return rng.sample(ids, count), rng.sample(ids, count)
