"""Pages of a KV cache that torch allocated, moved from one process to another.

Run as a program it is the consumer: `python vllm_gpu_pages.py FORM TRANSPORT GPU FD`, a line a step
on stdio, its pages' descriptors over the Unix socket FD.
"""

from __future__ import annotations

import socket
import subprocess
import sys

import msgspec
import torch

from pdrelay.integrations.vllm.page_layout import PageLayout, check_same_pages
from pdrelay.integrations.vllm.pages import Move
from pdrelay.integrations.vllm.registered import create_pages, describe

BLOCKS, SIZE, HEADS, DIM, LAYERS = 256, 16, 8, 128, 4
FORMS = ("split", "together", "block_major")
SRC, DST = [5, 6, 7, 0, 200], [100, 101, 9, 10, 511]


def caches_of(form: str, num_blocks: int, gpu: int = 0) -> dict[str, torch.Tensor]:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, device=f"cuda:{gpu}")

    if form == "split":
        return {f"l{i}": zeros(2, num_blocks, SIZE, HEADS, DIM) for i in range(LAYERS)}
    if form == "together":
        return {f"l{i}": zeros(num_blocks, 2, SIZE, HEADS, DIM) for i in range(LAYERS)}
    whole = zeros(num_blocks, LAYERS, 2, SIZE, HEADS, DIM)
    return {f"l{i}": whole[:, i] for i in range(LAYERS)}


class Hello(msgspec.Struct):
    layout: PageLayout
    handles: list[bytes]


def consumer(form: str, transport: str, gpu: int, fd: int) -> None:
    torch.cuda.set_device(gpu)
    caches = caches_of(form, 2 * BLOCKS, gpu)
    layout, storages, _ = describe(caches, num_blocks=2 * BLOCKS, block_size=SIZE)
    pages = create_pages(transport, layout, storages, share=True)
    offer = pages.offer()
    hello = Hello(layout, offer.handles)
    with socket.socket(fileno=fd) as sock:
        socket.send_fds(sock, [b"fds"], list(offer.fds))
    offer.passed_on()
    print(msgspec.json.encode(hello).decode(), flush=True)
    sys.stdin.readline()  # the producer's fence has passed
    axis = 1 if form == "split" else 0
    for i, cache in enumerate(caches.values()):
        for k, block in enumerate(DST):
            assert (cache.select(axis, block) == value(i, k)).all(), (i, k)
        assert int((cache != 0).sum()) == len(DST) * cache.select(axis, 0).numel()
    print("equal", flush=True)


def value(layer: int, position: int) -> int:
    return 1 + layer * 8 + position


def move_between_processes(transport: str = "cuda_ipc", gpu: int = 0) -> None:
    """From `cuda:0` to a process with its cache on `cuda:{gpu}`."""
    for form in FORMS:
        caches = caches_of(form, BLOCKS)
        layout, storages, _ = describe(caches, num_blocks=BLOCKS, block_size=SIZE)
        pages = create_pages(transport, layout, storages, share=False)
        ours, theirs = socket.socketpair()
        peer = subprocess.Popen(
            [sys.executable, __file__, form, transport, str(gpu), str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            assert peer.stdin is not None and peer.stdout is not None
            hello = msgspec.json.decode(peer.stdout.readline(), type=Hello)
            check_same_pages(layout, hello.layout)
            _, fds, _, _ = socket.recv_fds(ours, 8, 4)
            writer = pages.open(hello.layout, hello.handles, fds)
            axis = 1 if form == "split" else 0
            for i, cache in enumerate(caches.values()):
                torch.cuda._sleep(5_000_000)  # the copies must wait for what follows
                for k, block in enumerate(SRC):
                    cache.select(axis, block).fill_(value(i, k))
                pages.kv_written()
                writer.write([Move(i, SRC, DST)])
            fence = writer.fence()
            assert not fence.done()
            fence.wait()
            assert fence.done()
            peer.stdin.write("\n")
            peer.stdin.flush()
            assert peer.stdout.readline() == "equal\n", form
            writer.close()
        finally:
            ours.close()
            peer.kill()
            peer.wait(30)


if __name__ == "__main__":
    consumer(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
