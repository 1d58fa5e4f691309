"""The producer's thread: late consumers are served while the engine does nothing."""

from __future__ import annotations

import select
import threading

import pytest
from hand_over_kit import Kit, prompt_of

from pdrelay.core.clock import monotonic_ns
from pdrelay.errors import ConfigError
from pdrelay.integrations.vllm.listener import listen
from pdrelay.integrations.vllm.service import ProducerService
from pdrelay.integrations.vllm.step import Chunk, StepPlan, prompt_digest

PROMPT = prompt_of(1, 14)
P_BLOCKS, D_BLOCKS = [9, 3, 4, 20], [60, 61, 50, 7]
WAIT_S = 20.0


@pytest.fixture
def kit(tmp_path):
    built = Kit(tmp_path)
    built.new_consumer()
    yield built
    built.close()


@pytest.fixture
def service(kit):
    kit.producer.close()
    kit.producer = kit.new_producer(clock=monotonic_ns, lease_s=0.2)
    built = ProducerService(kit.producer, monotonic_ns)
    yield built
    built.close()


def prefill(service: ProducerService, kit: Kit, *, finish: bool = True) -> None:
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    for layer in range(len(kit.source.layout.layers)):
        for i, block in enumerate(P_BLOCKS):
            kit.source.array[layer, block] = i + 1
        service.layer_written(layer)
    service.end_step()
    if finish:
        service.begin_step(StepPlan(held=["r"]))


def until_finished(kit: Kit) -> set[str]:
    """Wait for the producer's answer."""
    consumer = kit.consumers[0]
    (source,) = consumer._sources.values()
    for _ in range(3):
        consumer.poll()
        finished = consumer.take_finished()
        if finished:
            return finished
        assert select.select([source.channel], [], [], WAIT_S)[0], "no answer"
    return set()


def test_a_late_consumer_is_served_between_steps(kit, service):
    prefill(service, kit, finish=False)
    kit.load("r", PROMPT, D_BLOCKS)
    assert until_finished(kit) == {"r"}
    assert kit.targets[0].array[:, D_BLOCKS].tolist() == [[1, 2, 3, 4]] * 3
    service.begin_step(StepPlan(held=["r"]))
    assert service.take_finished() == {"r"}


def test_landing_is_awaited_off_the_engines_thread(kit, service):
    """FakeFence.wait lets the copies land: only the service's thread calls it here."""
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    assert service._thread.is_alive()
    prefill(service, kit)
    assert until_finished(kit) == {"r"}
    assert threading.current_thread() is not service._thread


def test_a_lease_ends_while_the_engine_idles(kit, service):
    prefill(service, kit)
    assert until_freed(service) == {"r"}


def until_freed(service: ProducerService) -> set[str]:
    end = monotonic_ns() + int(WAIT_S * 1e9)
    while monotonic_ns() < end:
        finished = service.take_finished()
        if finished:
            return finished
        service._thread.join(0.01)  # the thread under test runs meanwhile
    return set()


def test_a_bug_closes_the_door_instead_of_hanging(kit, service, caplog):
    """The thread fails: consumers see the end of the socket, held blocks are freed."""

    def broken() -> None:
        raise RuntimeError("a bug")

    prefill(service, kit)
    kit.producer.poll = broken
    kit.load("r", PROMPT, D_BLOCKS)
    assert until_finished(kit) == {"r"}
    assert kit.consumers[0].take_failed_blocks() == set(D_BLOCKS)
    service._thread.join(WAIT_S)
    assert service.take_finished() == {"r"}
    assert "restart this instance" in caplog.text
    prefill(service, kit)  # the engine goes on without hand-over
    assert service.take_finished() == {"r"}


def test_a_layer_never_waits_for_the_other_thread(kit, service):
    """The lock is taken here: a layer that waited for it would do so for ever."""
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links), service)
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    with service._lock:
        service.layer_written(0)
    assert kit.world.num_landed == 0
    service.layer_written(1)  # it takes what is due of layer 0 along
    assert kit.world.num_landed == 2
    service.layer_written(2)
    service.end_step()
    assert until_finished(kit) == {"r"}


def test_a_layer_that_nobody_waits_for_does_not_even_try(kit, service):
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    kit.producer.push = None  # calling it would fail
    for layer in range(len(kit.source.layout.layers)):
        service.layer_written(layer)
    service.end_step()


@pytest.mark.parametrize("announced", [False, True])
def test_the_thread_is_woken_only_for_what_it_must_do(kit, service, announced):
    """Pages without a fence: all is said when the step ends."""
    woken = []
    service._wake, wake = lambda: woken.append(1) or wake(), service._wake
    if announced:
        kit.load("r", PROMPT, D_BLOCKS)
        until(lambda: any(link.early for link in kit.producer._links), service)
    prefill(service, kit, finish=False)
    assert not woken
    service.begin_step(StepPlan(held=["r"]))  # a lease begins
    assert woken
    if announced:
        assert until_finished(kit) == {"r"}
        assert service.take_finished() == {"r"}
    else:
        assert until_freed(service) == {"r"}


def test_the_thread_is_woken_for_a_fence(kit, service):
    kit.world.eager = False
    woken = []
    service._wake, wake = lambda: woken.append(1) or wake(), service._wake
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links), service)
    prefill(service, kit, finish=False)
    assert woken
    assert until_finished(kit) == {"r"}


def test_a_consumer_refused_by_the_engines_thread_is_let_go(kit, service):
    lease_ns = kit.producer._lease_ns
    kit.producer._lease_ns = int(10 * WAIT_S * 1e9)  # no deadline wakes the thread
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links), service)
    kit.world.pages.clear()  # cannot be opened
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    until(lambda: not kit.producer._links, service)
    assert until_finished(kit) == {"r"}
    assert kit.consumers[0].take_failed_blocks() == set(D_BLOCKS)
    service.end_step()
    kit.producer._lease_ns = lease_ns
    service.begin_step(StepPlan(held=["r"]))
    assert until_freed(service) == {"r"}
    assert service._thread.is_alive()


def test_what_a_socket_did_not_take_wakes_the_thread(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert not kit.producer.needs_poll
    kit.producer._links[0].channel._pending += b"\0"
    assert kit.producer.needs_poll


def until(true, service: ProducerService) -> None:
    end = monotonic_ns() + int(WAIT_S * 1e9)
    while not true():
        assert monotonic_ns() < end, "the thread does not get there"
        service._thread.join(0.001)  # it runs meanwhile


def test_close_is_idempotent_and_removes_the_socket(kit, service, tmp_path):
    service.close()
    assert not (tmp_path / "p.sock").exists()
    kit.producer.close()


def test_a_stale_socket_is_taken_over(tmp_path):
    address = str(tmp_path / "s")
    listen(address).close()  # leaves its file, as a killed process does
    sock = listen(address)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="another process"):
        listen(address)
    sock.close()


@pytest.mark.parametrize("name", ["file", "no/such"])
def test_an_address_that_cannot_be_listened_at(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="choose another address"):
        listen(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "mine"
