"""A real second process that is killed in the middle of a transfer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from transport_kit import Kit, Transfer, make_keys, open_fds

from pdrelay.errors import PdrelayError, TransportError
from pdrelay.transport.base import Arrived, Descriptor, Sent, TransferFailed
from pdrelay.transport.fds import recv_with_fds, send_with_fds

CONSUMER = """
import socket, sys
import msgspec
from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.fds import recv_with_fds, send_with_fds
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.registry import TransportOptions, create_transport
name = sys.argv[2]
peer = socket.socket(fileno=int(sys.argv[1]))
peer.settimeout(10)
layout = msgspec.msgpack.decode(recv_with_fds(peer)[0], type=KVLayout)
pages = SharedPages.create(layout)
transport = create_transport(name, pages, "decode-0", TransportOptions())
descriptor = transport.descriptor()
keys = [bytes([i]) * 32 for i in range(6)]
transport.expect("a", 0, list(range(6)), keys)
send_with_fds(peer, descriptor.data, descriptor.fds)
peer.recv(1)
"""

PRODUCER = """
import socket, sys
import msgspec
from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.base import Descriptor, Sent
from pdrelay.transport.fds import recv_with_fds, send_with_fds
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.registry import TransportOptions, create_transport
name = sys.argv[2]
peer = socket.socket(fileno=int(sys.argv[1]))
peer.settimeout(10)
layout = msgspec.msgpack.decode(recv_with_fds(peer)[0], type=KVLayout)
pages = SharedPages.create(layout)
pages.array[:] = 7
transport = create_transport(name, pages, "prefill-0", TransportOptions())
link = transport.connect(layout, Descriptor(*recv_with_fds(peer)))
keys = [bytes([i]) * 32 for i in range(6)]
# One whole transfer first: when it is Sent, the link surely stands.
link.begin("whole", keys)
for layer in range(layout.num_layers):
    link.send("whole", layer, 0, range(6), range(6, 12))
link.finish("whole")
link.begin("a", keys)
link.send("a", 0, 0, range(6), range(6))
while not any(isinstance(news, Sent) for news in link.poll()):
    pass
send_with_fds(peer, b"mid")
peer.recv(1)
"""


def helper_environment():
    """For a process that imports from this directory, too."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path}


class Other:
    """The other process, and our end of the socket to it."""

    def __init__(self, script, name, layout):
        self.peer, theirs = socket.socketpair()
        self.peer.settimeout(20)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script, str(theirs.fileno()), name],
                pass_fds=[theirs.fileno()],
                env=helper_environment(),
            )
        send_with_fds(self.peer, msgspec.msgpack.encode(layout))

    def kill(self):
        self.process.kill()
        self.process.wait(timeout=10)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()
        self.peer.close()


@pytest.mark.parametrize("name", ["mapped", "tcp"])
def test_a_killed_consumer(name):
    with Kit(name) as kit:
        p = kit.side("prefill-0", seed=1)
        before = open_fds()
        with Other(CONSUMER, name, p.layout) as consumer:
            data, fds = recv_with_fds(consumer.peer)
            link = p.transport.connect(p.layout, Descriptor(data, fds))
            p.links.append(link)
            link.begin("a", [bytes([i]) * 32 for i in range(6)])
            link.send("a", 0, 0, range(6), range(6))
            consumer.kill()
            if name == "tcp":
                assert "decode-0" in p.wait(TransferFailed, "a").message
                with pytest.raises(TransportError):
                    link.send("a", 1, 0, range(6), range(6))
            else:  # its memory stays as long as we map it
                for layer in (1, 2):
                    link.send("a", layer, 0, range(6), range(6))
                link.finish("a")
                p.wait(Sent, "a")
        link.close()
        assert open_fds() <= before


@pytest.mark.parametrize("name", ["mapped", "tcp"])
def test_a_killed_producer(name):
    with Kit(name) as kit:
        d = kit.side("decode-0")
        descriptor = d.transport.descriptor()
        keys = [bytes([i]) * 32 for i in range(6)]
        d.transport.expect("whole", 0, list(range(6, 12)), keys)
        d.transport.expect("a", 0, list(range(6)), keys)
        with Other(PRODUCER, name, d.layout) as producer:
            send_with_fds(producer.peer, descriptor.data, descriptor.fds)
            assert recv_with_fds(producer.peer) == (b"mid", ())
            producer.kill()
        if name == "tcp":  # whether or not its first piece came through
            d.transport.commit("a", 18)
            d.transport.abort("a")
        d.transport.abort("a")
        d.transport.commit("whole", 18)
        d.wait(Arrived, "whole")
        assert (d.pages.array[:, 6:12] == 7).all()
        assert (d.pages.array[:, 12:] == 0xA5).all()
        p = kit.side("prefill-1", seed=2)
        again = Transfer(p.connect(d), p, d, "b", range(6), range(6), keys=make_keys("b", 6))
        again.run()
        again.assert_moved()


def test_handshakes_carry_descriptors_and_close_none_of_ours():
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.settimeout(5)
    read, write = os.pipe()
    before = open_fds()
    send_with_fds(ours, b"x" * 10_000, (read, write))
    data, fds = recv_with_fds(theirs)
    assert data == b"x" * 10_000 and len(fds) == 2
    os.write(fds[1], b"hello")
    assert os.read(read, 5) == b"hello"
    for fd in fds:
        os.close(fd)
    assert open_fds() <= before
    for fd in (read, write):
        os.close(fd)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("sent", "close"),
    [
        (b"", True),
        (b"\x05\x00", True),
        (b"\x05\x00\x00\x00abc", True),
        (b"\xff\xff\xff\xff", False),
        (b"\x05\x00\x00\x00abc", False),
    ],
)
def test_broken_handshakes_leave_no_descriptor_open(sent, close):
    ours, theirs = socket.socketpair()
    theirs.settimeout(0.05)
    read, write = os.pipe()
    before = open_fds()
    if sent:
        socket.send_fds(ours, [sent], [read])
    if close:
        ours.shutdown(socket.SHUT_WR)
    with pytest.raises(PdrelayError):
        recv_with_fds(theirs)
    assert open_fds() <= before
    for fd in (read, write):
        os.close(fd)
    ours.close()
    theirs.close()


def test_a_peer_that_does_not_read_is_an_error():
    ours, theirs = socket.socketpair()
    ours.settimeout(0.05)
    with pytest.raises(TransportError):
        send_with_fds(ours, bytes(1 << 26))
    ours.close()
    theirs.close()
