"""How fast each transport moves KV, beside a plain memory copy of the same bytes in the same run.

    python benchmarks/transports.py [--repeats N] [--sizes BLOCKS,...] [--transports mapped,tcp,...]
    python benchmarks/transports.py --device cuda [--transports mapped,tcp,pool] [--seconds S]

Both sides run in this process: for tcp and pool, on a second thread. Times are from the first
`send` to `Arrived`, best and median of the repeats, after a warm-up that touches all pages. The
block ids are one run (a fresh pool) or shuffled (an old one). A copy reads and writes each byte
once, and that is mapped's bound; tcp and pool copy everything twice. On GPUs (one or two) the
consumer is a process of its own: see gpu_transports.py and gpu_bulk.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np

from pdrelay.core.kv_layout import KVLayout, contiguous_runs
from pdrelay.transport.base import Arrived, Descriptor, ProducerLink, Sent, Transport
from pdrelay.transport.checksum import checksum
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool import create_pool
from pdrelay.transport.registry import TransportOptions, create_transport

DEADLINE_S = 30.0
TINY = KVLayout(
    num_layers=4, num_blocks=2048, block_size=16, num_kv_heads=4, head_dim=32, dtype="float32"
)


def await_news(poll: Callable[[], Sequence[object]], fd: int | None, kind: type) -> None:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        for news in poll():
            if isinstance(news, kind):
                return
            raise SystemExit(f"failed: {news}")
        select.select([fd] if fd is not None else [], [], [], 1.0)
    raise SystemExit("no news before the deadline")


def move(
    link: ProducerLink,
    producer: Transport,
    consumer: Transport,
    name: str,
    src: list[int],
    dst: list[int],
    num_layers: int,
) -> float:
    """One hand-over; seconds from the first send to Arrived."""
    # New keys each time, or the pool would skip the bytes it has.
    keys = [hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(len(src))]
    consumer.expect(name, 0, dst, keys)
    link.begin(name, keys)
    slots = dst if producer.capabilities.needs_slots else []
    start = time.perf_counter()
    for layer in range(num_layers):
        link.send(name, layer, 0, src, slots)
    link.finish(name)
    await_news(link.poll, producer.fileno(), Sent)
    consumer.commit(name, len(dst) * num_layers)
    await_news(consumer.poll, consumer.fileno(), Arrived)
    return time.perf_counter() - start


def plain_copy(
    src_pages: SharedPages, dst_pages: SharedPages, src: list[int], dst: list[int]
) -> float:
    runs = list(contiguous_runs(src, dst))
    start = time.perf_counter()
    for layer in range(src_pages.layout.num_layers):
        for a, b, n in runs:
            np.copyto(dst_pages.array[layer, b : b + n], src_pages.array[layer, a : a + n])
    return time.perf_counter() - start


def block_ids(layout: KVLayout, count: int, order: str) -> tuple[list[int], list[int]]:
    if order == "run":
        return list(range(count)), list(range(layout.num_blocks - count, layout.num_blocks))
    rng = random.Random(0)
    return (
        rng.sample(range(layout.num_blocks), count),
        rng.sample(range(layout.num_blocks), count),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--sizes", default="8,32,128,512", help="blocks a hand-over")
    parser.add_argument("--transports", default="")
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; host or process to rehearse cuda"
    )
    parser.add_argument("--seconds", type=float, default=50.0, help="cuda: begin nothing later")
    parser.add_argument("--peer", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        from gpu_transport_rig import serve_consumer
        from gpu_transports import run_gpu

        if arguments.peer >= 0:
            serve_consumer(arguments.peer, arguments.device)
            return
        names = (arguments.transports or "mapped,tcp,pool").split(",")
        run_gpu(arguments.device, names, arguments.repeats, arguments.seconds)
        return
    layout = TINY
    with ExitStack() as stack:
        pages = [SharedPages.create(layout) for _ in range(2)]
        for side in pages:
            side.array[:] = 1
            stack.callback(side.close)
        print(f"layout {layout}")
        print(
            f"one layer of one block {layout.layer_block_bytes} B, one block {layout.block_bytes} B"
        )
        print(f"{os.cpu_count()} cores, {arguments.repeats} repeats: best (median) GB/s")
        names = (arguments.transports or "mapped,tcp,pool,fake").split(",")
        print(f"{'blocks':>7}{'MB':>8} {'ids':<9}" + "".join(f"{n:>16}" for n in ["copy", *names]))
        for order in ("run", "shuffled"):
            for count in map(int, arguments.sizes.split(",")):
                row = measure(pages, layout, count, order, names, arguments.repeats)
                megabytes = count * layout.block_bytes / 1e6
                cells = "".join(f"{cell:>16}" for cell in row)
                print(f"{count:>7}{megabytes:>8.1f} {order:<9}{cells}", flush=True)
        print_checksums(pages[0], arguments.repeats)


def measure(
    pages: list[SharedPages],
    layout: KVLayout,
    count: int,
    order: str,
    names: list[str],
    repeats: int,
) -> list[str]:
    src, dst = block_ids(layout, count, order)
    num_bytes = count * layout.block_bytes
    with ExitStack() as stack:
        movers: dict[str, Callable[[int], float]] = {
            "copy": lambda _: plain_copy(pages[0], pages[1], src, dst)
        }
        for name in names:
            movers[name] = mover(stack, name, pages, layout, src, dst)
        times: dict[str, list[float]] = {name: [] for name in movers}
        for number in range(repeats + 2):
            for name, run in movers.items():  # interleaved, so that all see the same machine
                seconds = run(number)
                if number >= 2:
                    times[name].append(seconds)
    return [
        f"{num_bytes / min(t) / 1e9:.2f} ({num_bytes / statistics.median(t) / 1e9:.2f})"
        for t in times.values()
    ]


def mover(
    stack: ExitStack,
    name: str,
    pages: list[SharedPages],
    layout: KVLayout,
    src: list[int],
    dst: list[int],
) -> Callable[[int], float]:
    from pdrelay.transport.fake import FakeFabric

    fabric = FakeFabric()
    # Twice the blocks: a transfer evicts the pages of the one before last.
    pool = create_pool(layout, 2 * len(src))
    stack.callback(pool.close)
    producer, consumer = (
        create_transport(
            name,
            side,
            instance,
            TransportOptions(
                fabric=fabric, pool=pool.description, pool_fd=pool.fd, instance_index=index
            ),
        )
        for index, (side, instance) in enumerate(zip(pages, ("prefill-0", "decode-0"), strict=True))
    )
    stack.callback(consumer.close)
    stack.callback(producer.close)
    descriptor = consumer.descriptor()
    fds = tuple(os.dup(fd) for fd in descriptor.fds)
    link = producer.connect(layout, Descriptor(descriptor.data, fds))
    stack.callback(link.close)
    return lambda number: move(link, producer, consumer, f"t{number}", src, dst, layout.num_layers)


def print_checksums(pages: SharedPages, repeats: int) -> None:
    print("\nchecksum of 512 shuffled blocks, best (median) µs")
    blocks = random.Random(1).sample(range(pages.layout.num_blocks), 512)
    for mode in ("sample", "full"):
        times = []
        for _ in range(max(repeats, 20)):
            start = time.perf_counter()
            checksum(pages, blocks, mode)
            times.append(time.perf_counter() - start)
        print(f"  {mode:<7}{min(times) * 1e6:8.0f} ({statistics.median(times) * 1e6:.0f})")


if __name__ == "__main__":
    main()
