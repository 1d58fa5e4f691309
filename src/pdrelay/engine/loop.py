"""The step loop of rank 0: messages in, steps, tokens out. Single-threaded.

On a synchronous runner each turn plans, runs and reads one step. On an asynchronous one, up to
`runner.depth` steps are in flight: step N+1 is planned and launched while the device computes step
N, so host work between steps hides behind it. Sleeping ends with the next message or the end of
the oldest step, whichever comes first. Blocks that a step in flight touches stay with their
request (`core/scheduler.py`), so aborts, preemption and new promises need no care here.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pdrelay.core.awake import AWAKE_NS
from pdrelay.core.channel import Channel
from pdrelay.core.clock import Clock
from pdrelay.core.events import Event, EventKind
from pdrelay.core.messages import (
    Abort,
    Drain,
    Expect,
    Meet,
    Met,
    Ping,
    Pong,
    Prefill,
    Submit,
    TokenLogprobs,
    ToWorker,
    WorkerStats,
)
from pdrelay.core.request import Request
from pdrelay.core.scheduler import NewToken, Reservation, Scheduler, StepPlan
from pdrelay.engine.consumer import Consumer
from pdrelay.engine.outbox import Outbox
from pdrelay.engine.prefix_writer import PrefixWriter
from pdrelay.engine.producer import Producer
from pdrelay.engine.step import RemoteSlots, Runner, StepHandle, StepTokens, needs_host_tokens
from pdrelay.engine.step_pacer import StepPacer
from pdrelay.engine.step_wait import (
    ASK_EVERY_S,
    Sockets,
    wait_awake,
    wait_for_news,
    wait_for_step,
)
from pdrelay.transport.base import Transport

STATS_INTERVAL_NS = 100_000_000
# Without news for so long, the runner may do idle work: longer than the gaps of a burst. After a
# Meet nothing is waited for until a prompt comes: the front door sends none if it can.
_QUIET_S = 0.02
_AWAKE_TURN_S = 1e-3
_IDLE_WAIT_S = 1.0  # an idle loop wakes for deadlines at least this often


@dataclass(frozen=True)
class InFlight:
    """A launched step that is not read yet."""

    plan: StepPlan
    handle: StepHandle
    launched_ns: int


class EngineLoop:
    """`remote_of(plan)` names the peer's pages that a producer's step stores into."""

    def __init__(
        self,
        *,
        instance: str,
        scheduler: Scheduler,
        runner: Runner,
        control: Channel[ToWorker],
        outbox: Outbox,
        producer: Producer | None,
        consumer: Consumer | None,
        transport: Transport | None,
        clock: Clock,
        prefix_writer: PrefixWriter | None = None,
        remote_of: Callable[[StepPlan], RemoteSlots | None] | None = None,
        busy_wait: bool = False,
    ) -> None:
        self._instance = instance
        self._scheduler = scheduler
        self._runner = runner
        self._control = control
        self._outbox = outbox
        self._producer = producer
        self._consumer = consumer
        self._transport = transport
        self._clock = clock
        self._prefix_writer = prefix_writer
        self._remote_of = remote_of
        self._busy_wait = busy_wait
        self._awake_until_ns = 0
        self._in_flight: deque[InFlight] = deque()
        self._pacer = StepPacer()
        self._busy_until_ns = 0
        self._draining = False
        self._meets: list[Meet] = []  # not answered yet
        self._unprompted = False  # no prompt came since the last of them
        self._stats = WorkerStats()
        self._stats_sent_ns = 0
        self._stats_dirty = True
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}

    def run(self) -> None:
        """Serve until drained or until the front door is gone."""
        worked = True
        while not self._control.closed:
            self._wait(block=not worked)
            self._read_control()
            if self._draining and self._scheduler.idle and not self._in_flight:
                return
            self._reserve()  # producers wait for promises
            self._poll_transfers()
            self._answer_meets()
            worked = self._read_steps()
            if worked:
                self._flush()  # tokens leave before the next step is planned
                if self._producer is not None:
                    self._producer.poll()  # and what the step completed is committed
            self._reserve()  # of what was given back meanwhile
            worked |= self._launch_steps()
            worked |= self._read_steps()
            self._flush()
            if worked and self._busy_wait:
                self._awake_until_ns = self._clock() + AWAKE_NS

    # ---- input

    def _wait(self, *, block: bool) -> None:
        """Sleep until some socket has news, when the last turn found nothing to do."""
        if not block:
            return
        sockets = self._sockets()
        if self._in_flight:
            step, end_ns = self._in_flight[0].handle, self._pacer.foreseen_end_ns()
            timeout_s = self._timeout_s()
            wait_for_step(step, end_ns, sockets, timeout_s, self._clock, awake=self._busy_wait)
        elif self._receives:
            wait_awake(sockets, _AWAKE_TURN_S, self._clock)
        elif self._copies:
            wait_for_news(sockets, ASK_EVERY_S)  # then the copies are asked
        elif not self._runner.has_idle_work:
            if self._clock() < self._awake_until_ns:
                wait_awake(sockets, _AWAKE_TURN_S, self._clock)
            else:
                wait_for_news(sockets, _IDLE_WAIT_S)
        elif not wait_for_news(sockets, 0.0 if self._unprompted else _QUIET_S):
            self._runner.do_idle_work()
        self._runner.drain_news()

    @property
    def _receives(self) -> bool:
        """Whether a device's hand-over to here is under way. A host that computes needs its cores
        for more than that."""
        return (
            self._on_device and self._consumer is not None and self._consumer.num_transferring > 0
        )

    @property
    def _copies(self) -> bool:
        """Whether the last of a prompt's KV is on its way from here, by copies of a device."""
        producer = self._producer
        return self._on_device and producer is not None and producer.num_copying > 0

    @property
    def _on_device(self) -> bool:
        return self._transport is not None and self._transport.device is not None

    def _sockets(self) -> Sockets:
        channels = self._channels()
        readable: list[Any] = [*channels]
        if self._consumer is not None:
            readable.append(self._consumer.listener)
        news = self._transport.fileno() if self._transport is not None else None
        readable += [fd for fd in (news, self._runner.fileno()) if fd is not None]
        return Sockets(readable, [one for one in channels if one.has_pending])

    def _timeout_s(self) -> float:
        """For steps in flight: until another may be planned."""
        if len(self._in_flight) == self._runner.depth:
            return _IDLE_WAIT_S
        until_ns = self._pacer.not_before_ns() - self._clock()
        return min(until_ns / 1e9, _IDLE_WAIT_S) if until_ns > 0 else _IDLE_WAIT_S

    def _channels(self) -> list[Channel[Any]]:
        channels: list[Channel[Any]] = [self._control]
        if self._producer is not None:
            channels += self._producer.channels()
        if self._consumer is not None:
            channels += self._consumer.channels()
        return [channel for channel in channels if not channel.closed]

    def _read_control(self) -> None:
        self._control.flush()
        for message in self._control.receive():
            match message:
                case Submit(request=source):
                    self._scheduler.add(Request(source))
                case Prefill():
                    assert self._producer is not None, "not a producer"
                    self._unprompted = False
                    self._producer.prefill(message)
                case Meet():
                    assert self._producer is not None, "not a producer"
                    self._unprompted = True
                    self._meets.append(message)
                    self._producer.meet(message.consumer, message.consumer_address)
                case Expect():
                    assert self._consumer is not None, "not a consumer"
                    self._consumer.expect(message)
                case Abort(request_id=request_id, reason=reason):
                    self._abort(request_id, reason)
                case Ping(nonce=nonce):
                    self._control.send(Pong(nonce, self._snapshot()))
                case Drain():
                    self._draining = True

    def _abort(self, request_id: str, reason: str) -> None:
        self._prompt_logprobs.pop(request_id, None)
        self._stats_dirty = True
        if self._producer is not None:
            self._producer.abort(request_id, reason)
        if self._consumer is not None:
            self._consumer.abort(request_id, reason)
        elif (request := self._scheduler.requests.get(request_id)) is not None:
            self._scheduler.finish(request)

    def _answer_meets(self) -> None:
        """Once those consumers are connected and the runner has made what it makes for them."""
        producer = self._producer
        if producer is None or not self._meets or self._runner.has_idle_work:
            return
        meets, self._meets = self._meets, []
        for meet in meets:
            if producer.is_meeting(meet.consumer_address):
                self._meets.append(meet)
            else:
                self._control.send(Met(meet.consumer, meet.consumer_address))
        self._unprompted = self._unprompted and bool(self._meets)

    def _poll_transfers(self) -> None:
        if self._producer is not None:
            self._producer.poll()
        if self._consumer is not None:
            self._consumer.poll()

    def _reserve(self) -> None:
        """Promise blocks whether or not a step may be planned now."""
        if self._scheduler.expected:
            self._promise(self._scheduler.reserve())

    def _promise(self, reservations: list[Reservation]) -> None:
        for reservation in reservations:
            assert self._consumer is not None
            self._consumer.reserved(reservation)
        self._scheduler.hash_ahead(reservation.request for reservation in reservations)

    # ---- steps

    def _launch_steps(self) -> bool:
        """Launch steps while there is work and room. Returns whether anything changed."""
        changed = False
        while len(self._in_flight) < self._runner.depth and self._may_plan():
            begun_ns = self._clock()
            plan = self._scheduler.schedule()
            self._promise(plan.reservations)
            changed |= bool(plan.reservations)
            if not plan.chunks:
                break
            self._launch(plan)
            self._pacer.launched(plan, begun_ns, self._clock())
            changed = True
        return changed

    def _may_plan(self) -> bool:
        """Requests whose next token depends on the last one's id are not planned ahead."""
        if not self._scheduler.has_work:
            return False
        if not self._in_flight:
            return True
        if self._clock() < self._pacer.not_before_ns():
            return False
        return not any(
            needs_host_tokens(chunk.request)
            for step in self._in_flight
            for chunk in step.plan.chunks
        )

    def _launch(self, plan: StepPlan) -> None:
        """A producer sends each layer as it is written, or queues it behind the layer."""
        producer = self._producer
        remote = None
        if producer is not None and self._remote_of is not None:
            producer.await_slots(plan, idle=not self._in_flight)
            remote = self._remote_of(plan)
        now_ns = self._clock()
        self._note_start(plan, now_ns)
        after_layer = None
        if producer is not None:
            producer.begin_step()
            after_layer = partial(producer.after_layer, plan)
        handle = self._runner.launch(plan, after_layer, remote)
        if producer is not None:
            producer.launched(plan)
        self._in_flight.append(InFlight(plan, handle, now_ns))
        self._scheduler.hash_ahead(c.request for c in plan.chunks if c.length > 1)

    def _read_steps(self) -> bool:
        """Read every step that is done. Returns whether there was one."""
        found = False
        while self._in_flight and self._in_flight[0].handle.done():
            self._read_step(self._in_flight.popleft())
            found = True
        return found

    def _read_step(self, step: InFlight) -> None:
        plan, tokens = step.plan, step.handle.result()
        end_ns = self._clock()
        self._pacer.read(end_ns)
        if self._producer is not None:
            self._producer.end_step()
        if self._consumer is not None:
            self._consumer.verify(plan)
        self._note_prefill_end(plan, end_ns)
        self._note_prompt_logprobs(plan, tokens)
        for token in self._scheduler.update(plan, tokens.token_ids):
            self._emit(token, tokens.logprobs[token.index])
        self._stats.num_steps += 1
        # Steps in flight overlap on the host but not on the device: count no time twice.
        self._stats.busy_ns += end_ns - max(step.launched_ns, self._busy_until_ns)
        self._busy_until_ns = end_ns
        self._stats_dirty = True

    def _emit(self, token: NewToken, logprobs: TokenLogprobs | None) -> None:
        request = token.request
        output = self._outbox.output(request.request_id)
        output.token_ids = [*output.token_ids, token.token_id]
        if logprobs is not None:
            output.logprobs = [*(output.logprobs or []), logprobs]
        output.finish_reason = token.finish_reason
        output.stop_token_id = token.stop_token_id
        if request.num_output_tokens == 1:
            output.num_cached_tokens = request.num_cached_tokens
            output.prompt_logprobs = self._prompt_logprobs.pop(request.request_id, None)
            if self._prefix_writer is not None and token.finish_reason is None:
                self._prefix_writer.prefill_done(request)
        self._stats.num_generated_tokens += 1
        if self._producer is None:
            return
        if token.finish_reason is None:
            self._producer.prefill_done(request, token.token_id)
        else:
            self._producer.finished_early(request)

    # ---- the record

    def _note_start(self, plan: StepPlan, now_ns: int) -> None:
        for request in plan.admitted:
            kind = (
                EventKind.DECODE_ADMITTED if request.num_output_tokens else EventKind.PREFILL_START
            )
            self._outbox.event(request.request_id, Event(kind, now_ns, self._instance))
            if kind is EventKind.PREFILL_START:
                self._stats.num_prompt_tokens += request.num_prompt_tokens
        for request in plan.preempted:
            self._outbox.event(
                request.request_id, Event(EventKind.PREEMPTED, now_ns, self._instance)
            )

    def _note_prefill_end(self, plan: StepPlan, now_ns: int) -> None:
        for chunk in plan.chunks:
            if chunk.samples and chunk.request.num_output_tokens == 0:
                event = Event(EventKind.PREFILL_END, now_ns, self._instance)
                self._outbox.event(chunk.request.request_id, event)

    def _note_prompt_logprobs(self, plan: StepPlan, step: StepTokens) -> None:
        for chunk in plan.chunks:
            request_id = chunk.request.request_id
            if request_id not in step.prompt_logprobs:
                continue
            if chunk.start == 0:
                self._prompt_logprobs[request_id] = [None]
            self._prompt_logprobs[request_id].extend(step.prompt_logprobs[request_id])

    # ---- output

    def _flush(self) -> None:
        now = self._clock()
        stats = None
        due = now - self._stats_sent_ns >= STATS_INTERVAL_NS or not self._scheduler.has_work
        if self._stats_dirty and due:
            stats, self._stats_sent_ns, self._stats_dirty = self._snapshot(), now, False
        result = self._outbox.take(now, stats)
        if result is not None:
            self._control.send(result)

    def _snapshot(self) -> WorkerStats:
        stats, scheduler = self._stats, self._scheduler
        counts = scheduler.counts()
        stats.t_ns = self._clock()
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting) + len(scheduler.expected)
        stats.num_blocks = scheduler.blocks.num_blocks
        stats.num_free_blocks = counts.free
        stats.num_cached_blocks = counts.cached
        stats.num_used_blocks = counts.used
        stats.num_in_transfer_blocks = counts.in_transfer
        stats.prefix_cache_queries = scheduler.prefix_queries
        stats.prefix_cache_hits = scheduler.prefix_hits
        stats.num_preemptions = scheduler.num_preemptions
        stats.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._producer is not None:
            stats.num_transferring = self._producer.num_transferring
            stats.kv_bytes_sent = self._producer.bytes_sent
            stats.kv_transfer_failures = self._producer.failures
        if self._consumer is not None:
            stats.num_transferring = self._consumer.num_transferring
            stats.kv_bytes_received = self._consumer.bytes_received
            stats.kv_transfer_failures = self._consumer.failures
        return stats
