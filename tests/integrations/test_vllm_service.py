"""Who attends to a producer: hooks in a step, else the thread, which serves late consumers."""

from __future__ import annotations

import select
import threading

import pytest
from hand_over_kit import Kit, prompt_of

from pdrelay.core.clock import monotonic_ns
from pdrelay.errors import ConfigError
from pdrelay.integrations.vllm import service as service_module
from pdrelay.integrations.vllm.fake_pages import FakePages, fake_layout
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
    until(lambda: any(link.early for link in kit.producer._links.all), service)
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


@pytest.mark.parametrize(("announced", "looks"), [(False, 10), (True, 2)])
def test_layers_look_a_few_times_and_only_while_a_consumer_is_missing(tmp_path, announced, looks):
    kit = Kit(tmp_path)
    kit.producer.close()
    pages = FakePages(kit.world, fake_layout(32, 40, 4))
    pages.batch_bytes = 1 << 30  # nothing is due before the end
    kit.producer = kit.new_producer(clock=monotonic_ns, pages=pages)
    kit.new_consumer(layout=fake_layout(32, 80, 4))
    service = ProducerService(kit.producer, monotonic_ns)
    if announced:
        kit.load("r", PROMPT, D_BLOCKS)
        until(lambda: any(link.early for link in kit.producer._links.all), service)
    made = []
    look, kit.producer.look = kit.producer.look, lambda: made.append(1) or look()
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    for layer in range(32):
        service.layer_written(layer)
    service.end_step()
    assert len(made) == looks
    service.close()
    kit.close()


def test_a_consumer_refused_by_the_engines_thread_is_let_go(kit, service):
    lease_ns = kit.producer._transfers._lease_ns
    kit.producer._transfers._lease_ns = int(10 * WAIT_S * 1e9)  # no deadline wakes the thread
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links.all), service)
    kit.world.pages.clear()  # cannot be opened
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    until(lambda: not kit.producer._links.all, service)
    assert until_finished(kit) == {"r"}
    assert kit.consumers[0].take_failed_blocks() == set(D_BLOCKS)
    service.end_step()
    kit.producer._transfers._lease_ns = lease_ns
    service.begin_step(StepPlan(held=["r"]))
    assert until_freed(service) == {"r"}
    assert service._thread.is_alive()


def test_what_a_socket_did_not_take_is_sent_when_it_does(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    (link,) = kit.producer._links.all
    assert not kit.producer._links.inbox.ready()
    link.channel._pending += b"\0\0\0\0"
    kit.producer.poll()
    assert kit.producer._links.inbox.ready() == [link.channel.fileno()]  # it takes bytes
    kit.producer.poll()
    assert not link.channel.has_pending
    assert not kit.producer._links.inbox.ready()


# ---- a step runs


@pytest.fixture
def turns(service, monkeypatch):
    """One entry each time that the thread runs. Alarms do not ring by themselves."""
    monkeypatch.setattr(service_module, "_STEP_NS", int(1e12))
    monkeypatch.setattr(service_module, "_TOKEN_NS", int(1e12))
    made = []
    turn, service._turn = service._turn, lambda: made.append(1) or turn()
    return made


def ring(service: ProducerService, turns: list[int]) -> None:
    """The alarm that the last hook set."""
    count = len(turns)
    service._alarm.set(0)
    until(lambda: len(turns) > count, service)


def hold_open(service: ProducerService) -> None:
    """Time enough for the thread to do what it must not."""
    service._thread.join(0.05)


PHASES = ["begin", "layer 0", "layer 2", "end", "after", "idle"]


@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_hooks_do_it_all_while_the_thread_sleeps(kit, service, turns, phase, fenced):
    """The consumer announces at `phase`; in each, it gets the prompt."""
    kit.world.eager = not fenced
    layers = len(kit.source.layout.layers)

    def at(now: str) -> None:
        if now == phase:
            kit.load("r", PROMPT, D_BLOCKS)
            hold_open(service)
            assert not turns
            assert all(out.link is None for out in kit.producer._transfers._by_request.values())

    plan = StepPlan(
        chunks=[Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))]
    )
    service.begin_step(plan)
    at("begin")
    for layer in range(layers):
        for i, block in enumerate(P_BLOCKS):
            kit.source.array[layer, block] = i + 1
        at(f"layer {layer}")
        service.layer_written(layer)
    at("end")
    service.end_step()
    at("after")
    assert service.take_finished() == set()
    kit.world.land()
    service.begin_step(StepPlan(held=["r"]))
    freed = service.take_finished()
    if phase == "idle":
        assert not freed
        ring(service, turns)
        kit.load("r", PROMPT, D_BLOCKS)
        assert until_freed(service) == {"r"}
    else:
        assert freed == {"r"}
        assert not turns
    assert until_finished(kit) == {"r"}
    assert kit.targets[0].array[:, D_BLOCKS].tolist() == [[1, 2, 3, 4]] * layers


@pytest.mark.parametrize("phase", ["layer 0", "layer 1"])
def test_layers_leave_in_the_step_for_whom_they_find(kit, service, turns, phase):
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    for layer in range(2):
        if phase == f"layer {layer}":
            kit.load("r", PROMPT, D_BLOCKS)
        service.layer_written(layer)
    assert kit.world.num_landed == 2
    assert not turns


def test_the_thread_takes_over_when_hooks_stay_away(kit, service, turns):
    """A fence is left, and nobody calls."""
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links.all), service)
    turns.clear()
    prefill(service, kit, finish=False)
    hold_open(service)
    assert not turns
    ring(service, turns)
    assert until_finished(kit) == {"r"}


def test_the_alarm_rings_by_itself(kit, service, monkeypatch):
    monkeypatch.setattr(service_module, "_STEP_NS", int(1e12))
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    prefill(service, kit, finish=False)
    assert until_finished(kit) == {"r"}
    until(lambda: not service._hooks_attend, service)


def test_the_thread_learns_of_a_lease_that_begins_while_it_attends(kit, service, turns):
    prefill(service, kit, finish=False)
    ring(service, turns)
    service.begin_step(StepPlan(held=["r"]))
    assert until_freed(service) == {"r"}


def test_what_a_hook_leaves_in_a_step_that_the_thread_took_over_is_done(
    kit, service, turns, monkeypatch
):
    kit.producer._transfers._lease_ns = int(10 * WAIT_S * 1e9)  # no deadline wakes the thread
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links.all), service)
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    ring(service, turns)
    kit.targets[0].broken = True
    monkeypatch.setattr(service_module, "_STEP_NS", int(1e7))
    service.layer_written(0)  # the consumer is refused
    until(lambda: not kit.producer._links.all, service)
    assert until_finished(kit) == {"r"}
    assert kit.consumers[0].take_failed_blocks() == set(D_BLOCKS)


@pytest.mark.parametrize("again", [False, True])
def test_a_step_that_never_ends_is_looked_after(kit, service, monkeypatch, again):
    """Its forward failed: consumers are answered, and the engine may go on."""
    monkeypatch.setattr(service_module, "_STEP_NS", int(1e7))
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    service.layer_written(0)
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: kit.producer._transfers._by_transfer["T-r"].link is not None, service)
    if again:
        prefill(service, kit)
        assert until_freed(service) == {"r"}
    else:
        kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))
    assert until_finished(kit) == {"r"}
    assert kit.consumers[0].take_failed_blocks() == set()


def test_shutdown_in_a_step(kit, service, turns):
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links.all), service)
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    service.layer_written(0)
    service.close()
    assert not service._thread.is_alive()
    assert not kit.world.queue  # what was on its way has landed
    assert until_finished(kit) == {"r"}
    assert kit.consumers[0].take_failed_blocks() == set(D_BLOCKS)


@pytest.mark.parametrize("fenced", [False, True])
def test_a_consumer_dies_in_the_step(kit, service, turns, fenced):
    kit.world.eager = not fenced
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, len(PROMPT))
    service.begin_step(StepPlan(chunks=[chunk]))
    kit.load("r", PROMPT, D_BLOCKS)
    service.layer_written(0)
    kit.consumers[0].close()
    service.layer_written(1)
    service.layer_written(2)
    service.end_step()
    assert service.take_finished() == set()
    kit.world.land()
    service.begin_step(StepPlan(held=["r"]))
    assert service.take_finished() == {"r"}
    assert not kit.producer._links.all
    assert not turns


def test_a_lease_ends_in_a_step(kit, service, turns):
    prefill(service, kit)  # nobody asks for it
    other = prompt_of(2, 8)
    service.begin_step(StepPlan(chunks=[Chunk("s", "T-s", 8, prompt_digest(other), [1, 2], 8)]))
    service._thread.join(0.25)
    service.end_step()
    assert service.take_finished() == {"r"}
    assert not turns


def test_an_abort_in_the_step_answers_who_announces(kit, service, turns):
    chunk = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), P_BLOCKS, 8)
    service.begin_step(StepPlan(chunks=[chunk]))
    service.end_step()
    other = Chunk("s", "T-s", 8, prompt_digest(prompt_of(2, 8)), [1, 2], 8)
    service.begin_step(StepPlan(dropped={"r": "aborted"}, chunks=[other]))
    kit.load("r", PROMPT, D_BLOCKS)
    service.end_step()
    assert until_finished(kit) == {"r"}
    assert kit.consumers[0].take_failed_blocks() == set(D_BLOCKS)
    assert not turns


def test_a_prompt_announced_in_a_step_is_preempted_by_the_next(kit, service, turns):
    part = Chunk("r", "T-r", len(PROMPT), prompt_digest(PROMPT), [30, 31], 8)
    service.begin_step(StepPlan(chunks=[part]))
    kit.load("r", PROMPT, D_BLOCKS)
    for layer in range(len(kit.source.layout.layers)):
        kit.source.array[layer, [30, 31]] = 1, 2
        service.layer_written(layer)
    service.end_step()
    service.begin_step(StepPlan(rewound=["r"]))
    prefill(service, kit)
    assert service.take_finished() == {"r"}
    assert until_finished(kit) == {"r"}
    assert kit.targets[0].array[:, D_BLOCKS].tolist() == [[1, 2, 3, 4]] * 3
    assert not turns


def test_a_bug_in_a_hook_closes_the_door_and_not_the_engine(kit, service, turns, caplog):
    def broken(*_) -> None:
        raise RuntimeError("a bug")

    kit.load("r", PROMPT, D_BLOCKS)
    until(lambda: any(link.early for link in kit.producer._links.all), service)
    kit.producer._links._accept = kit.producer._links._read = broken
    kit.load("s", PROMPT, D_BLOCKS)  # wakes the thread or, in the step, does not
    prefill(service, kit)
    assert service.take_finished() == {"r"}
    assert "restart this instance" in caplog.text
    service._thread.join(WAIT_S)
    assert not service._thread.is_alive()


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
