"""Prefill with a hand-over beside the same prefill without: P/D and one replica, both running,
each prompt to both, one after the other in random order.

Servers that run one after the other would differ by clocks and temperature; here a pair of requests
is a fraction of a second apart, and its ratio is taken pair by pair.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdrelay.bench.client import ClosedLoop, run_load
from pdrelay.bench.record import ClientRecord
from pdrelay.bench.request import BenchRequest
from pdrelay.bench.server_info import ServerInfo, fetch_server_info
from pdrelay.bench.token_ids import DEFAULT_VOCAB_SIZE
from pdrelay.bench.workload import from_lengths
from pdrelay.core.events import EventKind, RequestRecord
from pdrelay.errors import ConfigError, LaunchError, PdrelayError
from pdrelay.lab.kv.config import KvConfig, ServeConfig
from pdrelay.lab.kv.model import kv_bytes
from pdrelay.lab.kv.rundir import PAIRS_DIR, PAIRS_FILE, PairRecord
from pdrelay.lab.progress import Reporter
from pdrelay.lab.rundir import read_jsonl
from pdrelay.lab.server import Launcher
from pdrelay.lab.topology import LabTopology, parse_topology
from pdrelay.model.config import ModelConfig

OUTPUT_LEN = 8  # so that P/D does hand over
_WARM_UPS = 3  # a length and server
_KEPT_PROMPTS = 4  # of the longest, that fit a server's KV pool at once
_PD, _ALONE = parse_topology("pd:1:1"), parse_topology("replicas:1")


@dataclass(frozen=True)
class _Probe:
    """One prompt to one server."""

    server: LabTopology
    client: ClientRecord


@dataclass(frozen=True)
class _Pair:
    tokens: int
    rep: int
    probes: tuple[_Probe, _Probe]  # in the order of sending


def measure_side_by_side(
    config: KvConfig,
    serve: ServeConfig,
    shape: ModelConfig,
    launcher: Launcher,
    reporter: Reporter,
) -> str:
    """Write DIR/pairs.jsonl; returns why nothing was measured, or nothing."""
    try:
        pairs = asyncio.run(_SideBySide(config, serve, shape, launcher, reporter).run())
        records = joined_pairs(pairs, config.out / PAIRS_DIR)
    except PdrelayError as error:
        return f"servers side by side: {error}"
    with (config.out / PAIRS_FILE).open("wb") as file:
        file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    return ""


class _SideBySide:
    def __init__(
        self,
        config: KvConfig,
        serve: ServeConfig,
        shape: ModelConfig,
        launcher: Launcher,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._serve = serve
        self._args = [*serve.args, *pool_args(config, serve, shape)]
        self._launcher = launcher
        self._reporter = reporter
        self._urls: dict[LabTopology, str] = {}
        self._count = 0

    async def run(self) -> list[_Pair]:
        """Raises PdrelayError."""
        self._reporter.step("servers side by side: starting")
        async with AsyncExitStack() as stack:
            await self._start_both(stack)
            info = await fetch_server_info(self._urls[_PD])
            lengths = self._lengths(info)
            rng = random.Random(f"{self._config.seed}/side by side")
            for server in (_PD, _ALONE):
                for length in lengths * _WARM_UPS:
                    await self._probe(server, self._prompt(length, info, "warm-up"), info)
            pairs: list[_Pair] = []
            for rep in range(self._serve.requests):
                self._reporter.step(f"servers side by side: round {rep + 1}")
                order = rng.sample(lengths, len(lengths))
                pairs += [await self._pair(length, rep, info, rng) for length in order]
            return pairs

    async def _start_both(self, stack: AsyncExitStack) -> None:
        """At the same time; both or none."""
        (self._config.out / PAIRS_DIR).mkdir(exist_ok=True)
        starts = [asyncio.create_task(self._start(server, stack)) for server in (_PD, _ALONE)]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    async def _start(self, server: LabTopology, stack: AsyncExitStack) -> None:
        directory = self._config.out / PAIRS_DIR
        handle = await self._launcher.start(
            server,
            model=self._config.model,
            event_log_path=events_path(directory, server),
            log_path=directory / f"{server.name}.log",
            extra_args=self._args,
        )
        stack.push_async_callback(handle.stop)
        self._urls[server] = handle.url

    def _lengths(self, info: ServerInfo) -> list[int]:
        limit = info.max_model_len
        lengths = [n for n in self._serve.lengths if limit is None or n + OUTPUT_LEN <= limit]
        if not lengths:
            raise ConfigError(
                f"no length of {self._serve.lengths} fits {limit} tokens beside {OUTPUT_LEN} of "
                "output: lower --lengths"
            )
        return lengths

    async def _pair(self, length: int, rep: int, info: ServerInfo, rng: random.Random) -> _Pair:
        prompt = self._prompt(length, info, "pair")
        first, second = rng.sample((_PD, _ALONE), 2)
        probes = (
            await self._probe(first, prompt, info),
            await self._probe(second, prompt, info),
        )
        return _Pair(length, rep, probes)

    def _prompt(self, length: int, info: ServerInfo, domain: str) -> BenchRequest:
        """Unlike any other of the run from its first block on."""
        self._count += 1
        (request,) = from_lengths(
            [(length, OUTPUT_LEN)],
            vocab_size=info.vocab_size or DEFAULT_VOCAB_SIZE,
            seed=self._config.seed,
            domain=f"{domain}-{self._count}",
        )
        return request

    async def _probe(self, server: LabTopology, prompt: BenchRequest, info: ServerInfo) -> _Probe:
        """Raises LaunchError when it is not answered."""
        self._count += 1
        result = await run_load(
            self._urls[server],
            [prompt],
            model=info.model,
            mode=ClosedLoop(1),
            request_id_prefix=f"{server.name}-{self._count}",
        )
        (client,) = result.records
        if not client.ok or client.first_token_ns is None:
            raise LaunchError(f"{server.label} did not answer: {client.error or 'no token'}")
        return _Probe(server, client)


def events_path(directory: Path, server: LabTopology) -> Path:
    return directory / f"{server.name}.events.jsonl"


def pool_args(config: KvConfig, serve: ServeConfig, shape: ModelConfig) -> list[str]:
    """A KV pool of a few prompts: two servers share the devices, and neither may take the rest."""
    longest = max(serve.lengths) + OUTPUT_LEN
    tokens = _KEPT_PROMPTS * (longest + max(config.block_sizes))
    if "--max-model-len" in serve.args:
        asked = int(serve.args[serve.args.index("--max-model-len") + 1])
        tokens, limit = max(tokens, asked), []
    else:
        limit = ["--max-model-len", str(min(longest, shape.max_position_embeddings))]
    per_token = kv_bytes(shape, config.dtype).per_token
    return ["--kv-cache-memory", str(tokens * per_token), *limit]


# ---- both ends of each request


def joined_pairs(pairs: list[_Pair], directory: Path) -> list[PairRecord]:
    """Clients' and servers' records, by request id. Raises LaunchError when one is missing."""
    records = {
        record.client_request_id: record
        for server in (_PD, _ALONE)
        for record in read_jsonl(events_path(directory, server), RequestRecord)
    }
    return [_joined(pair, records) for pair in pairs]


def _joined(pair: _Pair, records: dict[str, RequestRecord]) -> PairRecord:
    prefill: dict[LabTopology, int] = {}
    ttft: dict[LabTopology, int] = {}
    for probe in pair.probes:
        client = probe.client
        record = records.get(client.request_id)
        if record is None:
            raise LaunchError(f"{probe.server.label} logged nothing of {client.request_id}")
        prefill[probe.server] = prefill_ns(record)
        assert client.first_token_ns is not None
        ttft[probe.server] = client.first_token_ns - client.intended_ns
    return PairRecord(
        tokens=pair.tokens,
        rep=pair.rep,
        pd_first=pair.probes[0].server == _PD,
        prefill_ns=prefill[_PD],
        prefill_alone_ns=prefill[_ALONE],
        ttft_ns=ttft[_PD],
        ttft_alone_ns=ttft[_ALONE],
    )


def prefill_ns(record: RequestRecord) -> int:
    """First chunk's start to last chunk's end. Raises LaunchError without them."""
    times = {event.kind: event.t_ns for event in record.events}
    try:
        return times[EventKind.PREFILL_END] - times[EventKind.PREFILL_START]
    except KeyError as error:
        raise LaunchError(f"the server's log of {record.request_id} has no {error}") from error
