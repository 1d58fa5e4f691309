"""Transport nccl on a fake NCCL: refusals, deaths and hangs; on real GPUs where there are two."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from transport_kit import CANARY, DEADLINE_S, Kit, Transfer, assert_canaries, no_gpu

from pdrelay.errors import ConfigError, TransportError
from pdrelay.transport.base import Arrived, Descriptor, Sent, TransferFailed
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.nccl_library import load_nccl
from pdrelay.transport.nccl_wire import STAGING_BYTES
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.registry import TransportOptions, create_transport


@pytest.fixture
def kit():
    with Kit("nccl@host", timeout_s=0.3) as kit:
        yield kit


def test_host_pages_are_refused(kit):
    pages = SharedPages.create(kit.side("x").layout)
    with pytest.raises(ConfigError, match="mapped or tcp"):
        create_transport("nccl", pages, "x", TransportOptions())
    pages.close()


def test_one_gpu_for_both_is_refused_in_clear_words(kit):
    p, d = kit.pair()
    p.pages.device.uuid = d.pages.device.uuid
    with pytest.raises(TransportError, match="same GPU"):
        p.connect(d)


def test_a_peer_that_never_joins_is_given_up(kit):
    p, d = kit.pair()
    descriptor = d.transport.descriptor()
    ours, theirs = socket.socketpair()  # at whose other end nobody answers
    link = p.transport.connect(d.layout, Descriptor(descriptor.data, (theirs.detach(),)))
    p.links.append(link)
    link.begin("a", [])
    assert "silent" in p.wait(TransferFailed, "a").message
    ours.close()


def test_a_send_without_its_receive_is_aborted_at_the_deadline_on_both_sides(kit):
    """The producer's kernel waits for a peer that hangs: it is let go, and so is the consumer's."""
    p, d = kit.pair()
    link = p.connect(d)
    Transfer(link, p, d, "warm", [0], [0]).run()
    kit.nccl.dead_after = kit.nccl.num_sends + 1
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin().send_all().finish()
    started = time.monotonic()
    message = p.wait(TransferFailed, "a").message
    assert "silent" in message or "closed" in message  # whose deadline comes first
    assert time.monotonic() - started < 5
    assert d.wait(TransferFailed, "a")
    while kit.nccl.num_aborts < 2:
        assert time.monotonic() - started < DEADLINE_S
    with pytest.raises(TransportError):
        transfer.send(0)
    again = Transfer(p.connect(d), p, d, "b", range(6), range(6, 12))
    kit.nccl.dead_after = None
    again.run()
    again.assert_moved()


def test_a_consumer_that_ends_lets_the_producer_go_at_once():
    with Kit("nccl@host", timeout_s=30.0) as kit:
        p, d = kit.pair()
        link = p.connect(d)
        Transfer(link, p, d, "warm", [0], [0]).run()
        kit.nccl.dead_after = kit.nccl.num_sends
        Transfer(link, p, d, "a", range(6), range(6)).expect().begin().send_all().finish()
        started = time.monotonic()
        d.close()
        p.wait(TransferFailed, "a")
        assert time.monotonic() - started < 10  # not the timeout


def test_close_does_not_wait_for_a_peer_that_hangs():
    with Kit("nccl@host", timeout_s=30.0) as kit:
        p, d = kit.pair()
        link = p.connect(d)
        Transfer(link, p, d, "warm", [0], [0]).run()
        kit.nccl.dead_after = kit.nccl.num_sends
        Transfer(link, p, d, "a", range(6), range(6)).expect().begin().send_all()
        started = time.monotonic()
        link.close()
        d.transport.close()
        assert time.monotonic() - started < 10
        assert not [t for t in threading.enumerate() if t.name.startswith("kv-nccl")]


def test_pieces_larger_than_the_staging_memory_are_cut(kit, monkeypatch):
    p, d = kit.pair()
    size = 5 * p.layout.layer_block_bytes
    assert size < STAGING_BYTES
    for module in ("nccl_sender", "nccl_receiver"):
        monkeypatch.setattr(f"pdrelay.transport.{module}.STAGING_BYTES", size)
    src, dst = [*range(12), 20, 22, 21], [*range(5, 20)]
    transfer = Transfer(p.connect(d), p, d, "a", src, dst)
    sent, _ = transfer.run()
    transfer.assert_moved()
    assert_canaries(d, dst)
    assert sent.num_pieces == p.layout.num_layers * (1 + 1 + 4)


def test_what_nobody_wants_is_received_and_dropped(kit):
    p, d = kit.pair()
    link = p.connect(d)
    gone = Transfer(link, p, d, "gone", range(6), range(6)).begin().send_all().finish()
    p.wait(Sent, "gone")
    after = Transfer(link, p, d, "after", range(6), range(6, 12))
    after.run()
    after.assert_moved()
    assert (d.pages.array[:, gone.dst] == CANARY).all()


def test_pages_that_are_not_due_end_the_link(kit):
    p, d = kit.pair()
    link = p.connect(d)
    transfer = Transfer(link, p, d, "a", range(6), range(6)).expect().begin()
    transfer.send(0)
    transfer.send(0)
    assert "closed" in p.wait(TransferFailed, "a").message
    assert "sent before" in d.wait(TransferFailed, "a").message


def test_the_error_without_a_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr("pdrelay.transport.nccl_library._bundled", lambda: [])
    monkeypatch.setattr("pdrelay.transport.nccl_library._SYSTEM", "libnccl-of-nobody.so")
    with pytest.raises(TransportError, match="--transport mapped or tcp"):
        load_nccl()


@no_gpu
def test_two_gpus_of_one_process():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL refuses one for both ranks")
    from test_cuda_ipc import LAYOUT

    from pdrelay.transport.checksum import checksum
    from pdrelay.transport.cuda.pages import CudaPages

    pages = [CudaPages.create(LAYOUT, ordinal) for ordinal in range(2)]
    pages[0].tensor.copy_(torch.randn(LAYOUT.shape))
    torch.cuda.synchronize(0)
    p, d = (
        create_transport("nccl", side, name, TransportOptions())
        for side, name in zip(pages, ("prefill-0", "decode-0"), strict=True)
    )
    descriptor = d.descriptor()
    fds = tuple(os.dup(fd) for fd in descriptor.fds)
    link = p.connect(LAYOUT, Descriptor(descriptor.data, fds))
    src, dst = [3, 4, 5, 17], [9, 8, 7, 30]
    d.expect("a", 0, dst, [bytes(32)] * 4)
    link.begin("a", [bytes(32)] * 4)
    for layer in range(LAYOUT.num_layers):
        link.send("a", layer, 0, src, dst)
    link.finish("a")
    news = wait_for(link.poll)
    assert isinstance(news, Sent), news
    d.commit("a", 4 * LAYOUT.num_layers)
    assert isinstance(wait_for(d.poll), Arrived)
    assert checksum(pages[0], src, "full") == checksum(pages[1], dst, "full")
    for part in (link, p, d, *pages):
        part.close()


def wait_for(poll):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for news in poll():
            return news
    raise AssertionError("no news")


def test_the_fake_waits_for_its_peer_as_nccl_does():
    fabric = HostFabric()
    device = HostDevice(fabric)
    pages = HostPages.create(Kit("nccl@host").side("x").layout, device)
    from pdrelay.transport.nccl_fake import FakeNccl

    nccl = FakeNccl()
    unique_id = nccl.unique_id()
    sender = nccl.join(unique_id, 0)
    assert not nccl.ready(sender)
    receiver = nccl.join(unique_id, 1)
    assert nccl.ready(sender) and nccl.ready(receiver)
    streams = [device.stream() for _ in range(2)]
    nccl.send(sender, [(pages.address, 16)], streams[0].handle)
    event = streams[0].record()
    assert not event.done()
    pages.array[0, 0, :16] = 7
    nccl.receive(receiver, [(pages.address + 64, 16)], streams[1].handle)
    assert event.done() and streams[1].record().done()
    assert (pages.array.ravel()[64:80] == 7).all()
    pages.close()
