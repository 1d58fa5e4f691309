"""Where the choices of one HTTP request come together: collected whole, or streamed.

Deltas arrive by plain calls from the flow, within the step's message. A stream is written straight
to the transport, once a step: no task, queue or wake-up a token.
"""

from __future__ import annotations

import abc
import asyncio

from pdrelay.errors import RequestError
from pdrelay.router.openai.choice import Choice, Delta
from pdrelay.router.openai.formats import DONE, Format, error_event, usage_of
from pdrelay.router.openai.validate import Job


class Response(abc.ABC):
    """The owner of its choices. `over` is set when all are finished, or one failed."""

    def __init__(self, job: Job, form: Format) -> None:
        self.choices: list[Choice] = []  # filled by the handler before anything is submitted
        self.error: RequestError | None = None
        self.over = asyncio.Event()
        self._job = job
        self._format = form
        self._num_open = job.num_choices

    def on_delta(self, choice: Choice, delta: Delta) -> None:
        if self.over.is_set():
            return
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._take(choice, delta)
        if not self._num_open:
            self._complete()
            self.over.set()

    def on_failed(self, error: RequestError) -> None:
        if not self.over.is_set():
            self.error = error
            self._fail(error)
            self.over.set()

    def flush(self) -> None:  # noqa: B027 (a hook)
        """After each step."""

    @abc.abstractmethod
    def _take(self, choice: Choice, delta: Delta) -> None: ...

    def _complete(self) -> None:  # noqa: B027 (a hook)
        """All choices are finished."""

    def _fail(self, error: RequestError) -> None:  # noqa: B027 (a hook)
        """`error` ends the response."""


class WholeResponse(Response):
    """Collects everything; `body` once `over` is set without an error."""

    def __init__(self, job: Job, form: Format) -> None:
        super().__init__(job, form)
        self._totals = [Delta(token_ids=[], offsets=[]) for _ in range(job.num_choices)]
        self._texts: list[list[str]] = [[] for _ in range(job.num_choices)]

    def body(self) -> bytes:
        for total, pieces in zip(self._totals, self._texts, strict=True):
            total.text = "".join(pieces)
        return self._format.response(self.choices, self._totals)

    def _take(self, choice: Choice, delta: Delta) -> None:
        total = self._totals[choice.index]
        self._texts[choice.index].append(delta.text)
        total.token_ids += delta.token_ids
        total.offsets += delta.offsets
        if delta.logprobs is not None:
            total.logprobs = total.logprobs or []
            total.logprobs += delta.logprobs
        total.finish_reason, total.stop_reason = delta.finish_reason, delta.stop_reason


class StreamedResponse(Response):
    """Server-sent events. `started` is set when there is something to send, or an error."""

    def __init__(self, job: Job, form: Format, *, max_buffer: int) -> None:
        super().__init__(job, form)
        self.started = asyncio.Event()
        self._max_buffer = max_buffer
        self._pieces: list[bytes] = []
        self._any_sent = False  # or about to be: too late for an HTTP status
        self._transport: asyncio.WriteTransport | None = None
        self._chunked = False

    @property
    def refused(self) -> bool:
        """Failed before its first byte."""
        return self.error is not None and not self._any_sent

    def take(self) -> bytes:
        """What is to be sent so far."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    def attach(self, transport: asyncio.WriteTransport, *, chunked: bool) -> None:
        """From now on write to `transport`, in HTTP/1.1 chunks or as they are."""
        self._transport, self._chunked = transport, chunked
        self.flush()

    def flush(self) -> None:
        transport = self._transport
        if transport is None:
            if self._pieces or self.error is not None:
                self.started.set()
            return
        if not self._pieces or transport.is_closing():
            return
        data = self.take()
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if transport.get_write_buffer_size() > self._max_buffer:
            transport.abort()  # the client reads too slowly; its handler is cancelled

    def _take(self, choice: Choice, delta: Delta) -> None:
        usage = usage_of(self._job, [choice]) if self._job.continuous_usage else None
        self._pieces.append(self._format.chunk(choice, delta, usage))
        self._any_sent = True

    def _complete(self) -> None:
        if self._job.include_usage:
            self._pieces.append(self._format.usage_chunk(usage_of(self._job, self.choices)))
        self._pieces.append(DONE)

    def _fail(self, error: RequestError) -> None:
        if self._any_sent:
            self._pieces.append(error_event(error))
