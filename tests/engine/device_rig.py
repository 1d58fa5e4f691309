"""A producer and consumers over fake devices, one call at a time: nothing moves by itself."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.clock import FakeClock, monotonic_ns
from pdrelay.core.messages import EngineRequest, Expect, Prefill
from pdrelay.core.request import Status
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.consumer import Consumer
from pdrelay.engine.fake_runner import fake_layout
from pdrelay.engine.outbox import Outbox
from pdrelay.engine.producer import Producer
from pdrelay.engine.slot_wait import SlotWait
from pdrelay.transport.checksum import prepare_checksum
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.registry import TransportOptions, create_transport

BLOCK_SIZE = 4


@dataclass
class Launched:
    """A step on the producer's device, not read yet."""

    plan: object
    rows: list[tuple[str, int, int]]  # request id, position, slot
    done: list[bool] = field(default_factory=lambda: [False])


class Decode:
    """A consumer that never decodes; `watch` finds stores into blocks that are not promised."""

    def __init__(self, rig, name, num_blocks, *, manual=False):
        self.name = name
        self.address = f"{rig.directory}/{name}.sock"
        self.device = HostDevice(rig.fabric, f"host:{name}", manual=manual)
        self.pages = HostPages.create(fake_layout(num_blocks=num_blocks), self.device)
        self.transport = create_transport("mapped", self.pages, name, TransportOptions())
        config = SchedulerConfig(8, 64, BLOCK_SIZE)
        self.scheduler = Scheduler(config, BlockManager(num_blocks))
        self.outbox = Outbox()
        self.consumer = Consumer(
            instance=name,
            address=self.address,
            transport=self.transport,
            scheduler=self.scheduler,
            outbox=self.outbox,
            layout=self.pages.layout,
            checksum=partial(prepare_checksum, self.pages, mode="full"),
            clock=monotonic_ns,
            process_of=lambda sock: rig.process,
        )
        self.arrived = {}  # request id to the pages it got
        self._seen = self.pages.array.copy()
        self._promised = set()

    def reserve(self):
        """The consumer's part of a step that reserves and computes nothing."""
        waiting, self.scheduler.waiting = self.scheduler.waiting, deque()
        plan = self.scheduler.schedule()
        self.scheduler.waiting = waiting
        for reservation in plan.reservations:
            self.consumer.reserved(reservation)
        assert not plan.chunks

    def poll(self):
        self.consumer.poll()
        for request in list(self.scheduler.waiting):  # committed: take it and go
            blocks = request.block_table[: -(-request.num_prompt_tokens // BLOCK_SIZE)]
            self.arrived[request.request_id] = self.pages.array[:, blocks].copy()
            self.scheduler.finish(request)

    def watch(self):
        """Pages changed since the last call lie in blocks that were promised since then."""
        changed = np.flatnonzero((self.pages.array != self._seen).any(axis=(0, 2)))
        promised = self.promised()
        assert set(changed.tolist()) <= promised | self._promised, "a store into a block of others"
        self._seen = self.pages.array.copy()
        self._promised = promised

    def promised(self):
        kinds = (Status.RESERVED, Status.CLOSING)
        requests = self.scheduler.requests.values()
        return {b for r in requests if r.status in kinds for b in r.block_table}


class Pools:
    """Hears of peers' pools; their memory is mapped whenever it hears."""

    def __init__(self, fabric):
        self.open = []
        self._fabric = fabric

    def pool_opened(self, pool):
        assert self._fabric.opened and not any(pool is other for other in self.open)
        self.open.append(pool)

    def pool_closed(self, pool):
        assert self._fabric.opened, "closed before its graphs were dropped"
        self.open = [other for other in self.open if other is not pool]


class Rig:
    def __init__(
        self,
        directory,
        *,
        num_blocks=48,
        consumers=1,
        budget=16,
        prefix_caching=True,
        manual_consumers=False,
    ):
        self.directory = str(directory)
        self.fabric = HostFabric()
        self.process = None
        self.device = HostDevice(self.fabric, "host:p", manual=True)
        self.layout = fake_layout(num_blocks=num_blocks)
        self.pages = HostPages.create(self.layout, self.device)
        self.transport = create_transport("mapped", self.pages, "prefill-0", TransportOptions())
        blocks = BlockManager(num_blocks, enable_prefix_caching=prefix_caching)
        self.scheduler = Scheduler(SchedulerConfig(8, budget, BLOCK_SIZE), blocks)
        self.outbox = Outbox()
        self.pools = Pools(self.fabric)
        self.clock = FakeClock(monotonic_ns())
        self.during_wait = None  # called when a step waits for slots; without: nothing comes
        self.num_waits = 0
        self.producer = Producer(
            pools=self.pools,
            instance="prefill-0",
            transport=self.transport,
            scheduler=self.scheduler,
            outbox=self.outbox,
            num_layers=self.layout.num_layers,
            checksum=partial(prepare_checksum, self.pages, mode="full"),
            timeout_s=30.0,
            clock=self.clock,
            slot_wait=SlotWait(self.clock, self._wait),
        )
        self.decodes = [
            Decode(self, f"decode-{i}", num_blocks + i, manual=manual_consumers)
            for i in range(consumers)
        ]
        self.steps: deque[Launched] = deque()
        self.fused_rows = 0

    def submit(self, name, prompt, decode=None, order=("prefill", "expect")):
        decode = decode or self.decodes[0]
        request = EngineRequest(
            request_id=name,
            prompt_token_ids=pack_ids(prompt),
            params=SamplingParams(max_tokens=8, seed=0, temperature=0.0),
            arrived_ns=monotonic_ns(),
        )
        for what in order:
            if what == "prefill":
                self.producer.prefill(Prefill(request, decode.name, decode.address))
            else:
                decode.consumer.expect(Expect(request, "prefill-0"))

    # ---- the producer's loop, taken apart

    def launch(self):
        """Plan and launch one step, if there is one to plan; two may be in flight."""
        if len(self.steps) >= 2:
            return False
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return False
        self.producer.await_slots(plan, idle=not self.steps)
        remote = self.producer.remote_store(plan)
        rows = []
        for chunk in plan.chunks:
            table = list(chunk.request.block_table)
            for position in range(chunk.start, chunk.start + chunk.length):
                slot = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                rows.append((chunk.request.token_ids[position], position, slot))
        if remote is not None:
            assert any(pool is remote.tensor for pool in self.pools.open)
            assert len(remote.slots) == len(rows)
            self.fused_rows += int((remote.slots >= 0).sum())
        self.producer.begin_step()
        step = Launched(plan, rows)
        for layer in range(self.layout.num_layers):
            self.device.launch(partial(self._write, layer, rows, remote))
            self.producer.after_layer(plan, layer)
        self.producer.launched(plan)
        self.device.launch(partial(step.done.__setitem__, 0, True))
        self.steps.append(step)
        return True

    def _wait(self, channel, timeout_s):
        """A step waits for slots: what happens then, or else time goes by."""
        assert channel in self.producer.channels() and not self.steps
        self.num_waits += 1
        news = self.during_wait is not None and self.during_wait()
        self.clock.now_ns += 50_000 if news else int(timeout_s * 1e9) + 1

    def _write(self, layer, rows, remote):
        """What a RoPE + KV-write kernel does: own pages, and the peer's."""
        pools = [(self.pages.array, [slot for _, _, slot in rows])]
        if remote is not None:
            pools.append((remote.tensor, remote.slots))
        for pool, slots in pools:
            tokens = pool.reshape(*pool.shape[:2], 2, BLOCK_SIZE, -1)
            for (token, position, _), slot in zip(rows, slots, strict=True):
                if slot >= 0:
                    value = (token * 31 + position * 7 + layer * 3) % 251 + 1
                    tokens[layer, slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = value

    def read(self):
        """Read the oldest step if the device is through with it."""
        if not self.steps or not self.steps[0].done[0]:
            return False
        plan = self.steps.popleft().plan
        self.producer.end_step()
        sampled = [1 for chunk in plan.chunks if chunk.samples]
        for token in self.scheduler.update(plan, sampled):
            assert token.finish_reason is None
            if token.request.request_id in self.producer._outgoing:
                self.producer.prefill_done(token.request, token.token_id)
        return True

    def settle(self, decodes=None):
        """Let everything happen until nothing is left to."""
        for _ in range(400):
            self.device.run()
            self.turn(decodes)
            idle = not self.scheduler.requests and not self.steps
            if idle and not any(d.scheduler.requests for d in decodes or self.decodes):
                break
        else:
            raise AssertionError("it does not settle")
        self.scheduler.check_integrity()

    def turn(self, decodes=None):
        for decode in decodes or self.decodes:
            decode.reserve()
            decode.poll()
        self.producer.poll()
        self.launch()
        self.read()
        self.watch()

    def watch(self):
        for decode in self.decodes:
            decode.watch()

    def pages_of(self, prompt):
        """What a consumer must get for `prompt`, computed plainly."""
        num_blocks = -(-len(prompt) // BLOCK_SIZE)
        shape = (self.layout.num_layers, num_blocks, 2, BLOCK_SIZE, 8)
        pages = np.zeros(shape, np.uint8)
        for layer in range(self.layout.num_layers):
            for position, token in enumerate(prompt):
                value = (token * 31 + position * 7 + layer * 3) % 251 + 1
                pages[layer, position // BLOCK_SIZE, :, position % BLOCK_SIZE] = value
        return pages

    def assert_arrived(self, name, prompt, decode=None):
        got = (decode or self.decodes[0]).arrived[name]
        expected = self.pages_of(prompt)
        full, rest = divmod(len(prompt), BLOCK_SIZE)
        got = got.reshape(expected.shape)
        assert np.array_equal(got[:, :full], expected[:, :full])
        assert np.array_equal(got[:, full:, :, :rest], expected[:, full:, :, :rest])

    def close(self):
        self.device.run()
        for decode in self.decodes:
            decode.consumer.close()
        self.producer.close()
        self.device.run()
        for decode in self.decodes:
            decode.transport.close()
        self.transport.close()
        assert not self.pools.open
        assert not self.fabric.opened, "a mapping was left open"
        for pages in (self.pages, *(decode.pages for decode in self.decodes)):
            pages.close()
