"""A producer with its thread: consumers are answered and late blocks pushed between steps too."""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Callable

from pdrelay.core.clock import Clock
from pdrelay.integrations.vllm.alarm import Alarm
from pdrelay.integrations.vllm.pages import Fence
from pdrelay.integrations.vllm.producer import Producer
from pdrelay.integrations.vllm.step import StepPlan

_log = logging.getLogger(__name__)

_JOIN_S = 5.0
_STEP_NS = 1_000_000_000  # a step that takes longer is no prefill bound by launches: it compiles
# From a step's last hook until its token is out, where that does not wait for the GPU: vLLM has
# logits and sampling still to launch.
_TOKEN_NS = 3_000_000
_NEWS_NS = 500_000  # what a step without chunks leaves to do; a token may just be on its way out


class ProducerService:
    """The engine's view of a Producer. Every method but `close` is short.

    From the begin of a step with chunks until its token should be out, hooks do what there is to
    do, and the producer's thread sleeps: if anything woke it while kernels are launched, it would
    want the interpreter, and the engine's thread would sleep until it has it back. Hooks wake
    nobody: they set an alarm, and the next such step puts it off. When it rings, the thread takes
    over, and watches the sockets until a step begins.
    """

    def __init__(self, producer: Producer, clock: Clock) -> None:
        """`clock` is CLOCK_MONOTONIC. Raises OSError."""
        self._producer = producer
        self._clock = clock
        self._lock = threading.Lock()
        self._busy = False  # whether the step has chunks; engine's thread only
        self._closed = False
        self._failed = False
        self._alarm = Alarm()
        self._watched = select.epoll()  # where the thread sleeps
        self._watched.register(self._alarm, select.EPOLLIN)
        self._watched.register(producer, select.EPOLLIN)
        self._hooks_attend = False  # else the thread does, and has the sockets in `_watched`
        self._thread = threading.Thread(target=self._run, name="pdrelay-producer", daemon=True)
        self._thread.start()

    # ---- the engine's thread

    def begin_step(self, plan: StepPlan) -> None:
        self._busy = bool(plan.chunks)
        if self._busy or plan.rewound or plan.dropped or plan.refused or plan.held:
            with self._lock:
                if self._busy:
                    self._attend(_STEP_NS)
                self._producer.begin_step(plan)
                if self._busy:
                    self._guarded(self._producer.look)
                elif not self._hooks_attend:
                    self._alarm.set(self._clock() + _NEWS_NS)

    def layer_written(self, layer: int) -> None:
        """Never waits: if the other thread has the lock, a later layer pushes what is due."""
        if not self._busy or not self._producer.layer_due(layer):
            return
        if self._lock.acquire(blocking=False):
            try:
                if not self._hooks_attend:  # a long step
                    self._attend(_STEP_NS)
                self._guarded(self._producer.push)
            finally:
                self._lock.release()

    def end_step(self) -> None:
        if self._busy:
            with self._lock:
                self._guarded(self._producer.look)  # one submission with what the step writes
                self._producer.end_step()
                self._attend(_TOKEN_NS)
            self._busy = False

    def take_finished(self) -> set[str]:
        if not self._hooks_attend and not self._producer.has_finished:
            return set()
        with self._lock:
            if self._hooks_attend:
                self._guarded(self._producer.poll)
            return self._producer.take_finished()

    def take_stats(self) -> dict[str, int]:
        if not self._producer.stats:
            return {}
        with self._lock:
            return self._producer.stats.take()

    def _attend(self, for_ns: int) -> None:
        """Locked: hooks look after the producer, for so long if nothing puts it off."""
        if self._failed:
            return
        if not self._hooks_attend:
            self._hooks_attend = True
            self._watched.unregister(self._producer)
        self._alarm.set(self._clock() + for_ns)

    # ---- either

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._alarm.set(0)
        self._thread.join(_JOIN_S)
        with self._lock:
            self._producer.close()
        if not self._thread.is_alive():
            self._watched.close()
            self._alarm.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Locked. A bug ends the hand-over, not the engine."""
        try:
            work()
        except Exception:
            self._fail()

    def _fail(self) -> None:
        """Locked: consumers see their sockets end, and nobody waits for them."""
        _log.exception("pdrelay hands over no KV any more: restart this instance")
        if self._failed:
            return
        self._failed = True
        if not self._hooks_attend:
            self._watched.unregister(self._producer)
        self._hooks_attend = False
        self._producer.close()
        self._alarm.set(0)  # the thread ends

    # ---- the producer's thread

    def _run(self) -> None:
        while not (self._closed or self._failed):
            self._watched.poll()
            try:
                self._turn()
            except Exception:
                with self._lock:
                    self._fail()

    def _turn(self) -> None:
        with self._lock:
            if self._alarm.rang():
                self._take_over()
            fence = None if self._hooks_attend else self._work()
        while fence is not None:
            fence.wait()
            with self._lock:
                fence = self._work()

    def _take_over(self) -> None:
        if self._hooks_attend:
            self._hooks_attend = False
            self._watched.register(self._producer, select.EPOLLIN)

    def _work(self) -> Fence | None:
        """Locked: do what there is to do; what to wait for next, unless it is an epoll's matter.

        A fence that the thread had to wait for is acted on even if hooks attend by now: it runs."""
        if self._closed or self._failed:
            return None
        self._guarded(self._producer.poll)
        if self._hooks_attend or self._failed:
            return None
        fences = self._producer.open_fences()
        if fences:
            return fences[0]
        self._alarm.set(self._producer.next_deadline_ns())
        return None
