"""Two processes and a real IPC handle: on one GPU, and on two where there are two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from transport_kit import make_keys

from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.base import Descriptor, Sent
from pdrelay.transport.checksum import checksum, prepare_checksum
from pdrelay.transport.fds import recv_with_fds, send_with_fds
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.registry import TransportOptions, create_transport

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LAYOUT = KVLayout(
    num_layers=4, num_blocks=64, block_size=64, num_kv_heads=8, head_dim=128, dtype="bfloat16"
)


def ordinals():
    return [0, 1] if torch.cuda.is_available() and torch.cuda.device_count() > 1 else [0]


class Peer:
    def __init__(self, name, ordinal):
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *filter(None, sys.path)])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, f"{here}/cuda_peer.py", str(theirs.fileno()), str(ordinal)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        send_with_fds(self.socket, msgspec.msgpack.encode((name, LAYOUT)))
        self.descriptor = Descriptor(*recv_with_fds(self.socket))

    def ask(self, *message):
        send_with_fds(self.socket, msgspec.msgpack.encode(list(message)))
        return msgspec.msgpack.decode(recv_with_fds(self.socket)[0])

    def close(self):
        self.process.kill()
        self.process.wait(timeout=30)
        self.socket.close()


class Producer:
    def __init__(self, name="mapped"):
        from pdrelay.transport.cuda.pages import CudaPages

        self.pages = CudaPages.create(LAYOUT, 0)
        torch.manual_seed(1)
        self.pages.tensor.copy_(torch.randn(LAYOUT.shape))
        torch.cuda.synchronize()
        self.transport = create_transport(name, self.pages, "prefill-0", TransportOptions())

    def wait_sent(self, link):
        while True:
            for news in link.poll():
                assert isinstance(news, Sent), news
                return news.report

    def close(self):
        self.transport.close()
        self.pages.close()


@pytest.fixture
def producer():
    producer = Producer()
    yield producer
    producer.close()


@pytest.mark.parametrize("way", ["kernel", "driver"])
@pytest.mark.parametrize("ordinal", ordinals())
def test_copied_pages_arrive_and_nothing_else_changes(producer, ordinal, way):
    if way == "kernel":
        pytest.importorskip("triton")
    producer.transport.device.page_copies = way
    peer = Peer("mapped", ordinal)
    src, dst = [3, 4, 5, 17, 18, 40], [9, 8, 7, 30, 31, 32]
    peer.ask("expect", "a", dst, make_keys("a", 6))
    link = producer.transport.connect(LAYOUT, peer.descriptor)
    link.begin("a", make_keys("a", 6))
    for layer in range(LAYOUT.num_layers):
        producer.transport.device.written(layer)
        link.send("a", layer, 0, src, dst)
    link.finish("a")
    report = producer.wait_sent(link)
    assert report.num_bytes == 6 * LAYOUT.block_bytes
    assert report.num_pieces == 5 * LAYOUT.num_layers
    assert 0 < report.busy_ns <= report.end_ns - report.start_ns
    assert peer.ask("commit", "a", 6 * LAYOUT.num_layers)
    assert peer.ask("checksum", dst) == checksum(producer.pages, src, "full")
    assert peer.ask("untouched", sorted(set(range(64)) - set(dst)))
    link.close()
    peer.close()


@pytest.mark.parametrize("ordinal", ordinals())
def test_stores_of_kernels_arrive_too(producer, ordinal):
    peer = Peer("mapped", ordinal)
    peer.ask("expect", "a", [5, 6], make_keys("a", 2))
    link = producer.transport.connect(LAYOUT, peer.descriptor)
    link.remote_pool.tensor[:, [5, 6]] = producer.pages.tensor[:, [1, 2]]  # any kernel
    torch.cuda.synchronize()
    link.begin("a", make_keys("a", 2))
    link.stored("a", 2 * LAYOUT.num_layers, LAYOUT.num_layers, 1)
    link.finish("a")
    producer.wait_sent(link)
    assert peer.ask("commit", "a", 2 * LAYOUT.num_layers)
    assert peer.ask("checksum", [5, 6]) == checksum(producer.pages, [1, 2], "full")
    link.close()
    peer.close()


def used_bytes():
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_a_killed_consumer_leaves_no_memory_and_its_successor_is_reached(producer):
    """Its memory stays while we map it, and goes with the mapping; five incarnations."""
    before = used_bytes()
    for number in range(5):
        peer = Peer("mapped", 0)
        link = producer.transport.connect(LAYOUT, peer.descriptor)
        name = f"t{number}"
        link.begin(name, make_keys(name, 1))
        for layer in range(LAYOUT.num_layers):
            link.send(name, layer, 0, [0], [0])
        peer.close()
        link.finish(name)  # stores into what nobody else has any more
        producer.wait_sent(link)
        assert used_bytes() >= before + LAYOUT.total_bytes  # mapped here still
        link.close()
        end = time.monotonic() + 20
        # `quiet` comes before the transport's thread has unmapped, the exit of a process before
        # all of its memory is back. Less than one pool may stay: what a first use sets up.
        while not link.quiet() or used_bytes() - before >= LAYOUT.total_bytes:
            producer.transport.poll()
            leaked = used_bytes() - before
            assert time.monotonic() < end, f"{leaked} B stay after consumer {number}"


@pytest.mark.parametrize("name", ["tcp"])
def test_staged_pages_arrive(name):
    producer = Producer(name)
    peer = Peer(name, 0)
    blocks = list(range(40))
    peer.ask("expect", "a", blocks, make_keys("a", 40))
    link = producer.transport.connect(LAYOUT, peer.descriptor)
    link.begin("a", make_keys("a", 40))
    for layer in range(LAYOUT.num_layers):
        link.send("a", layer, 0, blocks, blocks)
    link.finish("a")
    producer.wait_sent(link)
    assert peer.ask("commit", "a", 40 * LAYOUT.num_layers)
    assert peer.ask("checksum", blocks) == checksum(producer.pages, blocks, "full")
    link.close()
    peer.close()
    producer.close()


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_checksums_of_the_device_are_the_hosts(producer, mode):
    host = SharedPages.create(LAYOUT)
    whole = torch.frombuffer(host.buffer, dtype=torch.uint8)
    whole.copy_(producer.pages.tensor.cpu().view(-1).view(torch.uint8))
    for blocks in ([5], [63, 0, 17], list(range(64))):
        wanted = checksum(host, blocks, mode)
        assert checksum(producer.pages, blocks, mode) == wanted
        prepared = prepare_checksum(producer.pages, blocks, True, mode=mode)
        kept = producer.pages.tensor[:, blocks[0]].clone()
        producer.pages.tensor[:, blocks[0]] = 0  # the engine's stream: `begin` comes behind
        producer.pages.tensor[:, blocks[0]] = kept
        pending = prepared.begin()
        producer.pages.tensor[:, blocks[0]] = 1  # and what is launched then behind it
        assert pending.result() == wanted
        producer.pages.tensor[:, blocks[0]] = kept
    torch.cuda.synchronize()
    del whole
    host.close()
