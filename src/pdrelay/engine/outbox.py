"""Collects what one step has to tell the front door, and sends it as one message."""

from __future__ import annotations

from pdrelay.core.events import Event
from pdrelay.core.messages import Failure, Output, StepResult, WorkerStats
from pdrelay.errors import RequestError


class Outbox:
    def __init__(self) -> None:
        self._outputs: dict[str, Output] = {}
        self._failures: list[Failure] = []

    def output(self, request_id: str) -> Output:
        """The request's entry of this step, made on first use."""
        entry = self._outputs.get(request_id)
        if entry is None:
            entry = self._outputs[request_id] = Output(request_id=request_id)
        return entry

    def event(self, request_id: str, event: Event) -> None:
        entry = self.output(request_id)
        entry.events = [*entry.events, event]

    def fail(self, request_id: str, error: RequestError) -> None:
        """Report a request that holds nothing here any more."""
        entry = self._outputs.pop(request_id, None)
        self._failures.append(
            Failure(
                request_id=request_id,
                status=error.status,
                code=error.code,
                message=str(error),
                events=entry.events if entry else [],
            )
        )

    def take(self, t_ns: int, stats: WorkerStats | None) -> StepResult | None:
        """Everything collected since the last call, or None when there is nothing to say."""
        if not self._outputs and not self._failures and stats is None:
            return None
        result = StepResult(
            t_ns=t_ns,
            outputs=list(self._outputs.values()),
            failures=self._failures,
            stats=stats,
        )
        self._outputs, self._failures = {}, []
        return result
