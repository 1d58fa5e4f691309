"""A vLLM or SGLang instance as an `EngineClient`: the flow's messages become HTTP calls.

    Submit            one streaming call, its tokens relayed
    Prefill, Expect   the two legs of a hand-over, which `http_pd` gives meaning to
    Abort             cancels the call, which closes its connection: the engine aborts

Each call is a task; what it yields becomes a StepResult for the listener. A watch polls the
instance's health, first until it is ready, then for signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp
import msgspec

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import (
    Abort,
    Drain,
    EngineRequest,
    Expect,
    Failure,
    Meet,
    Ping,
    Prefill,
    Ready,
    Role,
    StepResult,
    Submit,
    ToWorker,
    WorkerStats,
)
from pdrelay.errors import (
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    WorkerLostError,
)
from pdrelay.router.engine_client import Listener, Observer
from pdrelay.router.engines.engine_api import Call, EngineApi, api_of
from pdrelay.router.engines.engine_errors import error_text
from pdrelay.router.engines.http_pd import HandOvers, Work
from pdrelay.router.engines.http_session import HttpSession
from pdrelay.router.engines.http_wire import Target, Wire
from pdrelay.router.engines.piece import Leg, Piece, join

_START_POLL_S = 0.1
_STATS_S = 2.0
_PROBE_S = 10.0  # for an answer to a probe
_EVENT_END = b"\n\n"
_DATA = b"data:"
_DONE = b"[DONE]"
_log = logging.getLogger(__name__)
_MAX_ERROR_BYTES = 1 << 16


class HttpEngineClient:
    """Keeps its place when its instance is restarted: `connect` takes the new endpoint."""

    def __init__(
        self,
        instance: str,
        role: Role,
        *,
        session: HttpSession,
        hand_overs: HandOvers,
        ping_interval_s: float = 1.0,
        answer_timeout_s: float = 15.0,
    ) -> None:
        self.instance = instance
        self.role = role
        self.ready: Ready | None = None
        self.stats = WorkerStats()
        self._session = session
        self._hand_overs = hand_overs
        self._ping_interval_s = ping_interval_s
        self._answer_timeout_s = answer_timeout_s
        self._listener: Listener | None = None
        self._observer: Observer | None = None
        self._endpoint: HttpEndpoint | None = None
        self._api: EngineApi | None = None
        self._targets: dict[str, Target] = {}  # by path
        self._headers: dict[str, str] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._news: StepResult | None = None  # not reported yet
        self._last_heard_s = 0.0
        self._counted_s = 0.0
        self._refuses = False  # nothing listens there: known without waiting
        self._reason = "is starting"

    # ---- EngineClient

    @property
    def alive(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        if self.ready is None:
            return self._reason
        if self._refuses:
            return "refuses connections"
        silent_s = time.monotonic() - self._last_heard_s
        return f"has not answered for {silent_s:.0f} s" if silent_s > self._answer_timeout_s else ""

    def attach(self, listener: Listener) -> None:
        self._listener = listener

    def send(self, message: ToWorker) -> None:
        if self._endpoint is None or self.ready is None:
            raise WorkerLostError(f"{self.instance} {self._reason}; try again")
        match message:
            case Submit(request=request):
                self._start(request, functools.partial(self._whole, request))
            case Prefill(request=request):
                self._start(request, self._hand_overs.produce(request, self))
            case Expect(request=request):
                self._start(request, self._hand_overs.consume(request, self))
            case Abort(request_id=request_id):
                call = self._calls.pop(request_id, None)
                if call is not None:
                    call.cancel()
            case Ping() | Drain() | Meet():
                pass  # the watch pings; the supervisor's signal drains; engines connect themselves

    # ---- connection

    @property
    def endpoint(self) -> HttpEndpoint:
        assert self._endpoint is not None
        return self._endpoint

    def connect(self, endpoint: HttpEndpoint, observer: Observer | None = None) -> None:
        """Watch a new incarnation from its start on. Needs a running event loop."""
        self.close("was replaced")
        self._observer = observer
        self._endpoint = endpoint
        self._api = api_of(endpoint)
        self._headers = {"Content-Type": "application/json"}
        if endpoint.api_key:
            self._headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._targets = {
            path: Target.of(endpoint.url + path, self._headers) for path in self._api.paths
        }
        self._reason = "is starting"
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def close(self, reason: str = "was stopped") -> None:
        """Cut every call. What ran is lost. Idempotent."""
        if self._endpoint is None:
            return
        self._report()
        self._endpoint = None
        self.ready = None
        self._reason = reason
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.cancel()
        if self._listener is not None:
            self._listener.on_lost(self.instance, reason)
        self._observer = None

    async def _watch(self) -> None:
        while not await self._answers("/health"):  # noqa: ASYNC110 (HTTP tells nobody)
            await asyncio.sleep(_START_POLL_S)
        while not await self._learn():  # noqa: ASYNC110
            await asyncio.sleep(self._ping_interval_s)
        while True:
            await asyncio.sleep(self._ping_interval_s)
            was_gone = self._refuses
            if await self._answers("/health"):
                if was_gone:  # an attached instance, restarted by whoever started it
                    self.ready = await self._described() or self.ready
                self._last_heard_s = time.monotonic()
                if self._observer is not None:
                    self._observer.report_alive()
                await self._count()

    async def _count(self) -> None:
        """Fetch the instance's own figures, at most every `_STATS_S`."""
        api = self._api
        assert api is not None
        if api.stats_path and time.monotonic() - self._counted_s >= _STATS_S:
            self._counted_s = time.monotonic()
            body = await self._get(api.stats_path)
            if body is not None:
                self.stats = api.read_stats(body)

    async def _answers(self, path: str) -> bool:
        return await self._get(path) is not None

    async def _get(self, path: str) -> bytes | None:
        """The body of a 200, else None."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(_PROBE_S):
                session = self._session.get()
                url = self.endpoint.url + path
                try:
                    async with session.get(url, headers=self._headers) as response:
                        self._refuses = False
                        body = await response.read()
                        return body if response.status == 200 else None
                except aiohttp.ClientConnectorError:
                    self._refuses = True
        return None

    async def _refusal_of(self, path: str) -> int:
        """The status of an answer to an empty object; 0 without one."""
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            async with (
                asyncio.timeout(_PROBE_S),
                self._session.wires.post(self._targets[path], b"{}") as answer,
            ):
                status = await answer.status()
                await answer.read_all(_MAX_ERROR_BYTES)
                return status
        return 0

    async def _learn(self) -> bool:
        """Whether it talks like its engine, which makes it ready."""
        self.ready = await self._described()
        if self.ready is None:
            return False
        self._last_heard_s = time.monotonic()
        if self._observer is not None:
            self._observer.report_ready(self.ready)
        if self._listener is not None:
            self._listener.on_ready(self.instance)
        return True

    async def _described(self) -> Ready | None:
        """What the instance says of itself completes what the launcher knew. None when it does not
        talk like its engine."""
        api = self._api
        assert api is not None
        given = self.endpoint.ready
        answers = {path: await self._get(path) for path in api.fact_paths}
        try:
            facts = api.read_facts(answers)
        except ValueError as error:
            self._reason = f"is no {self.endpoint.engine} server: {_one_line(error)}"
            return None
        api.read_refusals({path: await self._refusal_of(path) for path in api.paths[1:]})
        resolved = {**given.resolved, "api_path": api.path}
        if facts.version:
            resolved["engine_version"] = facts.version
        return msgspec.structs.replace(
            given, max_model_len=facts.max_model_len or given.max_model_len, resolved=resolved
        )

    # ---- calls

    def _start(self, request: EngineRequest, work: Work) -> None:
        request_id = request.request_id
        call = asyncio.get_running_loop().create_task(self._guard(request_id, work))
        self._calls[request_id] = call

    async def _guard(self, request_id: str, work: Work) -> None:
        """Run a call to its end; its failure becomes the request's."""
        try:
            await work()
        except RequestError as error:
            self._fail(request_id, error)
        except (OSError, TimeoutError) as error:
            text = f"{self.instance} broke off ({_one_line(error)}); try again"
            self._fail(request_id, WorkerLostError(text))
        except ValueError as error:  # not what the engine should have sent
            text = f"{self.instance} sent what is not understood: {_one_line(error)}"
            self._fail(request_id, RequestError(text))
        except Exception:  # one request's bug must not leave its client waiting
            _log.exception("request %s failed at %s", request_id, self.instance)
            self._fail(request_id, RequestError("internal error in the front door; see its log"))
        finally:
            if self._calls.get(request_id) is asyncio.current_task():
                del self._calls[request_id]

    def _fail(self, request_id: str, error: RequestError) -> None:
        failure = Failure(
            request_id=request_id, status=error.status, code=error.code, message=str(error)
        )
        self._soon().failures.append(failure)

    def emit(self, request_id: str, piece: Piece) -> None:
        """Report new tokens as this instance's."""
        self._soon().outputs.append(piece.output(request_id))

    def _soon(self) -> StepResult:
        """What the listener hears of at the end of this turn of the loop, all requests at once."""
        if self._news is None:
            self._news = StepResult(t_ns=monotonic_ns())
            asyncio.get_running_loop().call_soon(self._report)
        return self._news

    def _report(self) -> None:
        news, self._news = self._news, None
        if news is not None and self._listener is not None:
            self._listener.on_step(self.instance, news)

    async def _whole(self, request: EngineRequest) -> None:
        params = request.params
        leg = Leg(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stream=params.prompt_logprobs is None,  # which vLLM gives with a whole response only
            wants_usage=True,
        )
        if not leg.stream:
            self.emit(request.request_id, await self.once(request, leg))
            return
        async for piece in self.stream(request, leg):
            self.emit(request.request_id, piece)

    async def once(self, request: EngineRequest, leg: Leg) -> Piece:
        """A whole response. Raises RequestError, OSError, ValueError."""
        async with self._post(request, leg) as (call, answer):
            data = await answer.read_all()
        piece = call.read(data)
        if piece.error:
            raise WorkerLostError(f"{self.instance}: {piece.error}")
        return piece

    async def stream(self, request: EngineRequest, leg: Leg) -> AsyncGenerator[Piece, None]:
        """Pieces as they arrive. Raises as `once` does, and
        WorkerLostError when the stream ends early."""
        finished = False
        held: Piece | None = None  # the last tokens, until what follows tells the cached ones
        async with self._post(request, leg) as (call, answer):
            async for piece in self._pieces(call, answer):
                if held is not None:
                    piece, held = join(held, piece), None
                elif piece.finish_reason is not None and leg.wants_usage:
                    held = piece if piece.num_cached_tokens is None else None
                if held is None and (piece.token_ids or piece.finish_reason is not None):
                    finished = finished or piece.finish_reason is not None
                    yield piece
        if held is not None:
            finished = True
            yield held
        if not finished:
            raise WorkerLostError(f"{self.instance} ended its answer early; try again")

    async def _pieces(self, call: Call, answer: Wire) -> AsyncGenerator[Piece, None]:
        rest = b""
        while data := await answer.read():
            self._last_heard_s = time.monotonic()
            *events, rest = (rest + data if rest else data).split(_EVENT_END)
            for event in events:
                if not event.startswith(_DATA) or event.endswith(_DONE):
                    continue
                piece = call.read(event[len(_DATA) :])
                if piece.error:
                    raise WorkerLostError(f"{self.instance}: {piece.error}")
                yield piece

    @contextlib.asynccontextmanager
    async def _post(self, request: EngineRequest, leg: Leg) -> AsyncIterator[tuple[Call, Wire]]:
        """By the API that every version has, where the better one turns out to be gone: the
        instance was restarted without it. Raises RequestError for any status but 200."""
        api = self._api
        assert api is not None
        while True:
            call = api.call(request, leg)
            async with self._session.wires.post(self._targets[call.path], call.body) as answer:
                status = await answer.status()
                if status == 200:
                    yield call, answer
                    return
                body = await answer.read_all(_MAX_ERROR_BYTES)
            if status not in (403, 404) or call.path not in api.paths[1:]:
                raise self._refusal(status, error_text(body))
            api.read_refusals({call.path: status})

    def _refusal(self, status: int, text: str) -> RequestError:
        text = f"{self.instance} answered {status}: {text}"
        match status:
            case 400 | 422:
                return InvalidRequestError(text)
            case 429:
                return OverloadedError(text)
            case 408 | 504:
                return DeadlineError(text)
            case 401 | 403 | 404:
                return RequestError(text)
            case _:
                return WorkerLostError(f"{text}; try again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
