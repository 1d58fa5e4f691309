"""Meet and Met: what a producer makes for a consumer before prompts come, and in which order."""

from __future__ import annotations

import queue
import socket
import threading

import pytest
from pd_harness import DEADLINE_S, FrontDoor, Instance, socket_path
from pd_transports import TRANSPORTS, TransportKit

from pdrelay.core.messages import Meet, Met
from pdrelay.engine import loop
from pdrelay.engine.fake_runner import expected_tokens

PIECES = 3


class Pieces:
    """Holds each piece of idle work until the test lets it go."""

    def __init__(self):
        self.reached = queue.SimpleQueue()
        self._go = threading.Semaphore(0)
        self.on_piece = lambda: None  # on the loop's thread

    def __call__(self):
        self.on_piece()
        self.reached.put(None)
        assert self._go.acquire(timeout=DEADLINE_S)

    def wait(self):
        """Until the next piece is about to run."""
        self.reached.get(timeout=DEADLINE_S)

    def go(self, number=1):
        self._go.release(number)


@pytest.fixture
def pieces():
    return Pieces()


@pytest.fixture
def kit(tmp_path):
    """The transport whose links name a pool, so that there is idle work with each."""
    with TransportKit("mapped@host", tmp_path) as kit:
        yield kit


def producer(kit, pieces):
    return Instance(
        "prefill-0", transport_factory=kit.factory, idle_pieces=PIECES, before_piece=pieces
    )


def consumer(kit, name="decode-0", incarnation=0):
    address = socket_path(kit.directory, f"{name}.{incarnation}.sock")
    return Instance(name, transport_factory=kit.factory, address=address), address


def read(door, instance):
    """What has been sent until now."""
    door._read(instance)
    return door.mets.get(instance.name, [])


def meet(door, prefill, name, address):
    """Introduce, and wait for the answer."""
    before = len(door.mets.get(prefill.name, []))
    prefill.control.send(Meet(name, address))
    door.pump(lambda: len(door.mets.get(prefill.name, [])) > before)
    assert door.mets[prefill.name][-1] == Met(name, address)


def test_met_is_said_when_all_pieces_are_done(kit, pieces):
    prefill, (decode, address) = producer(kit, pieces), consumer(kit)
    door = FrontDoor(prefill, decode)
    prefill.control.send(Meet(decode.name, address))
    for _ in range(PIECES):
        pieces.wait()
        assert read(door, prefill) == []
        pieces.go()
    door.pump(lambda: door.mets)
    assert door.mets == {"prefill-0": [Met("decode-0", address)]}
    assert prefill.runner.idle_pieces == 0
    door.drain()


def test_pieces_wait_for_quiet_only_after_a_prompt(kit, pieces, monkeypatch):
    waits = []  # how long the loop was ready to wait for news before each piece
    real = loop.wait_for_news

    def wait_for_news(sockets, timeout_s):
        if threading.current_thread().name == "prefill-0":
            waits.append(timeout_s)
        return real(sockets, timeout_s)

    monkeypatch.setattr(loop, "wait_for_news", wait_for_news)
    prefill, (decode, address) = producer(kit, pieces), consumer(kit)
    before = []
    pieces.on_piece = lambda: before.append(waits[-1])
    door = FrontDoor(prefill, decode)
    prefill.control.send(Meet(decode.name, address))
    pieces.wait()
    pieces.go()
    pieces.wait()
    door.relay(prefill, decode, address, door.request("a", list(range(20)), 3))
    pieces.go(PIECES)
    door.pump(lambda: door.mets)
    assert before == [0.0, 0.0, loop._QUIET_S]
    door.finish("a")
    door.drain()


def test_a_prompt_between_two_pieces_is_served_before_the_next(kit, pieces):
    prefill, (decode, address) = producer(kit, pieces), consumer(kit)
    steps = []  # read before each piece
    pieces.on_piece = lambda: steps.append(prefill.loop._stats.num_steps)
    door = FrontDoor(prefill, decode)
    prefill.control.send(Meet(decode.name, address))
    pieces.wait()
    door.relay(prefill, decode, address, door.request("a", list(range(20)), 5))  # two steps
    pieces.go()
    pieces.wait()
    door.pump(lambda: door.seen["a"].token_ids.get("prefill-0"))  # while the piece is held
    assert steps == [0, 2]
    assert not door.mets
    pieces.go(PIECES)
    door.pump(lambda: door.mets and door.seen["a"].done)
    assert door.seen["a"].tokens() == expected_tokens(range(20), 5)
    door.settle()
    door.drain()


def test_a_restarted_consumer_is_met_again(kit, pieces):
    pieces.go(2 * PIECES)
    prefill, (decode, address) = producer(kit, pieces), consumer(kit)
    door = FrontDoor(prefill, decode)
    meet(door, prefill, "decode-0", address)
    assert pieces.reached.qsize() == PIECES
    decode.stop()
    again, address = consumer(kit, incarnation=1)
    door.add(again)
    meet(door, prefill, "decode-0", address)
    assert pieces.reached.qsize() == 2 * PIECES
    door.relay(prefill, again, address, door.request("a", list(range(20)), 4))
    door.finish("a")
    door.settle()
    door.drain()


def test_one_met_each(kit, pieces):
    pieces.go(2 * PIECES)
    prefill = producer(kit, pieces)
    consumers = [consumer(kit, f"decode-{number}") for number in range(2)]
    door = FrontDoor(prefill, *(decode for decode, _ in consumers))
    for decode, address in consumers:
        prefill.control.send(Meet(decode.name, address))
    door.pump(lambda: len(door.mets.get("prefill-0", [])) == 2)
    expected = {Met(decode.name, address) for decode, address in consumers}
    assert set(door.mets["prefill-0"]) == expected
    door.drain()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_idle_work_they_meet_at_once(transport, tmp_path):
    with TransportKit(transport, tmp_path) as kit:
        prefill = Instance("prefill-0", transport_factory=kit.factory)
        decode, address = consumer(kit)
        door = FrontDoor(prefill, decode)
        meet(door, prefill, "decode-9", address + ".nowhere")  # nothing to wait for either
        meet(door, prefill, decode.name, address)
        door.drain()


def test_a_consumer_that_dies_before_its_hello_is_waited_for_no_longer(kit, pieces):
    prefill = producer(kit, pieces)
    door = FrontDoor(prefill)
    address = socket_path(kit.directory, "silent.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        prefill.control.send(Meet("decode-0", address))
        door.stats(prefill)
        door.stats(prefill)  # a turn is over
        assert not door.mets
    door.pump(lambda: door.mets)
    assert door.mets["prefill-0"] == [Met("decode-0", address)]
    door.drain()
