"""The life of every request between the HTTP side and the engine instances.

    submit --Submit--------------> replica                    tokens 1..
    submit --Expect---> consumer                              tokens 2..
           \\-Prefill--> producer   token 1

All state of a request is one `Flight`. Everything runs on one event loop; nothing waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Protocol

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.events import Event, EventKind, RequestRecord
from pdrelay.core.messages import (
    Abort,
    EngineRequest,
    Expect,
    Failure,
    FinishReason,
    Met,
    Output,
    Prefill,
    StepResult,
    Submit,
)
from pdrelay.errors import (
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    WorkerLostError,
)
from pdrelay.router.cluster import Cluster, Lease, Route
from pdrelay.router.event_log import EventLog
from pdrelay.router.metrics import Metrics

ROUTER = "router"  # the instance of the front door's own events
_log = logging.getLogger(__name__)
_TAKEN_OVER = (EventKind.TRANSFER_END, EventKind.DECODE_ADMITTED)


class Sink(Protocol):
    """Where one request's tokens go. Exactly one finish or one failure ends it."""

    num_tokens: int  # output tokens taken so far

    def on_output(self, output: Output) -> FinishReason | None:
        """Take new tokens. Returns why the request is finished, by the engine or by a stop
        string; tokens after a stop string are not taken."""

    def on_failed(self, error: RequestError) -> None: ...

    def flush(self) -> None:
        """Called once after each step that touched the sink."""


class Flight:
    """One request that instances work on."""

    __slots__ = (
        "deadline",
        "early",
        "first_token_deadline",
        "last_token_ns",
        "lease",
        "record",
        "request",
        "route",
        "sink",
        "working",
    )

    def __init__(
        self, request: EngineRequest, sink: Sink, route: Route, lease: Lease, record: RequestRecord
    ) -> None:
        self.request = request
        self.sink = sink
        self.route = route
        self.lease = lease
        self.record = record
        self.working = route.instances  # that hold something of the request
        self.last_token_ns = 0  # 0: no token yet
        self.early: list[tuple[str, int, Output]] = []  # consumer's tokens before the first
        self.deadline: asyncio.TimerHandle | None = None
        self.first_token_deadline: asyncio.TimerHandle | None = None


class Flow:
    """Listens to all instances of a cluster. Needs a running event loop when it submits."""

    def __init__(
        self,
        cluster: Cluster,
        metrics: Metrics,
        event_log: EventLog,
        *,
        request_timeout_s: float,
        first_token_timeout_s: float | None = None,
        clock: Clock = monotonic_ns,
    ) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._event_log = event_log
        self._request_timeout_s = request_timeout_s
        self._first_token_timeout_s = first_token_timeout_s
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self.waiting_tokens = 0  # prompt tokens of requests without a first token
        cluster.attach(self)

    @property
    def num_requests(self) -> int:
        return len(self._flights)

    # ---- from the HTTP side

    def submit(self, request: EngineRequest, sink: Sink, client_request_id: str = "") -> None:
        """Route and send a request. Raises WorkerLostError when no instance can take it."""
        route = self._cluster.pick(request)
        record = RequestRecord(
            request_id=request.request_id,
            client_request_id=client_request_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            instances=route.instances,
            events=[
                Event(EventKind.ARRIVED, request.arrived_ns, ROUTER),
                Event(EventKind.ROUTED, self._clock(), ROUTER),
            ],
        )
        lease = Lease(self._cluster, route, len(request.prompt_token_ids))
        flight = Flight(request, sink, route, lease, record)
        assert request.request_id not in self._flights
        self._flights[request.request_id] = flight
        self.waiting_tokens += len(request.prompt_token_ids)
        try:
            self._dispatch(request, route)
        except WorkerLostError as error:
            if self._flights.get(request.request_id) is flight:  # else `on_lost` has ended it
                self._end(flight, EventKind.FAILED, str(error))
                self._abort_rest(flight, str(error))
            raise
        self._set_deadlines(flight)

    def _dispatch(self, request: EngineRequest, route: Route) -> None:
        producer, consumer = route.producer, route.consumer
        if consumer is None:
            producer.send(Submit(request))
            return
        ready = consumer.ready
        if ready is None:
            raise WorkerLostError(f"{consumer.instance} is gone; try again")
        # The consumer first: the producer can store into its pages from the start if it knows the
        # slots by then.
        consumer.send(Expect(request, producer.instance))
        producer.send(Prefill(request, consumer.instance, ready.peer_address))

    def abort(self, request_id: str, reason: str) -> None:
        """The client is gone, or wants no more. Unknown ids are ignored."""
        flight = self._flights.get(request_id)
        if flight is not None:
            flight.record.finish_reason = "abort"
            self._metrics.of(flight.working[-1]).success["abort"].inc()
            self._end(flight, EventKind.FAILED, reason)
            self._abort_rest(flight, reason)

    # ---- from the instances

    def on_ready(self, instance: str) -> None:
        self._cluster.introduce(instance)

    def on_met(self, instance: str, met: Met) -> None:
        self._cluster.met(instance, met)

    def on_lost(self, instance: str, reason: str) -> None:
        """Every request that the instance still worked on fails at once."""
        self._cluster.forget(instance)
        error = WorkerLostError(f"{instance} was lost: {reason}; try again")
        lost = [flight for flight in self._flights.values() if instance in flight.working]
        for flight in lost:
            flight.working.remove(instance)
            self._fail(flight, error)
        _flush([flight.sink for flight in lost])

    def on_step(self, instance: str, result: StepResult) -> None:
        now_ns = self._clock()
        touched: list[Sink] = []
        for output in result.outputs:
            flight = self._flights.get(output.request_id)
            if flight is None:
                continue
            try:
                self._take(flight, instance, result.t_ns, output, now_ns)
            except Exception:  # one request's bug must not take the whole step with it
                _log.exception("request %s failed in the front door", output.request_id)
                if output.request_id in self._flights:
                    self._fail(flight, RequestError("internal error in the front door"))
            touched.append(flight.sink)
        for failure in result.failures:
            flight = self._flights.get(failure.request_id)
            if flight is not None:
                flight.record.events.extend(failure.events)
                if instance in flight.working:
                    flight.working.remove(instance)
                self._fail(flight, _error_of(failure))
                touched.append(flight.sink)
        _flush(touched)

    # ---- one request

    def _take(self, flight: Flight, instance: str, t_ns: int, output: Output, now_ns: int) -> None:
        if output.events:
            self._note_events(flight, output.events)
        consumer = flight.route.consumer
        if consumer is None or instance != consumer.instance:
            self._deliver(flight, instance, t_ns, output, now_ns)
        elif not flight.last_token_ns:
            if output.token_ids or output.finish_reason:
                flight.early.append((instance, t_ns, output))
        else:
            self._taken_over(flight)
            self._deliver(flight, instance, t_ns, output, now_ns)

    def _note_events(self, flight: Flight, events: Sequence[Event]) -> None:
        flight.record.events.extend(events)
        for event in events:
            if event.kind in _TAKEN_OVER:
                self._taken_over(flight)
            if event.kind is EventKind.TRANSFER_END:
                starts = [
                    e.t_ns for e in flight.record.events if e.kind is EventKind.TRANSFER_START
                ]
                seconds = (event.t_ns - starts[0]) / 1e9 if starts else None
                self._metrics.transfer(flight.route.producer.instance, event, seconds)

    def _taken_over(self, flight: Flight) -> None:
        """The consumer has all of the request: the producer may die without harm.

        Not before the first token is here, which only the producer sends.
        """
        producer = flight.route.producer.instance
        if flight.route.consumer is not None and flight.last_token_ns and len(flight.working) > 1:
            flight.working.remove(producer)
            flight.lease.release(producer)

    def _deliver(
        self, flight: Flight, instance: str, t_ns: int, output: Output, now_ns: int
    ) -> None:
        sink, record = flight.sink, flight.record
        if output.num_cached_tokens is not None:  # with the first token, or at the end
            record.num_cached_tokens = output.num_cached_tokens
        before = sink.num_tokens
        finish_reason = sink.on_output(output)
        num_new = sink.num_tokens - before
        if output.token_ids:
            metrics = self._metrics.of(instance)
            first = not flight.last_token_ns
            if first:
                self._first_token(flight, output, now_ns)
                metrics.time_to_first_token.observe((now_ns - flight.request.arrived_ns) / 1e9)
                metrics.prompt_tokens.inc(len(flight.request.prompt_token_ids))
            else:
                metrics.inter_token_latency.observe((now_ns - flight.last_token_ns) / 1e9)
            for i in range(num_new):
                kind = EventKind.FIRST_TOKEN if first and i == 0 else EventKind.TOKEN
                record.events.append(Event(kind, t_ns, instance))
            metrics.generation_tokens.inc(num_new)
            flight.last_token_ns = now_ns
        if finish_reason is not None:
            self._finish(flight, instance, finish_reason, output.finish_reason is not None)
        elif flight.early and flight.last_token_ns:
            early, flight.early = flight.early, []
            self._taken_over(flight)
            for held in early:
                if flight.request.request_id in self._flights:
                    self._deliver(flight, *held, now_ns)

    def _first_token(self, flight: Flight, output: Output, now_ns: int) -> None:
        self.waiting_tokens -= len(flight.request.prompt_token_ids)
        flight.lease.prefilled()
        if flight.first_token_deadline is not None:
            flight.first_token_deadline.cancel()

    def _finish(self, flight: Flight, instance: str, reason: FinishReason, by_engine: bool) -> None:
        metrics = self._metrics.of(instance)
        metrics.success[reason].inc()
        metrics.e2e_latency.observe((self._clock() - flight.request.arrived_ns) / 1e9)
        flight.record.finish_reason = reason
        self._end(flight, EventKind.FINISHED, "")
        if by_engine and instance in flight.working:
            flight.working.remove(instance)
        self._abort_rest(flight, "finished")

    def _fail(self, flight: Flight, error: RequestError) -> None:
        self._end(flight, EventKind.FAILED, f"{error.code}: {error}")
        self._abort_rest(flight, str(error))
        flight.sink.on_failed(error)

    def _end(self, flight: Flight, kind: EventKind, detail: str) -> None:
        del self._flights[flight.request.request_id]
        if not flight.last_token_ns:
            self.waiting_tokens -= len(flight.request.prompt_token_ids)
        for deadline in (flight.deadline, flight.first_token_deadline):
            if deadline is not None:
                deadline.cancel()
        flight.lease.release_all()
        record = flight.record
        record.num_output_tokens = flight.sink.num_tokens
        record.events.append(Event(kind, self._clock(), ROUTER, detail=detail))
        self._event_log.append(record)

    def _abort_rest(self, flight: Flight, reason: str) -> None:
        """Tell every instance that may still hold something of it."""
        for instance in flight.working:
            with contextlib.suppress(WorkerLostError):
                self._cluster.client(instance).send(Abort(flight.request.request_id, reason))

    # ---- deadlines

    def _set_deadlines(self, flight: Flight) -> None:
        flight.deadline = self._deadline(flight, self._request_timeout_s, "the request")
        if self._first_token_timeout_s is not None:
            flight.first_token_deadline = self._deadline(
                flight, self._first_token_timeout_s, "its first token"
            )

    def _deadline(self, flight: Flight, seconds: float, what: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._expire, flight, seconds, what)

    def _expire(self, flight: Flight, seconds: float, what: str) -> None:
        if self._flights.get(flight.request.request_id) is flight:
            text = f"{what} took over {seconds:g} s: raise the server's limit or send less work"
            self._fail(flight, DeadlineError(text))
            flight.sink.flush()


def _flush(sinks: list[Sink]) -> None:
    for sink in sinks:
        sink.flush()


def _error_of(failure: Failure) -> RequestError:
    """The error that the instance reported, as an exception of the same status."""
    for kind in (InvalidRequestError, OverloadedError, WorkerLostError, DeadlineError):
        if kind.status == failure.status:
            error: RequestError = kind(failure.message)
            break
    else:
        error = RequestError(failure.message)
        error.status = failure.status
    error.code = failure.code
    return error
