"""The real client over a socket pair, against a scripted worker."""

from __future__ import annotations

import asyncio
import socket

import pytest
from router_harness import until

from pdrelay.core.channel import Channel
from pdrelay.core.messages import (
    EngineRequest,
    Fatal,
    Output,
    Ping,
    Pong,
    Ready,
    Role,
    StepResult,
    Submit,
    ToWorker,
    WorkerStats,
)
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import pack_ids
from pdrelay.errors import WorkerLostError
from pdrelay.router.bridge import Bridge
from pdrelay.router.engine_client import StreamEngineClient
from pdrelay.router.fakes.native import FakeEngine


class Recorder:
    def __init__(self) -> None:
        self.steps: list[tuple[str, StepResult]] = []
        self.lost: list[tuple[str, str]] = []
        self.ready: list[str] = []

    def on_step(self, instance: str, result: StepResult) -> None:
        self.steps.append((instance, result))

    def on_lost(self, instance: str, reason: str) -> None:
        self.lost.append((instance, reason))

    def on_ready(self, instance: str) -> None:
        self.ready.append(instance)


class Supervised:
    instance = "r"

    def __init__(self) -> None:
        self.reports: list[object] = []

    def report_ready(self, ready: Ready) -> None:
        self.reports.append(ready)

    def report_alive(self) -> None:
        self.reports.append("alive")

    def report_fatal(self, message: str) -> None:
        self.reports.append(message)

    def report_closed(self) -> None:
        self.reports.append("closed")


class Rig:
    """A client whose worker is the test."""

    def __init__(self, **options) -> None:
        self.client = StreamEngineClient("r", Role.BOTH, **options)
        self.recorder = Recorder()
        self.client.attach(self.recorder)
        self.supervised = Supervised()
        self.worker = self.connect()

    def connect(self) -> Channel[ToWorker]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        Bridge([self.client]).on_started(self.supervised, ours)
        return Channel(theirs, ToWorker)

    async def received(self, kind: type) -> list:
        found: list = []

        def look() -> bool:
            self.worker.flush()
            found.extend(m for m in self.worker.receive() if isinstance(m, kind))
            return bool(found)

        await until(look)
        return found

    def say_ready(self) -> None:
        self.worker.send(FakeEngine("r").ready())


@pytest.fixture
async def rig():
    made = Rig(ping_interval_s=0.01, answer_timeout_s=0.2)
    yield made
    made.client.close()
    made.worker.close()


def submit(size: int = 3) -> Submit:
    return Submit(
        EngineRequest(
            request_id="x",
            prompt_token_ids=pack_ids(range(size)),
            params=SamplingParams(max_tokens=1, seed=0),
            arrived_ns=0,
        )
    )


async def test_ready_steps_pings(rig) -> None:
    assert not rig.client.alive and rig.client.reason == "is starting"
    with pytest.raises(WorkerLostError, match="is starting"):
        rig.client.send(submit())
    rig.say_ready()
    await until(lambda: rig.client.alive)
    assert rig.recorder.ready == ["r"] and rig.supervised.reports[0] is rig.client.ready
    rig.client.send(submit())
    assert (await rig.received(Submit)) == [submit()]
    rig.worker.send(StepResult(t_ns=5, outputs=[Output(request_id="x", token_ids=[1])]))
    await until(lambda: rig.recorder.steps)
    assert rig.recorder.steps[0][1].outputs[0].token_ids == [1]
    (ping, *_) = await rig.received(Ping)
    rig.worker.send(Pong(ping.nonce, WorkerStats(num_running=7)))
    await until(lambda: rig.client.stats.num_running == 7)
    assert "alive" in rig.supervised.reports


async def test_death_is_seen_at_once_with_the_last_words(rig) -> None:
    rig.say_ready()
    await until(lambda: rig.client.alive)
    rig.worker.send(StepResult(t_ns=5, outputs=[Output(request_id="x", token_ids=[1])]))
    rig.worker.send(Fatal("out of memory: lower --kv-cache-memory"))
    rig.worker.close()
    await until(lambda: rig.recorder.lost)
    assert rig.recorder.lost == [("r", "out of memory: lower --kv-cache-memory")]
    assert len(rig.recorder.steps) == 1, "what was sent before the end still counts"
    assert rig.supervised.reports[-2:] == ["out of memory: lower --kv-cache-memory", "closed"]
    with pytest.raises(WorkerLostError, match="out of memory"):
        rig.client.send(submit())


async def test_a_new_incarnation_takes_over(rig) -> None:
    rig.say_ready()
    await until(lambda: rig.client.alive)
    rig.worker.close()
    await until(lambda: not rig.client.alive)
    rig.worker = rig.connect()
    assert not rig.client.alive
    rig.say_ready()
    await until(lambda: rig.client.alive)
    assert rig.recorder.ready == ["r", "r"] and len(rig.recorder.lost) == 1


async def test_silence_makes_it_sick_but_not_lost(rig) -> None:
    rig.say_ready()
    await until(lambda: rig.client.alive)
    await until(lambda: not rig.client.alive)
    assert "has not answered" in rig.client.reason and rig.recorder.lost == []
    (ping, *_) = await rig.received(Ping)
    rig.worker.send(Pong(ping.nonce, WorkerStats()))
    await until(lambda: rig.client.alive)


async def test_garbage_ends_the_connection(rig) -> None:
    rig.say_ready()
    await until(lambda: rig.client.alive)
    rig.worker._sock.send(b"\x03\x00\x00\x00\xff\xff\xff")
    await until(lambda: rig.recorder.lost)
    assert "broke the protocol" in rig.recorder.lost[0][1]


async def test_a_worker_that_does_not_read_blocks_nobody() -> None:
    rig = Rig(ping_interval_s=60.0)  # so that no ping flushes what is queued
    rig.say_ready()
    await until(lambda: rig.client.alive)
    for _ in range(20):
        rig.client.send(submit(200_000))
    received: list = []

    def look() -> bool:
        received.extend(m for m in rig.worker.receive() if isinstance(m, Submit))
        return len(received) == 20

    await until(look)
    assert all(message == submit(200_000) for message in received)
    rig.client.close()
    rig.worker.close()


async def test_close_is_idempotent(rig) -> None:
    rig.say_ready()
    await until(lambda: rig.client.alive)
    rig.client.close("was stopped")
    rig.client.close()
    assert rig.recorder.lost == [("r", "was stopped")]
    await asyncio.sleep(0.03)  # a ping that is still scheduled would raise here
