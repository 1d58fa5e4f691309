"""Transport nccl of the connector: producer, its thread and consumers over a fake NCCL."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
import time
from functools import partial

import numpy as np
import pytest
from device_memory import SPLIT, TOGETHER, DeviceMemory
from hand_over_kit import BLOCK_SIZE, LAYERS, Kit, prompt_of

from pdrelay.core.channel import Channel
from pdrelay.core.clock import monotonic_ns
from pdrelay.errors import TransportError
from pdrelay.integrations.vllm import staging
from pdrelay.integrations.vllm.nccl_pages import NcclKVPages
from pdrelay.integrations.vllm.nccl_wire import NcclMessage, Part, Put
from pdrelay.integrations.vllm.nccl_writer import cut
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.integrations.vllm.pages import Move
from pdrelay.integrations.vllm.service import ProducerService
from pdrelay.integrations.vllm.step import Chunk, StepPlan, prompt_digest
from pdrelay.transport.host_device import HostDevice, HostFabric
from pdrelay.transport.nccl_end import NcclEnd
from pdrelay.transport.nccl_fake import FakeNccl

PROMPT = prompt_of(1, 14)
P_BLOCKS, D_BLOCKS = [9, 3, 4, 20], [60, 61, 50, 7]
DEADLINE_S = 20.0
CANARY = 0xA5


class Rank(DeviceMemory):
    """`devices`: those that its threads have made."""

    def __init__(self, fabric, num_blocks, form, nccl, name, *, manual=False, timeout_s=DEADLINE_S):
        super().__init__(fabric, num_blocks, form, manual=manual, name=name)
        self.devices: list[HostDevice] = []
        self._fabric = fabric

        self.pages = NcclKVPages(
            self.layout,
            self.device,
            [self.memory.address],
            nccl,
            self.make_device,
            timeout_s=timeout_s,
        )

    def make_device(self) -> HostDevice:
        self.devices.append(HostDevice(self._fabric, self.device.name))
        return self.devices[-1]

    def run(self) -> None:
        """Let the device do what was launched."""
        for device in (self.device, *self.devices):
            device.run()


class NcclKit(Kit):
    """A producer with its thread, and one consumer."""

    def __init__(self, directory, form=SPLIT, *, manual=False, timeout_s=DEADLINE_S) -> None:
        fabric = HostFabric()
        self.nccl = FakeNccl()
        self.p = Rank(fabric, 40, form, self.nccl, "host:0", manual=manual, timeout_s=timeout_s)
        self.d = Rank(fabric, 80, form, self.nccl, "host:1", timeout_s=timeout_s)
        self.d.array[:] = CANARY
        super().__init__(directory)
        self.producer.close()
        self.producer = self.new_producer(pages=self.p.pages, clock=monotonic_ns)
        self.service = ProducerService(self.producer, monotonic_ns)
        self.new_consumer(pages=self.d.pages, clock=monotonic_ns)

    def step(self, chunks: list[Chunk], values: dict[str, int]) -> None:
        """P computes what `page_value` says."""
        self.service.begin_step(StepPlan(chunks=chunks))
        for layer in range(LAYERS):
            for chunk in chunks:
                value = values[chunk.request_id]
                self.p.device.launch(partial(self._fill, layer, chunk.blocks, value))
            self.service.layer_written(layer)
        self.service.end_step()

    def _fill(self, layer: int, blocks: list[int], value: int) -> None:
        for i, block in enumerate(blocks):
            self.p.write(layer, [block], page_value(value, layer, i))

    def compute(self, blocks=P_BLOCKS, value=5, *, request_id="r", prompt=PROMPT) -> None:
        digest = prompt_digest(prompt)
        chunk = Chunk(request_id, f"T-{request_id}", len(prompt), digest, blocks, len(prompt))
        self.step([chunk], {request_id: value})

    def arrived_values(self, value: int, blocks: list[int]) -> bool:
        return all(
            (self.d.blocks(layer, [block]) == page_value(value, layer, i)).all()
            for layer in range(LAYERS)
            for i, block in enumerate(blocks)
        )

    def wait_for(self, *request_ids: str) -> set[int]:
        """Until the consumer has said of all that they ended; returns the failed blocks."""
        consumer, missing, failed = self.consumers[0], set(request_ids), set()
        end = time.monotonic() + DEADLINE_S
        while True:
            consumer.poll()
            missing -= consumer.take_finished()
            failed |= consumer.take_failed_blocks()
            if not missing:
                return failed
            assert time.monotonic() < end, f"no end of {missing}"
            sources = [source.channel for source in consumer._sources.values()]
            select.select(sources, [], [], 0.5)

    def until(self, condition) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end
            self.p.run()

    def close(self) -> None:
        for consumer in self.consumers:
            consumer.close()
        self.until(lambda: not threads("pdrelay-nccl-take"))
        self.p.run()
        self.service.close()
        for rank in (self.p, self.d):
            rank.pages.close()
        super().close()


def page_value(value: int, layer: int, i: int) -> int:
    """The bytes of prompt block i of a request."""
    return (value + 7 * layer + 31 * i) % 251


def threads(prefix: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]


@pytest.fixture(params=[SPLIT, TOGETHER])
def kit(tmp_path, request):
    built = NcclKit(tmp_path, request.param)
    yield built
    built.close()
    assert not threads("pdrelay-nccl")
    assert not threads("kv-nccl-wait")


@pytest.mark.parametrize("batch_bytes", [0, 2 << 20])
@pytest.mark.parametrize("announced", ["early", "late"])
def test_pages_arrive(kit, announced, batch_bytes):
    kit.p.pages.batch_bytes = batch_bytes
    if announced == "early":
        kit.load("r", PROMPT, D_BLOCKS)
    kit.compute()
    if announced == "late":
        kit.load("r", PROMPT, D_BLOCKS)
    assert kit.wait_for("r") == set()
    assert kit.arrived_values(5, D_BLOCKS)
    others = np.delete(np.arange(80), D_BLOCKS).tolist()
    assert all((kit.d.blocks(layer, others) == CANARY).all() for layer in range(LAYERS))
    assert kit.consumers[0].stats.take()["num_bytes"] == 4 * kit.p.layout.block_bytes


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_in_small_sends(kit, monkeypatch, seed):
    """Several prompts a step, in chunks, announced at any time, a few pages a send."""
    rng = random.Random(seed)
    one_by_one = [(), (40, 80), (40,), (80,)][seed]  # whose pages lie in no grid
    page_grid = staging.page_grid
    monkeypatch.setattr(
        staging,
        "page_grid",
        lambda layout, at: None if layout.num_blocks in one_by_one else page_grid(layout, at),
    )
    largest = kit.p.layout.layers[0].block_bytes
    monkeypatch.setattr(staging, "STAGING_BYTES", largest * rng.choice([1, 2, 3, 100]))
    kit.p.pages.batch_bytes = rng.choice([0, 3 * largest, 1 << 30])
    p_free = rng.sample(range(40), 40)
    d_free = rng.sample(range(80), 80)
    prompts, plans, expected = {}, [], {}
    for i in range(5):
        name, prompt = f"r{i}", prompt_of(i, rng.randrange(1, 24))
        count = -(-len(prompt) // BLOCK_SIZE)
        prompts[name] = prompt, [p_free.pop() for _ in range(count)]
        expected[name] = 10 * i + 1, [d_free.pop() for _ in range(count)]
        stops = sorted({len(prompt), *rng.sample(range(1, len(prompt) + 1), min(2, len(prompt)))})
        plans.append([(name, stop) for stop in stops])
    late = set(rng.sample(list(prompts), 2))
    for name in prompts.keys() - late:
        kit.load(name, prompts[name][0], expected[name][1])
    while any(plans):
        due = [plan.pop(0) for plan in plans if plan and rng.random() < 0.7]
        chunks = [
            Chunk(
                name,
                f"T-{name}",
                len(prompts[name][0]),
                prompt_digest(prompts[name][0]),
                prompts[name][1][: -(-stop // BLOCK_SIZE)],
                stop,
            )
            for name, stop in due
        ]
        if chunks:
            kit.step(chunks, {name: value for name, (value, _) in expected.items()})
    for name in late:
        kit.load(name, prompts[name][0], expected[name][1])
    assert kit.wait_for(*prompts) == set()
    assert all(kit.arrived_values(value, blocks) for value, blocks in expected.values())


def test_sends_wait_for_the_kernels_that_write_their_pages(tmp_path):
    kit = NcclKit(tmp_path, manual=True)
    kit.load("r", PROMPT, D_BLOCKS)
    kit.compute()
    while not (kit.p.devices and kit.p.devices[0].num_copies):
        select.select([], [], [], 0.001)
    consumer = kit.consumers[0]
    consumer.poll()
    assert consumer.num_loading == 1
    assert (kit.d.array == CANARY).all()
    kit.until(lambda: (consumer.poll(), consumer.num_loading == 0)[1])
    assert kit.arrived_values(5, D_BLOCKS)
    kit.close()


def test_a_cancelled_load_ends_behind_what_was_sent(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.compute()
    kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))
    assert kit.wait_for("r") == set()
    placed = kit.d.array.copy()
    kit.load("s", prompt_of(2, 4), [11])
    kit.compute([17], 70, request_id="s", prompt=prompt_of(2, 4))
    assert kit.wait_for("s") == set()
    for layer in range(LAYERS):
        kit.d.write(layer, [11], CANARY)
    assert (kit.d.array == placed).all()


def test_a_link_that_breaks_fails_its_loads_and_the_next_one_is_new(tmp_path):
    """The writer's send is lost: both ends give up at their deadlines, in whatever order."""
    kit = NcclKit(tmp_path, timeout_s=0.3)
    kit.load("warm", PROMPT, D_BLOCKS)
    kit.compute(request_id="warm")
    assert kit.wait_for("warm") == set()
    kit.nccl.dead_after = kit.nccl.num_sends
    kit.load("r", PROMPT, [1, 2, 3, 4])
    kit.compute()
    assert kit.wait_for("r") == {1, 2, 3, 4}
    kit.service.begin_step(StepPlan(held=["r"]))
    assert kit.service.take_finished() == {"r"}
    kit.nccl.dead_after = None
    kit.load("s", PROMPT, [5, 6, 8, 9])
    kit.compute(value=40, request_id="s")
    assert kit.wait_for("s") == set()
    assert kit.arrived_values(40, [5, 6, 8, 9])
    kit.close()


def test_a_consumer_that_ends_lets_the_producer_go(kit):
    kit.load("warm", PROMPT, D_BLOCKS)
    kit.compute(request_id="warm")
    kit.wait_for("warm")
    kit.nccl.dead_after = kit.nccl.num_sends
    kit.load("r", PROMPT, [1, 2, 3, 4])
    kit.compute()
    kit.service.begin_step(StepPlan(held=["r"]))
    started = time.monotonic()
    kit.consumers[0].close()
    freed = set()
    kit.until(lambda: freed.update(kit.service.take_finished()) or "r" in freed)
    assert time.monotonic() - started < DEADLINE_S / 2  # at once, not at the deadline


def test_nothing_is_placed_for_a_producer_that_is_gone(kit):
    """What was received meanwhile is dropped: the blocks are somebody else's."""
    kit.load("warm", PROMPT, D_BLOCKS)
    kit.compute(request_id="warm")
    kit.wait_for("warm")
    (source,) = kit.consumers[0]._sources.values()
    taker, before = source.offer, kit.d.array.copy()
    with taker._lock:  # the taker stands before the pages
        kit.load("r", PROMPT, [1, 2, 3, 4])
        kit.compute()
        kit.until(lambda: kit.nccl.num_sends > 1)
        taker._closed = True
    kit.service.close()
    assert kit.wait_for("r") == {1, 2, 3, 4}
    assert (kit.d.array == before).all()


def test_one_gpu_for_both_is_refused_in_clear_words(kit):
    kit.p.device.uuid = kit.d.device.uuid
    kit.load("r", PROMPT, D_BLOCKS)
    kit.compute()
    assert kit.wait_for("r") == set(D_BLOCKS)
    ours, theirs = socket.socketpair()
    offer = kit.d.pages.offer()
    with pytest.raises(TransportError, match="two ranks on one GPU"):
        kit.p.pages.open(kit.d.layout, offer.handles, (theirs.detach(),))
    assert ours.recv(1) == b""  # the descriptor was closed
    ours.close()
    offer.close()


@pytest.mark.parametrize("handles", [[], [b"?"], [b"\x81\xa4type\xa4nccl"], [b"a", b"b"]])
def test_damaged_handles_are_refused(kit, handles):
    with pytest.raises(TransportError):
        kit.p.pages.open(kit.d.layout, handles, (os.open("/dev/null", os.O_RDONLY),))


@pytest.mark.parametrize(
    "parts",
    [[Part(LAYERS, [0])], [Part(0, [80])], [], [Part(0, [0] * 1_000_000)]],
    ids=["layer", "block", "nothing", "too much"],
)
def test_pages_that_do_not_exist_end_the_link(kit, parts):
    offer = kit.d.pages.offer()
    channel: Channel[NcclMessage] = Channel(socket.socket(fileno=os.dup(offer.fds[0])), NcclMessage)
    offer.passed_on()
    end = NcclEnd(kit.nccl, channel, DEADLINE_S, monotonic_ns)
    end.greet()
    end.say(Put(parts))
    select.select([channel], [], [], DEADLINE_S)
    assert channel.receive() == [] and channel.closed
    end.close()
    offer.close()
    assert (kit.d.array == CANARY).all()


def test_a_consumer_that_never_places_is_given_up(tmp_path):
    kit = NcclKit(tmp_path, timeout_s=0.3)
    offer = kit.d.pages.offer()
    ours, theirs = socket.socketpair()
    writer = kit.p.pages.open(kit.d.layout, offer.handles, (theirs.detach(),))
    channel: Channel[NcclMessage] = Channel(ours, NcclMessage)
    end = NcclEnd(kit.nccl, channel, DEADLINE_S, monotonic_ns)
    end.answer(end.hear_join())
    kit.p.pages.kv_written()
    writer.write([Move(0, [1], [2])])
    size = kit.d.layout.layers[0].block_bytes
    stream, memory = kit.d.device.stream(), np.zeros(size, np.uint8)
    end.receive([(memory.ctypes.data, size)], stream.handle)
    fence = writer.fence()
    fence.wait()
    with pytest.raises(TransportError, match="silent"):
        fence.done()
    with pytest.raises(TransportError, match="silent"):
        writer.write([Move(0, [1], [2])])
    kit.p.pages.before_overwrite()  # waits for nobody
    end.close()
    offer.close()
    kit.close()


def test_moves_are_cut_to_what_is_sent_in_one_go(kit, monkeypatch):
    layout: PageLayout = kit.p.layout
    size = layout.layers[0].block_bytes
    monkeypatch.setattr(staging, "STAGING_BYTES", 3 * size)
    moves = [Move(0, [1, 2, 3, 4], [5, 6, 7, 8]), Move(2, [9], [10]), Move(1, [0, 1], [2, 3])]
    batches = list(cut(layout, moves))
    assert [sum(len(m.src_blocks) for m in batch) for batch in batches] == [3, 3, 1]
    assert pages_of([m for batch in batches for m in batch]) == pages_of(moves)


def pages_of(moves: list[Move]) -> list[tuple[int, int, int]]:
    return [
        (move.layer, src, dst)
        for move in moves
        for src, dst in zip(move.src_blocks, move.dst_blocks, strict=True)
    ]
