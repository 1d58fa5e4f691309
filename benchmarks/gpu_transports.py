"""The GPU half of `transports.py`: a producer here, the consumer in a process of its own.

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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import msgspec

from pdrelay.core.channel import Channel
from pdrelay.core.kv_layout import KVLayout, contiguous_runs
from pdrelay.errors import PdrelayError
from pdrelay.transport.base import Arrived, Descriptor, ProducerLink, Sent, Transport
from pdrelay.transport.checksum import checksum
from pdrelay.transport.device import Run
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool import create_pool
from pdrelay.transport.registry import TransportOptions, create_transport

DEADLINE_S = 30.0
MAX_POOL_TOKENS = 2048  # pinned memory of 0.5 GB with the 8B shape


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


Message = Open | Opened | Expect | Commit | Done


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


LLAMA_8B = Shape(32, 8, 128, "bfloat16")
REHEARSAL = Shape(4, 2, 32, "float32")


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
        pages = make_pages(layout, "host", self._fabric)
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

    def close(self) -> None:
        self._stack.close()


@dataclass
class Cell:
    seconds: float
    num_pieces: int


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

    def move(self, src: list[int], dst: list[int], *, wait_each: bool = False) -> Cell:
        """Seconds from the first send until all is stored. `wait_each`: a transfer a layer."""
        layers = range(self.layout.num_layers)
        groups = [[layer] for layer in layers] if wait_each else [list(layers)]
        mapped = self.name == "mapped"
        num_pieces = 0
        self._number += 1
        name = f"t{self._number}"
        keys = [f"{name}/{i}".encode().rjust(32, b"-") for i in range(len(src))]
        self.consumer.expect(name, dst, keys)
        start = time.perf_counter()
        for group in groups:
            self.link.begin(name, keys)
            for layer in group:
                self.link.send(name, layer, 0, src, dst)
            self.link.finish(name)
            num_pieces += self._sent().report.num_pieces
        end = time.perf_counter()
        self.consumer.commit(name, len(dst) * self.layout.num_layers)
        return Cell((end if mapped else time.perf_counter()) - start, num_pieces)

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

    def plain_copy(self, num_bytes: int, repeats: int) -> float:
        """The best rate of one driver copy into the consumer's pages, bytes/s."""
        device, remote = self.pages.device, self.link._remote_address  # type: ignore[attr-defined]
        run = Run(remote, self.pages.address, min(num_bytes, self.layout.total_bytes))
        times = []
        for _ in range(repeats + 1):
            copy = device.copy([run], None)
            copy.wait()
            times.append(copy.busy_ns())
        return run.num_bytes / min(times[1:]) * 1e9


def block_ids(layout: KVLayout, count: int, order: str) -> tuple[list[int], list[int]]:
    if order == "run":
        return list(range(count)), list(range(layout.num_blocks - count, layout.num_blocks))
    rng = random.Random(0)
    ids = range(layout.num_blocks)
    return rng.sample(ids, count), rng.sample(ids, count)


def best(run: Callable[[], Cell], repeats: int) -> tuple[Cell, float]:
    """The best cell and the median of its seconds, after one warm-up."""
    cells = [run() for _ in range(repeats + 1)][1:]
    return min(cells, key=lambda c: c.seconds), statistics.median(c.seconds for c in cells)


def devices(device: str) -> tuple[str, str, str]:
    """Producer's, consumer's, and what is between them, in words."""
    if device in ("host", "process"):
        return device, device, "a rehearsal without GPUs: its figures say nothing about them"
    import torch

    name = torch.cuda.get_device_name(0)
    if torch.cuda.device_count() > 1:
        return "cuda:0", "cuda:1", f"{name}, cuda:0 to cuda:1, torch {torch.__version__}"
    return "cuda:0", "cuda:0", f"{name}, both processes on cuda:0, torch {torch.__version__}"


def run_gpu(device: str, names: list[str], repeats: int, seconds: float) -> None:
    began = time.monotonic()
    here, there, words = devices(device)
    on_gpu = here.startswith("cuda")
    shape = LLAMA_8B if on_gpu else REHEARSAL
    sizes = [16, 64, 256] if on_gpu else [16, 64]
    lengths = [128, 512, 2048, 8192] if on_gpu else [64, 256]
    print(words)
    print(f"{shape}; best (median) of {repeats}, first send to all stored; tcp, pool: to Arrived")
    fabric = HostFabric()
    consumer: Any = LocalConsumer(fabric) if device == "host" else RemoteConsumer(there)
    try:
        for name in names:
            for block_size in sizes:
                if time.monotonic() - began > seconds:
                    print(f"stopped after {seconds:g} s")
                    return
                limit = min(lengths[-1], MAX_POOL_TOKENS) if name == "pool" else lengths[-1]
                layout = shape.layout(block_size, limit)
                with ExitStack() as stack:
                    bench = Bench(stack, consumer, name, layout, here, fabric)
                    table(bench, [n for n in lengths if n <= limit], repeats)
                    if name == "mapped" and block_size == 64:
                        compare_submission(bench, repeats)
                        print_checksums(bench, repeats)
    except PdrelayError as error:
        print(f"failed: {error}")
    finally:
        consumer.close()


def table(bench: Bench, lengths: list[int], repeats: int) -> None:
    layout = bench.layout
    peak = 0.0
    if bench.name == "mapped":
        peak = bench.plain_copy(512 << 20, 5)
        print(f"\none driver copy of up to 512 MiB: {peak / 1e9:.1f} GB/s")
    page_kib = layout.layer_block_bytes / 1024
    print(f"{bench.name}, blocks of {layout.block_size}: {page_kib:g} KiB a (layer, block)")
    print(f"{'tokens':>7}{'MB':>8} {'ids':<9}{'pieces':>7}{'KiB each':>9}{'bulk ms':>18}", end="")
    print(f"{'GB/s':>7}{'of copy':>9}{'layer by layer ms':>19}{'GB/s':>7}")
    for order in ("run", "shuffled"):
        for tokens in lengths:
            count = -(-tokens // layout.block_size)
            src, dst = block_ids(layout, count, order)
            num_bytes = count * layout.block_bytes
            bulk, median = best(lambda s=src, d=dst: bench.move(s, d), repeats)
            share = f"{num_bytes / bulk.seconds / peak:.0%}" if peak else ""
            runs = sum(1 for _ in contiguous_runs(src, dst)) * layout.num_layers
            cells = f"{bulk.seconds * 1e3:.3f} ({median * 1e3:.3f})"
            row = f"{tokens:>7}{num_bytes / 1e6:>8.1f} {order:<9}{bulk.num_pieces:>7}"
            row += f"{num_bytes / runs / 1024:>9.0f}{cells:>18}"
            row += f"{num_bytes / bulk.seconds / 1e9:>7.1f}{share:>9}"
            if bench.name == "mapped":
                each, median = best(lambda s=src, d=dst: bench.move(s, d, wait_each=True), repeats)
                cells = f"{each.seconds * 1e3:.3f} ({median * 1e3:.3f})"
                row += f"{cells:>19}{num_bytes / each.seconds / 1e9:>7.1f}"
            print(row, flush=True)


def compare_submission(bench: Bench, repeats: int) -> None:
    """One driver call for all runs of a batch against one a run, on GPUs whose driver has both."""
    device = bench.pages.device
    if not getattr(device, "batched", False):
        print("\nthe driver has no batched copies (or this is a rehearsal): one call a run")
        return
    src, dst = block_ids(bench.layout, min(32, bench.layout.num_blocks // 2), "shuffled")
    rows = {}
    for batch in (True, False):
        device._batch = batch
        cell, median = best(lambda: bench.move(src, dst), repeats)
        rows[batch] = f"{cell.seconds * 1e3:.3f} ({median * 1e3:.3f})"
    device._batch = True
    print(f"\n{len(src)} shuffled blocks, ms: one call a batch {rows[True]}, a run {rows[False]}")


def print_checksums(bench: Bench, repeats: int) -> None:
    print("\nchecksum on the device, µs, best (median)")
    for tokens in (512, 4096):
        count = min(tokens // bench.layout.block_size, bench.layout.num_blocks)
        blocks = random.Random(1).sample(range(bench.layout.num_blocks), count)
        for mode in ("sample", "full"):
            times = []
            for _ in range(max(repeats, 10)):
                start = time.perf_counter()
                checksum(bench.pages, blocks, mode)  # type: ignore[arg-type]
                times.append(time.perf_counter() - start)
            cell = f"{min(times) * 1e6:.0f} ({statistics.median(times) * 1e6:.0f})"
            print(f"  {tokens} tokens, {mode:<7}{cell:>14}")
