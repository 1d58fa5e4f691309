"""How long a long prompt's arrival holds up the tokens of other streams, front door and client.

Streams get a token each step, all of a step at once, over fake ranks or fake vLLM servers; long
prompts arrive meanwhile, at times that have nothing to do with the steps'. Two views:

    delay    rank's send to client's receipt of each token (CLOCK_MONOTONIC), of steps while a
             prompt was on its way and of all others. The reader is a process that only reads bytes
             and the clock, the prompts come from another one; with --client both are one
             `pdrelay.bench` load, as in the lab.
    turns    CPU time of turns of the front door's event loop (between two questions for events: no
             token is relayed in one) that worked on a long prompt, and what it went to. `rest` is
             aiohttp, asyncio, and the tokens of a step that fell into the turn.

    python benchmarks/relay_tail.py                    ids over native ranks, prefill and decode
    python benchmarks/relay_tail.py --prompt text      text, through a BPE tokenizer made here
    python benchmarks/relay_tail.py --engine vllm-pd   over HTTP; or vllm
    python benchmarks/relay_tail.py --client           the load generator's own turns as well
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib
import json
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

START_S = 30.0
MAX_MODEL_LEN = 65_536
LOW, HIGH = 97, 123  # ids that the byte-level tokenizer has, and that are text
WORDS = 4000  # different words in text prompts


# ---- the ranks' process: logs [t_ns, [stream, ...]] a step


class SendLog:
    """Which streams' tokens were sent when. A stream's prompt begins with its number, twice."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[int]]] = []
        self._streams: dict[str, int] = {}

    def meet(self, request_id: str, prompt: Sequence[int]) -> None:
        if len(prompt) == 8 and prompt[0] == prompt[1]:
            self._streams[request_id] = prompt[0] - LOW

    def sent(self, request_ids: Sequence[str]) -> None:
        now = time.monotonic_ns()
        streams = [self._streams[each] for each in request_ids if each in self._streams]
        if streams:
            self.steps.append((now, streams))


class Ticks:
    """Wakes everyone who waits at the same times, `step_s` apart whatever a step takes."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next = asyncio.get_running_loop().time() + step_s
        self._event = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(0.0, self._next - loop.time()))
            self._next += self._step_s
            event, self._event = self._event, asyncio.Event()
            event.set()

    async def wait(self) -> None:
        await self._event.wait()


async def run_native_ranks(fds: list[int], step_s: float, log: SendLog) -> None:
    """One replica, or producer and consumer, each behind its socket. A producer answers at once."""
    from pdrelay.core.channel import Channel
    from pdrelay.core.messages import Expect, Prefill, Role, StepResult, Submit, ToWorker
    from pdrelay.router.fakes.native import FakeEngine

    *producers, last = fds
    roles = [Role.PREFILL] * len(producers) + [Role.DECODE if producers else Role.BOTH]
    peers: dict[str, FakeEngine] = {}
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    engines = []
    for i, (fd, role) in enumerate(zip(fds, roles, strict=True)):
        channel: Channel[Any] = Channel(socket.socket(fileno=fd), ToWorker)

        def emit(message: Any, channel: Channel[Any] = channel, is_last: bool = fd == last) -> None:
            if isinstance(message, StepResult) and is_last:
                log.sent([each.request_id for each in message.outputs])
            channel.send(message)

        engine = FakeEngine(
            f"{role}-{i}", role, auto=False, max_model_len=MAX_MODEL_LEN, peers=peers, emit=emit
        )
        engines.append(engine)

        def readable(channel: Channel[Any] = channel, engine: FakeEngine = engine) -> None:
            for message in channel.receive():
                if isinstance(message, (Submit, Prefill, Expect)):
                    log.meet(message.request.request_id, message.request.prompt_token_ids)
                engine.handle(message)
                if isinstance(message, Prefill):
                    engine.step()
            engine.received.clear()
            if channel.closed:
                over.set()

        loop.add_reader(channel.fileno(), readable)
    for engine in engines:
        engine.start()
    ticks = Ticks(step_s)

    async def step() -> None:
        while True:
            await ticks.wait()
            engines[-1].step()

    stepper = asyncio.create_task(step())
    await over.wait()
    stepper.cancel()


async def run_vllm(step_s: float, log: SendLog) -> None:
    """A fake vLLM server whose streams all step at once. Long prompts get their tokens at once."""
    from pdrelay.router.fakes.vllm import FakeVllm

    class SteppedVllm(FakeVllm):
        def token(self, prompt: Sequence[int], i: int) -> int:
            key = str(prompt[0])
            log.meet(key, prompt)
            log.sent([key])
            return LOW + i % (HIGH - LOW)

        async def step(self) -> None:
            await ticks.wait()

    ticks = Ticks(step_s)
    fake = SteppedVllm(model="tiny", max_model_len=MAX_MODEL_LEN)
    fake.alone = True
    await fake.start(0)
    print(fake.url, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await fake.stop()


async def run_ranks(args: argparse.Namespace) -> None:
    from pdrelay.core.time_slice import SHORT_SLICE_NS, request_short_slices

    log = SendLog()
    gc.disable()
    request_short_slices(SHORT_SLICE_NS)
    if args.fds:
        await run_native_ranks(args.fds, args.step_ms / 1e3, log)
    else:
        await run_vllm(args.step_ms / 1e3, log)
    write_json(args.out, log.steps)


def write_json(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value))


# ---- turns of an event loop, and what they spend their time on


class Spans:
    """CPU time of wrapped functions by label, less what wrapped functions inside them took."""

    def __init__(self) -> None:
        self.turn: dict[str, int] = defaultdict(int)  # ns of the current turn
        self.marked = False  # the turn worked on a long prompt
        self.collections: list[int] = []  # ns each
        self._inner = [0]

    def wrap(self, owner: Any, name: str, label: str, long: Callable[..., bool] | None) -> None:
        """`long` tells from the call's arguments whether it is about a long prompt."""
        inside = getattr(owner, name)

        def outside(*args: Any, **kwargs: Any) -> Any:
            if long is not None and not self.marked:
                self.marked = long(*args)
            start = time.thread_time_ns()
            self._inner.append(0)
            try:
                return inside(*args, **kwargs)
            finally:
                spent = time.thread_time_ns() - start
                self.turn[label] += spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, name, outside)

    def watch_collector(self) -> None:
        started = 0

        def collecting(phase: str, info: dict[str, int]) -> None:
            nonlocal started
            if phase == "start":
                started = time.thread_time_ns()
            else:
                spent = time.thread_time_ns() - started
                self.turn["collector"] += spent
                self.collections.append(spent)
                self._inner[-1] += spent

        gc.callbacks.append(collecting)


class TurnSelector(selectors.EpollSelector):
    """Notes each turn: CPU time from one select's end to the next one's start."""

    def __init__(self, spans: Spans) -> None:
        super().__init__()
        self.turns: list[dict[str, int]] = []
        self.others: list[int] = []  # ns of turns without a long prompt
        self._spans = spans
        self._start = 0

    def select(self, timeout: float | None = None) -> Any:
        spans = self._spans
        total = time.thread_time_ns() - self._start
        if self._start:
            if spans.marked:
                if not self.turns:  # what came before was the start
                    self.others.clear()
                    spans.collections.clear()
                self.turns.append({"turn": total, **spans.turn})
            else:
                self.others.append(total)
        spans.turn.clear()
        spans.marked = False
        events = super().select(timeout)
        self._start = time.thread_time_ns()
        return events

    def report(self) -> dict[str, Any]:
        return {
            "turns": self.turns,
            "others": self.others,
            "collections": self._spans.collections,
        }


def _long_bytes(*args: Any) -> bool:
    return any(isinstance(each, (bytes, bytearray)) and len(each) > 6000 for each in args)


def _long_request(*args: Any) -> bool:
    request = getattr(args[-1], "request", args[-1])
    return len(getattr(request, "prompt_token_ids", None) or ()) > 1000


_FRONT_DOOR = (
    ("aiohttp.web_protocol:RequestHandler", "data_received", "read", _long_bytes),
    ("pdrelay.router.openai.generate", "decode_body", "JSON", _long_bytes),
    ("pdrelay.router.openai.generate", "completion_prompts", "JSON", None),
    ("pdrelay.router.openai.token_list:TokenLists", "_extend", "JSON", _long_bytes),
    ("pdrelay.model.tokenizer:HfTokenizer", "encode", "tokenize", None),
    ("pdrelay.router.openai.generate", "completion_job", "job", None),
    ("pdrelay.router.openai.generate", "pack_ids", "to array", None),
    ("pdrelay.router.openai.generate:Generator", "_submit", "submit", None),
    ("pdrelay.router.policy:PrefixIndex", "keys", "prefix keys", _long_request),
    ("pdrelay.router.cluster:Cluster", "pick", "route", _long_request),
    ("pdrelay.router.engine_client:StreamEngineClient", "send", "to ranks", _long_request),
    ("pdrelay.router.engines.http_client:HttpEngineClient", "send", "to ranks", _long_request),
    ("pdrelay.router.engines.vllm_api", "body", "HTTP body", None),
    ("pdrelay.router.engines.vllm_tokens_api", "body", "HTTP body", None),
    ("aiohttp.client_reqrep:ClientRequest", "__init__", "HTTP request", None),
    ("pdrelay.router.engines.http_wire:Wire", "send", "HTTP request", _long_bytes),
    ("asyncio.selector_events:_SelectorSocketTransport", "write", "write", _long_bytes),
    ("pdrelay.router.flow:Flow", "on_step", "tokens", None),
    ("pdrelay.router.event_log:EventLog", "append", "event log", None),
)
_CLIENT = (
    ("pdrelay.bench.endpoint:BodyEncoder", "__call__", "body", _long_request),
    ("pdrelay.bench.client:_Load", "_open_record", "record", _long_request),
    ("aiohttp.client_reqrep:ClientRequest", "__init__", "HTTP request", None),
    ("asyncio.selector_events:_SelectorSocketTransport", "write", "write", _long_bytes),
    ("asyncio.selector_events:_SelectorSocketTransport", "writelines", "write", None),
    ("pdrelay.bench.client:_Stream", "feed", "tokens", None),
)


def instrumented(targets: Sequence[tuple[str, str, str, Any]]) -> TurnSelector:
    """Wraps what there is of `targets`, so that older code can be measured, too."""
    spans = Spans()
    for where, name, label, long in targets:
        module, _, kind = where.partition(":")
        with contextlib.suppress(ImportError, AttributeError):
            owner = importlib.import_module(module)
            spans.wrap(getattr(owner, kind) if kind else owner, name, label, long)
    spans.watch_collector()
    return TurnSelector(spans)


def run_loop(main: Any, selector: TurnSelector | None) -> None:
    with asyncio.Runner(
        loop_factory=None if selector is None else partial(asyncio.SelectorEventLoop, selector)
    ) as runner:
        runner.run(main)


# ---- the front door's process


async def run_router(args: argparse.Namespace) -> None:
    from aiohttp import web
    from router_relay import http_clients

    from pdrelay.core.heap import settle_heap
    from pdrelay.core.messages import Role
    from pdrelay.core.time_slice import RELAY_SLICE_NS, request_short_slices
    from pdrelay.router.app import build_app
    from pdrelay.router.cluster import Cluster
    from pdrelay.router.config import ModelInfo, RouterConfig
    from pdrelay.router.engine_client import StreamEngineClient
    from pdrelay.router.event_log import EventLog
    from pdrelay.router.server import make_runner

    if args.urls:
        clients = http_clients(args.urls)
    else:
        clients = []
        for i, fd in enumerate(args.fds):
            is_last = i == len(args.fds) - 1
            role = Role.BOTH if i == 0 and is_last else Role.DECODE if is_last else Role.PREFILL
            client = StreamEngineClient(f"{role}-{i}", role)
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            client.connect(sock)
            clients.append(client)
    config = RouterConfig(max_num_requests=100_000, drain_timeout_s=0.1)
    model = ModelInfo("tiny", "tiny", MAX_MODEL_LEN, make_tokenizer())
    request_short_slices(RELAY_SLICE_NS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    events = EventLog(args.out + ".events")
    runner = make_runner(build_app(config, model, Cluster(clients), events), config)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    settle_heap()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for client in clients:
        client.close()
    await runner.cleanup()


def text_words() -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 9))) for _ in range(WORDS)]


def make_tokenizer() -> Any:
    """Byte-level BPE with merges, as real models have; about a token a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from pdrelay.model.tokenizer import HfTokenizer

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(text_words())], trainer)
    return HfTokenizer(backend, 128_256)


# ---- clients


def long_body(rng: random.Random, args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    if args.prompt == "text":
        prompt: Any = " ".join(rng.choices(words, k=args.length))
    else:
        prompt = [rng.randrange(1000, 128_000) for _ in range(args.length - 1)]
        prompt.append(rng.randrange(1000, 2000))  # that the tokenizer has
    return {"prompt": prompt, "max_tokens": 2}


def stream_prompt(i: int) -> list[int]:
    return [LOW + i, LOW + i, *range(LOW, LOW + 6)]


def arrival_times(args: argparse.Namespace) -> list[float]:
    """Seconds; the phase within a step is random."""
    rng = random.Random(args.seed)
    count = int((args.seconds - 1.5) * args.rate)
    return [1.0 + (i + rng.random() * 0.5) / args.rate for i in range(count)]


def http_post(port: int, body: dict[str, Any]) -> bytes:
    data = json.dumps({**body, "stream": True, "temperature": 0}, separators=(",", ":")).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(data)}"
    return f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + data


def run_reader(args: argparse.Namespace) -> None:
    """Reads the streams. Writes [[t_ns, number of tokens], ...] a stream."""
    from pdrelay.core.time_slice import RELAY_SLICE_NS, request_short_slices

    num_tokens = int(args.seconds * 1e3 / args.step_ms)
    poller = selectors.EpollSelector()
    reads: list[list[tuple[int, bytes]]] = [[] for _ in range(args.streams)]
    socks = []
    for i in range(args.streams):
        sock = socket.create_connection(("127.0.0.1", args.port))
        sock.sendall(http_post(args.port, {"prompt": stream_prompt(i), "max_tokens": num_tokens}))
        poller.register(sock, selectors.EVENT_READ, (sock, reads[i]))
        socks.append(sock)
    gc.disable()
    request_short_slices(RELAY_SLICE_NS)
    left = args.streams
    print("ready", flush=True)
    while left:
        for key, _ in poller.select():
            sock, log = key.data
            data = sock.recv(1 << 16)
            log.append((time.monotonic_ns(), data))
            if not data or b"[DONE]" in data:
                poller.unregister(sock)
                left -= 1
    tokens = [
        [(t, data.count(b"data: {")) for t, data in log if data.count(b"data: {")] for log in reads
    ]
    write_json(args.out, tokens)


def run_sender(args: argparse.Namespace) -> None:
    """Sends the prompts at their times. Writes [[sent_ns, first token ns, end ns], ...]."""
    rng, words = random.Random(args.seed), text_words()
    posts = [http_post(args.port, long_body(rng, args, words)) for _ in arrival_times(args)]
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    windows = []
    sock = socket.create_connection(("127.0.0.1", args.port))
    for due, post in zip(arrival_times(args), posts, strict=True):
        time.sleep(max(0.0, start + due - time.monotonic()))
        sent = time.monotonic_ns()
        sock.sendall(post)
        first, data = 0, b""
        while b"[DONE]" not in data or not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(1 << 16)
            if not first and b"data: {" in data:
                first = time.monotonic_ns()
        windows.append((sent, first, time.monotonic_ns()))
    write_json(args.out, windows)


async def run_bench_client(args: argparse.Namespace, turns: TurnSelector | None) -> None:
    """Streams and prompts as the lab sends them. Writes what reader and sender write, together."""
    from pdrelay.bench.client import ClosedLoop, OpenLoop, run_load
    from pdrelay.bench.request import BenchRequest

    rng, words = random.Random(args.seed), text_words()
    num_tokens = int(args.seconds * 1e3 / args.step_ms)
    streams = [
        BenchRequest(i, 0.0, stream_prompt(i), None, num_tokens) for i in range(args.streams)
    ]
    longs = []
    for i, due in enumerate(arrival_times(args)):
        prompt = long_body(rng, args, words)["prompt"]
        text = prompt if isinstance(prompt, str) else None
        longs.append(BenchRequest(i, due, prompt if text is None else None, text, 2))
    url = f"http://127.0.0.1:{args.port}"
    reading = asyncio.create_task(run_load(url, streams, model="tiny", mode=ClosedLoop(1000)))
    await asyncio.sleep(0.1)
    sent = await run_load(url, longs, model="tiny", mode=OpenLoop())
    read = await reading
    assert all(record.ok for record in (*read.records, *sent.records))
    result = {
        "tokens": [[(t, 1) for t in record.chunk_ns] for record in read.records],
        "windows": [(r.sent_ns, r.first_token_ns, r.end_ns) for r in sent.records],
        "lag_us": [round((r.sent_ns - r.intended_ns) / 1e3) for r in sent.records],
        "turns": None if turns is None else turns.report(),
    }
    write_json(args.out, result)


# ---- the experiment


class Child:
    """This script in another process, in another role."""

    def __init__(
        self, args: argparse.Namespace, role: str, *more: str, fds: Sequence[int] = ()
    ) -> None:
        self.out = str(Path(args.directory) / f"{role}-{len(os.listdir(args.directory))}.json")
        Path(self.out).touch()
        command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--role", role]
        for name in ("engine", "prompt", "length", "streams", "step_ms", "rate", "seconds", "seed"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        command += ["--out", self.out, *more]
        if fds:
            command += ["--fds", *map(str, fds)]
        self.process = subprocess.Popen(
            command, pass_fds=list(fds), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        args.children.append(self.process)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def finish(self, seconds: float = START_S) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.wait(seconds):
            raise SystemExit("a process failed; see above")

    def result(self) -> Any:
        return json.loads(Path(self.out).read_text())


@contextlib.contextmanager
def front_door(args: argparse.Namespace, *more: str) -> Iterator[tuple[int, list[Child], Child]]:
    """(port, processes of the ranks, the front door)"""
    if args.engine == "native":
        pairs = [socket.socketpair() for _ in range(args.producers + 1)]
        ranks = [Child(args, "ranks", fds=[theirs.fileno() for _, theirs in pairs])]
        router = Child(args, "router", *more, fds=[ours.fileno() for ours, _ in pairs])
        for pair in pairs:
            for each in pair:
                each.close()
    else:
        ranks = [Child(args, "ranks") for _ in range(2 if args.engine == "vllm-pd" else 1)]
        router = Child(args, "router", *more, "--urls", *(rank.line() for rank in ranks))
    port = int(router.line())
    wait_healthy(port)
    yield port, ranks, router
    router.finish()
    for rank in ranks:
        rank.finish()


def wait_healthy(port: int) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        time.sleep(0.05)
    raise SystemExit("the front door did not become healthy")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    at = partial(_at, ordered)
    return {
        "n": len(ordered),
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p99.9": at(0.999),
        "max": at(1.0),
    }


def _at(ordered: Sequence[float], share: float) -> float:
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3)


def delays(steps: Any, tokens: Any, windows: Any) -> dict[str, Any]:
    """Matches the i-th token that a stream was sent with the i-th that it received, from the end
    (token 1 of P/D is another rank's)."""
    sent: dict[int, list[int]] = defaultdict(list)
    for t, streams in sorted(steps):
        for stream in streams:
            sent[stream].append(t)
    with_prompt: list[float] = []
    without: list[float] = []
    gaps: list[float] = []
    sent_gaps: list[float] = []
    begin = min(first for first, *_ in windows) - 200_000_000
    end = max(last for *_, last in windows) + 200_000_000
    for stream, received in enumerate(tokens):
        times = [t for t, count in received for _ in range(count)]
        pairs = list(zip(reversed(sent[stream]), reversed(times), strict=False))[::-1]
        pairs = [(a, b) for a, b in pairs if begin < a < end]
        gaps += [(b[1] - a[1]) / 1e6 for a, b in pairwise(pairs)]
        sent_gaps += [(b[0] - a[0]) / 1e6 for a, b in pairwise(pairs)]
        i = 0
        for a, b in pairs:
            while i < len(windows) and windows[i][2] < a:
                i += 1
            busy = i < len(windows) and windows[i][0] < b
            (with_prompt if busy else without).append((b - a) / 1e6)
    ttfts = [(first - start) / 1e6 for start, first, _ in windows]
    return {
        "delay_ms_with_prompt": percentiles(with_prompt),
        "delay_ms_without": percentiles(without),
        "itl_ms_sent": percentiles(sent_gaps),
        "itl_ms_received": percentiles(gaps),
        "prompt_ttft_ms_p50": round(statistics.median(ttfts), 3),
    }


def turn_summary(report: Any, num_prompts: int) -> dict[str, Any]:
    """us. Turns of long prompts and what they held, a prompt; the longest turns of others."""
    turns = report["turns"]
    longest = sorted((each["turn"] / 1e3 for each in turns), reverse=True)
    totals: dict[str, float] = defaultdict(float)
    for each in turns:
        total = each.pop("turn")
        totals["all"] += total
        totals["rest"] += total - sum(each.values())
        for label, spent in each.items():
            totals[label] += spent
    shown = {label: round(total / 1e3 / num_prompts, 1) for label, total in totals.items()}
    others = sorted(each / 1e3 for each in report["others"])
    return {
        "us_a_prompt": dict(sorted(shown.items(), key=lambda item: -item[1])),
        "turns_a_prompt": round(len(turns) / num_prompts, 2),
        "longest_turn_us_p50": round(_at(longest, 0.5 / max(len(turns) / num_prompts, 1)), 1),
        "longest_turn_us_max": round(longest[0], 1) if longest else 0,
        "other_turns_us": percentiles(others),
        "collections_us": percentiles([each / 1e3 for each in report["collections"]]),
    }


def measure_delays(args: argparse.Namespace) -> dict[str, Any]:
    with front_door(args) as (port, ranks, _):
        if args.client:
            client = Child(args, "client", "--port", str(port))
            client.finish(args.seconds + 60)
        else:
            sender = Child(args, "sender", "--port", str(port))
            sender.line()
            reader = Child(args, "reader", "--port", str(port))
            reader.line()
            sender.say(str(time.monotonic()))
            sender.finish(args.seconds + 60)
            reader.finish(args.seconds + 60)
    steps = [step for rank in ranks for step in rank.result()]
    if args.client:
        found = client.result()
        lag = percentiles([each / 1e3 for each in found["lag_us"]])
        return {**delays(steps, found["tokens"], found["windows"]), "send_lag_ms": lag}
    return delays(steps, reader.result(), sender.result())


def measure_turns(args: argparse.Namespace) -> dict[str, Any]:
    num = len(arrival_times(args))
    with front_door(args, "--turns") as (port, _, router):
        client = Child(args, "client", "--turns", "--port", str(port))
        client.finish(args.seconds + 60)
    result = {"front_door": turn_summary(router.result(), num)}
    if args.client:
        result["client"] = turn_summary(client.result()["turns"], num)
    return result


def run_all(args: argparse.Namespace) -> None:
    args.children = []
    try:
        with tempfile.TemporaryDirectory() as args.directory:
            for _ in range(args.repeats):
                for name, measure in (("delays", measure_delays), ("turns", measure_turns)):
                    if args.only in ("", name):
                        for key, value in measure(args).items():
                            print(json.dumps({key: value}), flush=True)
    finally:
        for process in args.children:
            if process.poll() is None:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--engine", choices=("native", "vllm", "vllm-pd"), default="native")
    parser.add_argument("--producers", type=int, default=1, help="native; 0: one replica")
    parser.add_argument("--prompt", choices=("ids", "text"), default="ids")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a long prompt")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=2.0, help="long prompts a second")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--client", action="store_true", help="streams by pdrelay.bench")
    parser.add_argument("--only", choices=("", "delays", "turns"), default="")
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fds", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--urls", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    match args.role:
        case "ranks":
            asyncio.run(run_ranks(args))
        case "router":
            turns = instrumented(_FRONT_DOOR) if args.turns else None
            run_loop(run_router(args), turns)
            if turns is not None:
                write_json(args.out, turns.report())
        case "reader":
            run_reader(args)
        case "sender":
            run_sender(args)
        case "client":
            turns = instrumented(_CLIENT) if args.turns else None
            run_loop(run_bench_client(args, turns), turns)
        case _:
            run_all(args)


if __name__ == "__main__":
    main()
