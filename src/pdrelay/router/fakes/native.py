"""A torch-free engine for tests and benchmarks of the front door: real messages, made-up tokens.

    FakeEngine          one instance: takes ToWorker messages, emits FromWorker messages
    FakeEngineClient    an EngineClient over a FakeEngine in the same process
    fake_cluster        engines and clients of a topology, with producers joined to consumers

Steps run by themselves, `step_delay_s` apart, or one by one with `step()` when `auto` is off, so
that tests can stop a request in any phase.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.events import Event, EventKind
from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import (
    Abort,
    Drain,
    EngineRequest,
    Expect,
    Failure,
    FinishReason,
    FromWorker,
    Meet,
    Met,
    Output,
    Ping,
    Pong,
    Prefill,
    Ready,
    Role,
    StepResult,
    Submit,
    TokenLogprobs,
    TopLogprob,
    ToWorker,
    WorkerStats,
)
from pdrelay.errors import WorkerLostError
from pdrelay.router.engine_client import Listener

TokenOf = Callable[[EngineRequest, int], int]  # (request, output position) -> token id
_BYTES_PER_TOKEN = 1024


def fake_token(request: EngineRequest, position: int) -> int:
    """A lower-case letter that depends on the prompt and the position alone."""
    digest = zlib.crc32(request.prompt_token_ids.tobytes())
    return 97 + (digest + position * 7) % 26


@dataclass
class _Running:
    request: EngineRequest
    num_output: int = 0
    hand_over: Prefill | None = None  # on a producer
    producer: str = ""  # on a consumer
    committed: bool = True  # False: a consumer that waits for its KV


@dataclass
class FakeEngine:
    """`peers` holds every engine by instance id; producers find their consumers there."""

    instance: str
    role: Role = Role.BOTH
    step_delay_s: float = 0.0
    auto: bool = True
    meets: bool = True  # False: `Meet` is answered by `meet()`
    token_of: TokenOf = fake_token
    tokens_per_step: int = 1
    max_model_len: int = 16_384
    peers: MutableMapping[str, FakeEngine] = field(default_factory=dict)
    emit: Callable[[FromWorker], None] = lambda message: None
    stats: WorkerStats = field(default_factory=WorkerStats)
    received: list[ToWorker] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.peers[self.instance] = self
        self.dead = False
        self.stalled = False
        self.draining = False
        self._meets: list[Meet] = []  # not answered yet
        self._requests: dict[str, _Running] = {}
        self._commits: dict[str, tuple[int, int]] = {}  # request: (first token, start_ns)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def request_ids(self) -> list[str]:
        """Requests that hold something here."""
        return list(self._requests)

    def ready(self) -> Ready:
        return Ready(
            instance=self.instance,
            role=self.role,
            pid=0,
            layout=KVLayout(
                num_layers=1,
                num_blocks=64,
                block_size=16,
                num_kv_heads=1,
                head_dim=2,
                dtype="float32",
            ),
            peer_address=f"fake:{self.instance}" if self.role is Role.DECODE else "",
            max_model_len=self.max_model_len,
            transport="fake",
        )

    def start(self) -> None:
        """Say Ready, and step from now on if `auto`. Needs a running event loop."""
        self.emit(self.ready())
        if self.auto:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def kill(self) -> None:
        """Die without a word; whoever owns the connection has to break it."""
        self.dead = True
        self._requests.clear()
        self._meets.clear()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def handle(self, message: ToWorker) -> None:
        self.received.append(message)
        match message:
            case Submit(request=request):
                self._requests[request.request_id] = _Running(request)
            case Prefill(request=request):
                self._requests[request.request_id] = _Running(request, hand_over=message)
            case Expect(request=request, producer=producer):
                self._requests[request.request_id] = _Running(
                    request, num_output=1, producer=producer, committed=False
                )
            case Meet():
                self._meets.append(message)
                if self.meets:
                    self.meet()
            case Abort(request_id=request_id):
                self.aborted.append(request_id)
                self._requests.pop(request_id, None)
                self._commits.pop(request_id, None)
            case Ping(nonce=nonce):
                if not self.stalled:
                    self.emit(Pong(nonce, self._snapshot()))
            case Drain():
                self.draining = True
        self._wake.set()

    def meet(self) -> None:
        """Say that nothing is left to do for the consumers introduced so far."""
        meets, self._meets = self._meets, []
        for each in meets:
            self.emit(Met(each.consumer, each.consumer_address))

    def fail(self, request_id: str, status: int, code: str, message: str) -> None:
        """Report that one request failed here."""
        self._requests.pop(request_id, None)
        failure = Failure(request_id=request_id, status=status, code=code, message=message)
        self.emit(StepResult(t_ns=monotonic_ns(), failures=[failure]))

    # ---- steps

    async def _run(self) -> None:
        while not self.dead:
            if self.stalled or not self._has_work():
                self._wake.clear()
                await self._wake.wait()
                continue
            await asyncio.sleep(self.step_delay_s)
            self.step()

    def resume(self) -> None:
        """End a stall."""
        self.stalled = False
        self._wake.set()

    def _has_work(self) -> bool:
        return any(
            each.committed or each.request.request_id in self._commits
            for each in self._requests.values()
        )

    def step(self) -> None:
        """One forward pass over everything that can run; one message."""
        if self.dead or self.stalled:
            return
        outputs = [self._advance(running) for running in list(self._requests.values())]
        told = [output for output in outputs if output is not None]
        if told:
            self.stats.num_steps += 1
            stats = self._snapshot()
            self.emit(StepResult(t_ns=monotonic_ns(), outputs=told, stats=stats))

    def _advance(self, running: _Running) -> Output | None:
        request_id = running.request.request_id
        output = Output(request_id=request_id)
        if not running.committed:
            commit = self._commits.pop(request_id, None)
            if commit is None:
                return None
            running.committed = True
            output.events = self._transfer_events(running, commit)
        if running.num_output == 0:
            self._prefill(running, output)
        for _ in range(1 if running.hand_over else self.tokens_per_step):
            if output.finish_reason is None:
                self._add_token(running, output)
        if output.finish_reason is not None:
            del self._requests[request_id]
        elif running.hand_over is not None:
            del self._requests[request_id]
            consumer = self.peers.get(running.hand_over.consumer)
            if consumer is not None:
                consumer.commit(request_id, output.token_ids[0])
        return output

    def commit(self, request_id: str, first_token: int) -> None:
        """The producer handed the request over."""
        self._commits[request_id] = (first_token, monotonic_ns())
        self._wake.set()

    def _prefill(self, running: _Running, output: Output) -> None:
        now = monotonic_ns()
        params, prompt = running.request.params, running.request.prompt_token_ids
        self.stats.num_prompt_tokens += len(prompt)
        output.num_cached_tokens = 0
        output.events = [
            Event(EventKind.PREFILL_START, now, self.instance),
            Event(EventKind.PREFILL_END, monotonic_ns(), self.instance),
        ]
        if params.prompt_logprobs is not None:
            rest = [_logprobs(token_id, params.prompt_logprobs) for token_id in prompt[1:]]
            output.prompt_logprobs = [None, *rest]

    def _transfer_events(self, running: _Running, commit: tuple[int, int]) -> list[Event]:
        moved = len(running.request.prompt_token_ids) * _BYTES_PER_TOKEN
        end = Event(
            EventKind.TRANSFER_END,
            monotonic_ns(),
            self.instance,
            num_bytes=moved,
            num_pieces=1,
            transport="fake",
        )
        return [
            Event(EventKind.TRANSFER_START, commit[1], running.producer),
            end,
            Event(EventKind.DECODE_ADMITTED, monotonic_ns(), self.instance),
        ]

    def _add_token(self, running: _Running, output: Output) -> None:
        params = running.request.params
        token_id = self.token_of(running.request, running.num_output)
        running.num_output += 1
        self.stats.num_generated_tokens += 1
        output.token_ids.append(token_id)
        if params.logprobs is not None:
            entry = _logprobs(token_id, params.logprobs)
            output.logprobs = [*(output.logprobs or []), entry]
        output.finish_reason = self._finish_reason(running, token_id)
        if output.finish_reason == "stop":
            output.stop_token_id = token_id

    def _finish_reason(self, running: _Running, token_id: int) -> FinishReason | None:
        params = running.request.params
        if running.num_output > params.min_tokens and token_id in params.terminal_token_ids:
            return "stop"
        return "length" if running.num_output >= params.max_tokens else None

    def _snapshot(self) -> WorkerStats:
        self.stats.t_ns = monotonic_ns()
        self.stats.num_running = sum(each.committed for each in self._requests.values())
        self.stats.num_waiting = len(self._requests) - self.stats.num_running
        self.stats.num_blocks = 64
        self.stats.num_used_blocks = min(len(self._requests), 64)
        self.stats.num_free_blocks = 64 - self.stats.num_used_blocks
        return self.stats


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The chosen token first, then its neighbours."""
    top = [TopLogprob(token_id + i, -0.5 - i, i + 1) for i in range(num_top)]
    return TokenLogprobs(token_id, -0.5, 1, top)


class FakeEngineClient:
    """Delivers messages between the front door and one FakeEngine, in order, by plain calls."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.instance = engine.instance
        self.role = engine.role
        self.ready: Ready | None = None
        self.stats = WorkerStats()
        self.sent: list[ToWorker] = []
        self._listener: Listener | None = None
        self._reason = "is starting"
        engine.emit = self._on_message

    @property
    def alive(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        if self.ready is None:
            return self._reason
        return "has not answered for a while" if self.engine.stalled else ""

    def attach(self, listener: Listener) -> None:
        self._listener = listener

    def send(self, message: ToWorker) -> None:
        if self.ready is None:
            raise WorkerLostError(f"{self.instance} {self._reason}; try again")
        self.sent.append(message)
        self.engine.handle(message)

    def kill(self, reason: str = "was killed by SIGKILL") -> None:
        """The engine dies now."""
        self.engine.kill()
        self.ready = None
        self._reason = reason
        if self._listener is not None:
            self._listener.on_lost(self.instance, reason)

    def restart(self) -> None:
        """A fresh incarnation of a killed engine."""
        self.engine.dead = False
        self.engine.start()

    def _on_message(self, message: FromWorker) -> None:
        match message:
            case Ready():
                self.ready = message
                if self._listener is not None:
                    self._listener.on_ready(self.instance)
            case StepResult():
                if message.stats is not None:
                    self.stats = message.stats
                if self._listener is not None:
                    self._listener.on_step(self.instance, message)
            case Pong():
                self.stats = message.stats
            case Met():
                if self._listener is not None:
                    self._listener.on_met(self.instance, message)


def fake_cluster(
    instances: Mapping[str, Role] | Sequence[str],
    *,
    step_delay_s: float = 0.0,
    auto: bool = True,
    meets: bool = True,
    token_of: TokenOf = fake_token,
    tokens_per_step: int = 1,
) -> list[FakeEngineClient]:
    """Started clients; names alone mean replicas. Needs a running event loop."""
    roles = instances if isinstance(instances, Mapping) else dict.fromkeys(instances, Role.BOTH)
    peers: dict[str, FakeEngine] = {}
    clients = []
    for instance, role in roles.items():
        engine = FakeEngine(
            instance,
            role,
            step_delay_s=step_delay_s,
            auto=auto,
            meets=meets,
            token_of=token_of,
            tokens_per_step=tokens_per_step,
            peers=peers,
        )
        client = FakeEngineClient(engine)
        engine.start()
        clients.append(client)
    return clients
