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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from pdrelay.core.channel import Channel
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import PdrelayError
from pdrelay.transport.base import Arrived, Descriptor, ProducerLink, Sent, Transport
from pdrelay.transport.checksum import checksum
from pdrelay.transport.device import Run
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool import create_pool
from pdrelay.transport.registry import TransportOptions, create_transport

DEADLINE_S = 30.0
STAGED_TOKENS = 2048  # tcp and pool: 0.3 GB of the 8B shape
CELL_S = 0.5  # a cell is not repeated any further, once it has been twice
WAYS_MIB = (8, 64, 1024)
CTAS = (8, 16, 32, 132)


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
    busy_ns: int  # device time, with mapped
    host_s: float  # of `seconds`, until all was handed to the link


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
        self._number += 1
        name = f"t{self._number}"
        keys = [f"{name}/{i}".encode().rjust(32, b"-") for i in range(len(src))]
        self.consumer.expect(name, dst, keys)
        start = time.perf_counter()
        self.link.begin(name, keys)
        for layer in range(self.layout.num_layers):
            self.link.send(name, layer, 0, src, dst)
            if layer_wise:
                self.link.flush(name)
        self.link.finish(name)
        handed = time.perf_counter()
        report = self._sent().report
        end = time.perf_counter()
        self.consumer.commit(name, len(dst) * self.layout.num_layers)
        if self.name != "mapped":
            end = time.perf_counter()
        return Cell(end - start, report.num_pieces, report.busy_ns, handed - start)

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
        device, remote = self.pages.device, self.link._remote  # type: ignore[attr-defined]
        run = Run(remote.address, self.pages.address, min(num_bytes, self.layout.total_bytes))
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
    run()
    cells: list[Cell] = []
    while len(cells) < repeats:
        cells.append(run())
        if len(cells) >= 2 and sum(cell.seconds for cell in cells) > CELL_S:
            break
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
    lengths = [128, 512, 2048, 8192] if on_gpu else [64, 256]
    print(words)
    print(
        f"{shape}; best (median) of up to {repeats}, first send to all stored (tcp, pool: Arrived)"
    )
    fabric = HostFabric()
    consumer: Any = LocalConsumer(fabric) if device == "host" else RemoteConsumer(there)
    try:
        for name in names:
            mapped = name == "mapped"
            for block_size in (16, 64) if mapped else (64,):
                if time.monotonic() - began > seconds:
                    print(f"stopped after {seconds:g} s")
                    return
                limit = lengths[-1] if mapped else min(lengths[-1], STAGED_TOKENS)
                layout = shape.layout(block_size, limit)
                with ExitStack() as stack:
                    bench = Bench(stack, consumer, name, layout, here, fabric)
                    peak = bench.plain_copy(512 << 20, 5) if mapped else 0.0
                    if mapped:
                        where = "from GPU to GPU" if here != there else "within one device"
                        print(f"\ncopy peak {where} (one driver copy): {peak / 1e9:.1f} GB/s")
                    shown = lengths[1::2] if mapped else [n for n in lengths[1:] if n <= limit]
                    table(bench, shown, repeats, peak)
                    if mapped:
                        compare_ways(bench, repeats, peak)
                    if mapped and block_size == 64:
                        print_checksums(bench, repeats)
        print(f"\n{time.monotonic() - began:.0f} s in all")
    except PdrelayError as error:
        print(f"failed: {error}")
    finally:
        consumer.close()


def rate(num_bytes: int, seconds: float, peak: float) -> str:
    """GB/s, and of the copy peak over the same link."""
    share = f" {num_bytes / seconds / peak:>4.0%}" if peak else ""
    return f"{num_bytes / seconds / 1e9:.1f}{share}"


def table(bench: Bench, lengths: list[int], repeats: int, peak: float) -> None:
    layout = bench.layout
    page_kib = layout.layer_block_bytes / 1024
    print(f"{bench.name}, blocks of {layout.block_size}: {page_kib:g} KiB a (layer, block)")
    print(f"{'tokens':>7}{'MB':>8} {'ids':<9}{'pieces':>7}{'bulk ms':>19}{'GB/s':>13}", end="")
    print(f"{'device GB/s':>13}{'layer by layer ms':>19}{'GB/s':>13}" if peak else "")
    for order in ("run", "shuffled"):
        for tokens in lengths:
            count = -(-tokens // layout.block_size)
            src, dst = block_ids(layout, count, order)
            num_bytes = count * layout.block_bytes
            bulk, median = best(lambda s=src, d=dst: bench.move(s, d), repeats)
            cells = f"{bulk.seconds * 1e3:.3f} ({median * 1e3:.3f})"
            row = f"{tokens:>7}{num_bytes / 1e6:>8.1f} {order:<9}{bulk.num_pieces:>7}"
            row += f"{cells:>19}{rate(num_bytes, bulk.seconds, peak):>13}"
            if peak:
                row += f"{rate(num_bytes, bulk.busy_ns / 1e9, peak):>13}"
                each, median = best(lambda s=src, d=dst: bench.move(s, d, layer_wise=True), repeats)
                cells = f"{each.seconds * 1e3:.3f} ({median * 1e3:.3f})"
                row += f"{cells:>19}{rate(num_bytes, each.seconds, peak):>13}"
            print(row, flush=True)


@contextmanager
def copying(device: Any, way: str, **options: Any) -> Iterator[None]:
    """`device.copy_pages` in one way: `batch` (driver), `ctas`, `chunk_bytes` (kernel)."""
    before = device.page_copies, device.page_copy_ctas, device._batch
    launch = device._copier.launch if way == "kernel" else None
    device.page_copies = way
    device.page_copy_ctas = options.get("ctas", device.page_copy_ctas)
    device._batch = options.get("batch", device._batch)
    if launch is not None and "chunk_bytes" in options:
        device._copier.launch = partial(launch, chunk_bytes=options["chunk_bytes"])
    try:
        yield
    finally:
        device.page_copies, device.page_copy_ctas, device._batch = before
        if launch is not None:
            vars(device._copier).pop("launch", None)  # the method of its class again


def compare_ways(bench: Bench, repeats: int, peak: float) -> None:
    """Bulk transfers by the page-copy kernel and by the driver, on GPUs."""
    device, layout = bench.pages.device, bench.layout
    if getattr(device, "_copier", None) is None:
        print("no page-copy kernel (no Triton, or a rehearsal): the driver copies")
        return
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("driver, a call a run", "driver", {"batch": False})
    ]
    if device.batched:
        ways.append(("driver, one call", "driver", {"batch": True}))
    ways += [(f"kernel, {n} CTAs", "kernel", {"ctas": n}) for n in CTAS]
    ways.append(("kernel, 16 CTAs, 64 KiB", "kernel", {"ctas": 16, "chunk_bytes": 64 << 10}))
    print(f"{'MiB':>7} {'ids':<9} {'bulk by':<26}{'host ms':>9}{'ms':>9}{'GB/s':>13}", end="")
    print(f"{'device GB/s':>13}")
    for mebibytes in WAYS_MIB:
        count = min((mebibytes << 20) // layout.block_bytes, layout.num_blocks // 2)
        for order in ("run", "shuffled"):
            src, dst = block_ids(layout, count, order)
            num_bytes = count * layout.block_bytes
            for words, way, options in ways:
                with copying(device, way, **options):
                    cell, _ = best(lambda s=src, d=dst: bench.move(s, d), repeats)
                row = f"{num_bytes >> 20:>7} {order:<9} {words:<26}{cell.host_s * 1e3:>9.3f}"
                row += f"{cell.seconds * 1e3:>9.3f}{rate(num_bytes, cell.seconds, peak):>13}"
                print(f"{row}{rate(num_bytes, cell.busy_ns / 1e9, peak):>13}", flush=True)


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
