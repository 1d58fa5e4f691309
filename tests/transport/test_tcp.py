"""Transport tcp: commits that overtake data, stalls, deaths, and hostile bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_kit import CANARY, DEADLINE_S, Kit, Transfer, assert_canaries, make_keys, make_layout

from pdrelay.errors import ConfigError, ProtocolError, TransportError
from pdrelay.transport.base import Arrived, Descriptor, Sent, TransferFailed
from pdrelay.transport.queued_link import MAX_QUEUED_PIECES
from pdrelay.transport.tcp import TcpTransport
from pdrelay.transport.tcp_wire import (
    GREETING_BYTES,
    HEADER_BYTES,
    MAGIC,
    Header,
    TcpDescriptor,
    decode_header,
    digest_of,
    encode_header,
)


@pytest.fixture
def kit():
    with Kit("tcp") as kit:
        yield kit


@pytest.fixture
def hasty():
    with Kit("tcp", timeout_s=0.3) as kit:
        yield kit


def peer_of(consumer):
    return msgspec.msgpack.decode(consumer.transport.descriptor().data, type=TcpDescriptor)


class RawProducer:
    """Speaks the protocol by hand, rightly or wrongly."""

    def __init__(self, consumer, *, greet=True):
        peer = peer_of(consumer)
        self.layout = consumer.layout
        self.sock = socket.create_connection((peer.host, peer.port), timeout=DEADLINE_S)
        if greet:
            self.sock.sendall(MAGIC + peer.token)

    def header(self, transfer_id, layer, first, count):
        self.sock.sendall(encode_header(Header(digest_of(transfer_id), layer, first, count)))

    def pages(self, count, value=1):
        self.sock.sendall(bytes([value]) * (count * self.layout.layer_block_bytes))

    def layer(self, transfer_id, layer, first, count, value=1):
        self.header(transfer_id, layer, first, count)
        self.pages(count, value)

    def end(self):
        """No more from us. The consumer may have reset the connection already."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def assert_dropped(self):
        """The consumer hangs up, whatever we sent."""
        with contextlib.suppress(ConnectionResetError):
            assert self.sock.recv(1) == b""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sock.close()


def expect(consumer, transfer_id, blocks, first=0):
    keys = make_keys(transfer_id, first + len(blocks))
    consumer.transport.expect(transfer_id, first, blocks, keys)


def test_a_commit_may_overtake_the_data(kit):
    d = kit.side("decode-0")
    expect(d, "a", [3, 1, 2])
    with RawProducer(d) as raw:
        raw.layer("a", 0, 0, 3)
        d.transport.commit("a", 9)
        assert d.news_of("a") == []
        raw.layer("a", 1, 0, 3)
        raw.header("a", 2, 0, 3)
        raw.pages(2)
        assert d.news_of("a") == []
        raw.pages(1)
        report = d.wait(Arrived, "a").report
    assert report.num_bytes == 9 * d.layout.layer_block_bytes
    assert (d.pages.array[:, [1, 2, 3]] == 1).all()
    assert_canaries(d, [1, 2, 3])


def test_a_producer_that_stops_mid_piece_fails_its_transfers_by_deadline(hasty):
    d = hasty.side("decode-0")
    expect(d, "a", [0, 1])
    expect(d, "other", [2])
    with RawProducer(d) as raw:
        raw.header("a", 0, 0, 2)
        raw.pages(1)
        failed = d.wait(TransferFailed, "a")
        assert "stopped" in failed.message
        raw.assert_dropped()
    assert d.news_of("other") == []


def test_a_commit_without_data_fails_by_deadline(hasty):
    d = hasty.side("decode-0")
    expect(d, "a", [0, 1])
    d.transport.commit("a", 6)
    assert "0 of 6 pages" in d.wait(TransferFailed, "a").message


def test_a_silent_stranger_is_dropped(hasty):
    d = hasty.side("decode-0")
    with RawProducer(d, greet=False) as raw:
        raw.assert_dropped()


def test_an_idle_producer_is_not_dropped(hasty):
    d = hasty.side("decode-0")
    expect(d, "a", [0])
    with RawProducer(d) as raw, RawProducer(d, greet=False) as stranger:
        stranger.assert_dropped()  # longer than the timeout has passed
        for layer in range(3):
            raw.layer("a", layer, 0, 1)
        d.transport.commit("a", 3)
        d.wait(Arrived, "a")


@pytest.mark.parametrize("all_pages", [False, True])
def test_a_lost_connection_fails_only_what_is_incomplete(kit, all_pages):
    d = kit.side("decode-0")
    expect(d, "a", [0, 1])
    with RawProducer(d) as raw:
        for layer in range(3 if all_pages else 2):
            raw.layer("a", layer, 0, 2)
    if all_pages:
        d.transport.commit("a", 6)
        d.wait(Arrived, "a")
    else:
        assert "lost" in d.wait(TransferFailed, "a").message
        d.transport.commit("a", 6)
        assert len(d.news_of("a")) == 1


class Sink:
    """A consumer that accepts and reads nothing."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.accepted = []

    def descriptor(self):
        port = self.listener.getsockname()[1]
        peer = TcpDescriptor("decode-0", "127.0.0.1", port, bytes(32))
        return Descriptor(msgspec.msgpack.encode(peer))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.listener.close()
        for sock in self.accepted:
            sock.close()


BIG = make_layout(num_blocks=64, block_size=4096)  # 256 KiB a layer of a block


def link_to(kit, sink, layout=BIG):
    p = kit.side("prefill-0", layout, seed=None)
    link = p.transport.connect(layout, sink.descriptor())
    p.links.append(link)
    return p, link


def test_a_stalled_consumer_fails_the_transfer_by_deadline(hasty):
    with Sink() as sink:
        p, link = link_to(hasty, sink)
        link.begin("a", make_keys("a", 64))
        for layer in range(3):
            link.send("a", layer, 0, range(64), range(64))  # 48 MiB: no socket buffer holds them
        link.finish("a")
        assert "took no data" in p.wait(TransferFailed, "a").message
        with pytest.raises(TransportError):
            link.begin("b", make_keys("b", 1))


def send_for_ever(link):
    for _ in range(2 * MAX_QUEUED_PIECES):
        link.send("a", 0, 0, [0], [0])


def test_a_stalled_consumer_never_blocks_the_engine(kit):
    with Sink() as sink:
        p, link = link_to(kit, sink)
        link.begin("a", make_keys("a", 64))
        with pytest.raises(TransportError, match="behind"):
            send_for_ever(link)
        link.abort("a")
        assert p.news_of("a") == []
        link.close()  # with a full socket: does not wait for it


def test_a_consumer_that_hangs_up_is_noticed_without_sending(kit):
    with Sink() as sink:
        p, link = link_to(kit, sink)
        link.begin("a", make_keys("a", 1))
        sock, _ = sink.listener.accept()
        assert len(sock.recv(GREETING_BYTES, socket.MSG_WAITALL)) == GREETING_BYTES
        sock.close()
        assert "closed" in p.wait(TransferFailed, "a").message


def test_nobody_listens(kit):
    with Sink() as sink:
        descriptor = sink.descriptor()
    p = kit.side("prefill-0", seed=1)
    link = p.transport.connect(p.layout, descriptor)
    p.links.append(link)
    try:
        link.begin("a", make_keys("a", 1))
    except TransportError as error:
        message = str(error)
    else:
        message = p.wait(TransferFailed, "a").message
    assert "refused" in message


def test_a_source_page_is_not_read_after_sent(kit):
    p, d = kit.pair(p=BIG, d=BIG)
    transfer = Transfer(p.connect(d), p, d, "a", range(16), range(16))
    expected = p.pages.array[:, :16].copy()
    transfer.expect().begin().send_all().finish()
    p.wait(Sent, "a")
    p.pages.array[:] = 0
    transfer.commit()
    d.wait(Arrived, "a")
    assert np.array_equal(d.pages.array[:, :16], expected)


def test_the_rest_of_a_piece_is_discarded_after_abort(kit):
    """The blocks are reused at once, while the piece is still arriving."""
    d = kit.side("decode-0")
    expect(d, "a", [0, 1])
    expect(d, "fence", [5])
    with RawProducer(d) as raw:
        raw.header("a", 0, 0, 2)
        raw.pages(1)
        wait_for_pages(d, 0, [0], 1)
        d.transport.abort("a")
        d.pages.array[:, :2] = 77
        raw.pages(1)
        raw.layer("a", 1, 0, 2)
        for layer in range(3):
            raw.layer("fence", layer, 0, 1)
        d.transport.commit("fence", 3)
        d.wait(Arrived, "fence")
    assert (d.pages.array[:, :2] == 77).all()
    assert d.news_of("a") == []


def wait_for_pages(side, layer, blocks, value):
    """The pages are the only sign of what has arrived so far."""
    end = time.monotonic() + DEADLINE_S
    while not (side.pages.array[layer, blocks] == value).all():
        assert time.monotonic() < end
        time.sleep(0.001)


# ---- hostile bytes


def still_serves(kit, d):
    p = kit.side(f"prefill-{random.randrange(10**9)}", seed=3)
    transfer = Transfer(p.connect(d), p, d, f"good-{p.name}", [0, 1], [20, 21])
    transfer.run()
    transfer.assert_moved()
    assert_canaries(d, transfer.dst)
    d.pages.array[:] = CANARY


def test_a_wrong_token_gets_nothing(kit):
    d = kit.side("decode-0")
    expect(d, "a", [0, 1])
    right = MAGIC + peer_of(d).token
    wrong = [
        MAGIC + bytes(32),
        right[:-1] + bytes([right[-1] ^ 1]),
        b"pdrelay\x02" + right[len(MAGIC) :],
    ]
    for greeting in wrong:
        with RawProducer(d, greet=False) as raw:
            raw.sock.sendall(greeting)
            raw.assert_dropped()
    assert d.news_of("a") == []
    still_serves(kit, d)


def bad_frames(layout):
    huge = 2**32 - 1
    good = Header(digest_of("a"), 0, 2, 3)
    replace = lambda **changes: encode_header(Header(**{**vars(good), **changes}))  # noqa: E731
    return {
        "mark": b"XXXX" + encode_header(good)[4:],
        "layer": replace(layer=layout.num_layers),
        "huge-layer": replace(layer=huge),
        "no-blocks": replace(num_blocks=0),
        "huge-count": replace(num_blocks=huge),
        "too-many": replace(num_blocks=4),
        "before": replace(first_block=1),
        "behind": replace(first_block=3),
        "huge-first": replace(first_block=huge),
        "wrapping": replace(first_block=huge, num_blocks=2),
    }


@pytest.mark.parametrize("what", list(bad_frames(make_layout())))
def test_bad_frames_end_the_connection_and_write_nothing(kit, what):
    d = kit.side("decode-0")
    expect(d, "a", [0, 1, 2], first=2)
    with RawProducer(d) as raw:
        raw.sock.sendall(bad_frames(d.layout)[what])
        raw.assert_dropped()
    assert_canaries(d)
    assert d.news_of("a") == []  # no page of it came: only its own producer can tell
    still_serves(kit, d)


def test_pages_sent_twice_end_the_connection_and_the_transfer(kit):
    d = kit.side("decode-0")
    expect(d, "a", [0, 1])
    with RawProducer(d) as raw:
        raw.layer("a", 0, 0, 2)
        raw.layer("a", 0, 1, 1, value=9)
        raw.assert_dropped()
    assert "sent before" in d.wait(TransferFailed, "a").message
    assert not (d.pages.array == 9).any()


def test_another_producers_transfer_is_not_to_be_touched(kit):
    d = kit.side("decode-0")
    expect(d, "a", [0, 1])
    with RawProducer(d) as first, RawProducer(d) as second:
        first.layer("a", 0, 0, 2)
        wait_for_pages(d, 0, [0, 1], 1)
        second.layer("a", 1, 0, 2, value=9)
        second.assert_dropped()
        first.layer("a", 1, 0, 2)
        first.layer("a", 2, 0, 2)
        d.transport.commit("a", 6)
        d.wait(Arrived, "a")
    assert (d.pages.array[:, :2] == 1).all()


def test_pages_of_unknown_transfers_are_discarded(kit):
    d = kit.side("decode-0")
    expect(d, "a", [0])
    with RawProducer(d) as raw:
        raw.layer("unknown", 1, 17, 24, value=9)
        for layer in range(3):
            raw.layer("a", layer, 0, 1)
        d.transport.commit("a", 3)
        d.wait(Arrived, "a")
    assert_canaries(d, [0])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=400), greet=st.booleans())
def test_random_bytes_never_crash_or_write(kit, data, greet):
    if not kit._sides:
        expect(kit.side("decode-0"), "a", [0, 1, 2])
    d = kit._sides[0]
    with RawProducer(d, greet=greet) as raw:
        raw.sock.sendall(data)
        raw.end()
        raw.assert_dropped()
    assert (d.pages.array == CANARY).all()
    assert d.news_of("a") == []


def test_bytes_one_by_one(kit):
    d = kit.side("decode-0", make_layout(num_blocks=4, block_size=1))
    expect(d, "a", [3, 1])
    with RawProducer(d, greet=False) as raw:
        raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = MAGIC + peer_of(d).token
        for layer in range(3):
            stream += encode_header(Header(digest_of("a"), layer, 0, 2))
            stream += bytes([layer + 1]) * (2 * d.layout.layer_block_bytes)
        for i in range(len(stream)):
            raw.sock.send(stream[i : i + 1])
        d.transport.commit("a", 6)
        d.wait(Arrived, "a")
    for layer in range(3):
        assert (d.pages.array[layer, [1, 3]] == layer + 1).all()
    assert_canaries(d, [1, 3])


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_headers_decode_to_something_that_fits_or_not_at_all(data):
    layout = make_layout()
    try:
        header = decode_header(b"KVpg" + data[4:], layout)
    except ProtocolError:
        return
    assert header.layer < layout.num_layers and 1 <= header.num_blocks <= layout.num_blocks


@given(st.integers(0, 2), st.integers(0, 2**32 - 1), st.integers(1, 24), st.binary(min_size=1))
def test_headers_round_trip(layer, first, count, name):
    header = Header(digest_of(name.hex()), layer, first, count)
    assert decode_header(encode_header(header), make_layout()) == header


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_wildcard_addresses_are_refused(kit, host):
    d = kit.side("decode-0")
    with pytest.raises(ConfigError, match="name one interface"):
        TcpTransport(d.pages, "decode-1", host=host)


def test_an_address_of_another_host_is_refused(kit):
    d = kit.side("decode-0")
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    transport = TcpTransport(d.pages, "decode-1", host="192.0.2.1")
    with pytest.raises(TransportError, match=r"192\.0\.2\.1"):
        transport.descriptor()
    transport.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_bad_ports_are_refused(kit, port):
    p = kit.side("prefill-0", seed=1)
    data = {"type": "tcp", "instance": "d", "host": "127.0.0.1", "port": port, "token": bytes(32)}
    with pytest.raises(TransportError):
        p.transport.connect(p.layout, Descriptor(msgspec.msgpack.encode(data)))


def test_a_random_token_each_time(kit):
    tokens = {peer_of(kit.side(f"decode-{i}")).token for i in range(4)}
    assert len(tokens) == 4 and all(len(token) == 32 for token in tokens)
    assert struct.calcsize("<4s16sIII") == HEADER_BYTES
