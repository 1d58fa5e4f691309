"""Engine loops on threads over real sockets and transports, with the test as the front door."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from functools import partial

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.channel import Channel
from pdrelay.core.clock import monotonic_ns
from pdrelay.core.events import Event
from pdrelay.core.messages import (
    Abort,
    Drain,
    EngineRequest,
    Expect,
    Failure,
    FromWorker,
    Met,
    Ping,
    Pong,
    Prefill,
    StepResult,
    Submit,
    ToWorker,
)
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.consumer import Consumer
from pdrelay.engine.fake_runner import AsyncFakeRunner, FakeRunner, fake_layout
from pdrelay.engine.loop import EngineLoop
from pdrelay.engine.outbox import Outbox
from pdrelay.engine.prefix_writer import PrefixWriter
from pdrelay.engine.producer import Producer
from pdrelay.transport.checksum import prepare_checksum
from pdrelay.transport.host_device import HostPages
from pdrelay.transport.pages import SharedPages

DEADLINE_S = 20.0


class Instance:
    """One engine loop on a thread. `control` is the front door's end."""

    def __init__(
        self,
        name,
        *,
        transport_factory=None,
        address=None,
        num_blocks=64,
        budget=16,
        seqs=8,
        timeout_s=5.0,
        verify="full",
        overlap=False,
        idle_pieces=0,
        before_piece=None,
    ):
        """`idle_pieces` of idle work are due with each peer's pool, each behind `before_piece`."""
        self.name = name
        layout = fake_layout(num_blocks=num_blocks)
        self.pages = SharedPages.create(layout)
        self.transport = transport_factory(self.pages, name) if transport_factory else None
        self.scheduler = Scheduler(
            SchedulerConfig(seqs, budget, layout.block_size),
            BlockManager(num_blocks),
            self.transport.prefix_store if self.transport else None,
        )
        device = self.transport.device if self.transport else None
        pages = HostPages(self.pages, device) if device else self.pages
        self.runner = AsyncFakeRunner(pages) if overlap else FakeRunner(self.pages)
        self.runner.pieces_per_pool, self.runner.before_piece = idle_pieces, before_piece
        outbox = Outbox()
        shared = dict(
            instance=name,
            transport=self.transport,
            scheduler=self.scheduler,
            outbox=outbox,
            checksum=partial(prepare_checksum, pages, mode=verify),
            clock=monotonic_ns,
        )
        self.producer = self.consumer = None
        if name.startswith("prefill"):
            self.producer = Producer(
                num_layers=layout.num_layers, timeout_s=timeout_s, pools=self.runner, **shared
            )
        elif name.startswith("decode"):
            self.consumer = Consumer(address=address, layout=layout, **shared)
        self.prefix_writer = None
        if self.transport and self.transport.prefix_store and name.startswith("replica"):
            self.prefix_writer = PrefixWriter(self.transport, layout)
        ours, theirs = socket.socketpair()
        self.control: Channel[FromWorker] = Channel(ours, FromWorker)
        self.loop = EngineLoop(
            instance=name,
            scheduler=self.scheduler,
            runner=self.runner,
            control=Channel(theirs, ToWorker),
            outbox=outbox,
            producer=self.producer,
            consumer=self.consumer,
            transport=self.transport,
            clock=monotonic_ns,
            prefix_writer=self.prefix_writer,
        )
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.loop.run()
        except BaseException as error:
            self.error = error
        finally:
            for part in (self.producer, self.consumer, self.prefix_writer, self.transport):
                if part is not None:
                    part.close()
            self.loop._control.close()
            if isinstance(self.runner, AsyncFakeRunner):
                self.runner.close()

    def stop(self):
        """End the loop as a killed process would: its sockets close."""
        self.control.close()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


@dataclass
class Seen:
    """What the front door got for one request."""

    token_ids: dict[str, list[int]] = field(default_factory=dict)  # by instance
    finish_reason: str | None = None
    failures: list[Failure] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def tokens(self):
        """Producer's first token, then the consumer's."""
        names = sorted(self.token_ids, reverse=True)  # prefill-* before decode-*
        return [t for name in names for t in self.token_ids[name]]

    @property
    def done(self):
        return self.finish_reason is not None or bool(self.failures)


class FrontDoor:
    def __init__(self, *instances):
        self.instances = {i.name: i for i in instances}
        self.seen: dict[str, Seen] = {}
        self.pongs: dict[str, list[Pong]] = {}
        self.mets: dict[str, list[Met]] = {}  # by producer

    def add(self, instance):
        self.instances[instance.name] = instance

    def request(self, name, prompt, max_tokens, **params):
        self.seen[name] = Seen()
        return EngineRequest(
            request_id=name,
            prompt_token_ids=pack_ids(prompt),
            params=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, **params),
            arrived_ns=monotonic_ns(),
        )

    def submit(self, instance, request):
        instance.control.send(Submit(request))

    def relay(self, producer, consumer, address, request, order=("prefill", "expect")):
        for what in order:
            if what == "prefill":
                producer.control.send(Prefill(request, consumer.name, address))
            else:
                consumer.control.send(Expect(request, producer.name))

    def abort(self, request_id):
        for instance in self.instances.values():
            instance.control.send(Abort(request_id))

    def pump(self, until, timeout_s=DEADLINE_S):
        """Read all instances until `until()` holds."""
        end = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end, f"deadline: {self.seen}"
            with selectors.DefaultSelector() as selector:
                for instance in self.instances.values():
                    if not instance.control.closed:
                        selector.register(instance.control, selectors.EVENT_READ, instance)
                for key, _ in selector.select(0.2):
                    self._read(key.data)
            for instance in self.instances.values():
                if instance.error is not None:
                    raise instance.error

    def _read(self, instance):
        instance.control.flush()
        for message in instance.control.receive():
            if isinstance(message, Pong):
                self.pongs.setdefault(instance.name, []).append(message)
            if isinstance(message, Met):
                self.mets.setdefault(instance.name, []).append(message)
            if not isinstance(message, StepResult):
                continue
            for output in message.outputs:
                seen = self.seen[output.request_id]
                seen.token_ids.setdefault(instance.name, []).extend(output.token_ids)
                seen.events += output.events
                if output.finish_reason is not None:
                    seen.finish_reason = output.finish_reason
                    self.abort(output.request_id)  # the other side may still expect it
            for failure in message.failures:
                self.seen[failure.request_id].failures.append(failure)
                self.abort(failure.request_id)

    def finish(self, *names):
        wanted = names or tuple(self.seen)
        self.pump(lambda: all(self.seen[name].done for name in wanted))

    def stats(self, instance):
        """A fresh snapshot, through the loop itself."""
        before = len(self.pongs.get(instance.name, []))
        instance.control.send(Ping(before))
        self.pump(lambda: len(self.pongs.get(instance.name, [])) > before)
        return self.pongs[instance.name][-1].stats

    def settle(self):
        """Wait until no instance holds a block, then check the books."""
        for instance in self.instances.values():
            end = time.monotonic() + DEADLINE_S
            while True:
                stats = self.stats(instance)
                total = (
                    stats.num_free_blocks
                    + stats.num_cached_blocks
                    + stats.num_used_blocks
                    + stats.num_in_transfer_blocks
                )
                assert total == stats.num_blocks
                if stats.num_used_blocks == stats.num_in_transfer_blocks == 0:
                    break
                assert time.monotonic() < end, f"{instance.name} keeps blocks: {stats}"

    def drain(self):
        for instance in self.instances.values():
            instance.control.send(Drain())
        for instance in self.instances.values():
            instance.thread.join(DEADLINE_S)
            assert not instance.thread.is_alive(), f"{instance.name} does not drain"
            if instance.error is not None:
                raise instance.error
            instance.scheduler.check_integrity()


def socket_path(directory, name):
    path = os.path.join(directory, name)
    assert len(path) < 100, "Unix socket paths are short"
    return path
