from __future__ import annotations

import gc
import os
import socket

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from pdrelay.core.channel import Channel
from pdrelay.core.events import Event, EventKind
from pdrelay.core.framing import MAX_FRAME_BYTES, FrameCodec
from pdrelay.core.messages import Abort, EngineRequest, Ping, Submit, ToWorker
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import pack_ids
from pdrelay.errors import ProtocolError


@given(st.lists(st.integers(0, 2**31), max_size=8), st.data())
def test_any_cut_of_the_stream_gives_the_same_messages(nonces, data):
    codec = FrameCodec(ToWorker)
    stream = b"".join(codec.encode(Ping(n)) for n in nonces)
    received = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        received += codec.feed(stream[:cut])
        stream = stream[cut:]
    assert [m.nonce for m in received] == nonces


@pytest.mark.parametrize(
    "frame",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little") + b"x",
        b"\x03\x00\x00\x00abc",
        b"\x01\x00\x00\x00\xc0",
    ],
)
def test_hostile_frames_are_protocol_errors(frame):
    with pytest.raises(ProtocolError):
        FrameCodec(ToWorker).feed(frame)


def submit(ids):
    params = SamplingParams(max_tokens=1, seed=0)
    return Submit(EngineRequest(request_id="a", prompt_token_ids=ids, params=params, arrived_ns=0))


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_travel_as_bytes(ids):
    codec = FrameCodec(ToWorker)
    message = submit(pack_ids(ids))
    frame = codec.encode(message)
    assert b"".join(i.to_bytes(4, "little") for i in ids) in frame
    (received,) = codec.feed(frame)
    assert received == message
    got = received.request.prompt_token_ids
    assert got.typecode == "I" and got.tolist() == ids
    got.append(7)  # a receiver's own


@pytest.mark.parametrize("ids", [b"abc", b"abcde", [1, 2], "abcd", None, 5])
def test_anything_but_whole_token_ids_is_a_protocol_error(ids):
    body = msgspec.msgpack.encode(submit(ids))
    frame = len(body).to_bytes(4, "little") + body
    with pytest.raises(ProtocolError, match="undecodable"):
        FrameCodec(ToWorker).feed(frame)


@pytest.mark.parametrize("value", [object(), 1j])
def test_nothing_else_becomes_bytes(value):
    with pytest.raises(NotImplementedError, match="cannot be sent"):
        FrameCodec(ToWorker).encode(value)


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_outside_uint32_do_not_pack(bad):
    with pytest.raises(OverflowError):
        pack_ids([bad])


def channel_pair():
    left, right = socket.socketpair()
    return Channel(left, ToWorker), Channel(right, ToWorker)


def test_channel_carries_more_than_the_socket_holds():
    left, right = channel_pair()
    sent = [Abort("x" * 200_000, str(i)) for i in range(200)]
    received = []
    for message in sent:
        left.send(message)
    assert left.has_pending
    while len(received) < len(sent):
        left.flush()
        received += right.receive()
    assert received == sent
    assert not left.has_pending


def test_channel_sees_the_other_end_close():
    left, right = channel_pair()
    left.send(Ping(7))
    left.close()
    assert right.receive() == [Ping(7)]
    right.receive()
    assert right.closed
    right.send(Ping(8))


def test_channel_passes_descriptors():
    left, right = channel_pair()
    read_end, write_end = os.pipe()
    left.send(Ping(1), (write_end,))
    os.close(write_end)
    assert right.receive() == [Ping(1)]
    (received,) = right.received_fds
    os.write(received, b"hello")
    assert os.read(read_end, 5) == b"hello"
    os.close(received)
    os.close(read_end)


def test_the_collector_does_not_know_of_events():
    """There is one a token: hundreds of thousands may be alive."""
    event = Event(EventKind.TOKEN, 1, "decode-0", detail="x")
    assert not gc.is_tracked(event)
    assert not gc.is_tracked(msgspec.json.decode(msgspec.json.encode(event), type=Event))
