"""What every experiment needs: the server, seeds, load, and where cases go."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdrelay.bench.client import ClosedLoop, LoadResult, OpenLoop, run_load
from pdrelay.bench.record import ClientRecord
from pdrelay.bench.request import BenchRequest
from pdrelay.bench.server_info import ServerInfo
from pdrelay.bench.token_ids import DEFAULT_VOCAB_SIZE
from pdrelay.bench.traces import TraceInfo
from pdrelay.bench.workload import from_lengths
from pdrelay.lab.config import LabConfig
from pdrelay.lab.host_load import foreign_cores, sample
from pdrelay.lab.rundir import STREAM_TAG, Case, CaseInfo, write_case
from pdrelay.lab.scale import Scale
from pdrelay.lab.topology import LabTopology

STREAM_INPUT_LEN = 32
STREAM_WAVES = 200  # more than any run uses up: streams are replaced until they are stopped
_END_S = 30.0  # for cancelled streams to end


@dataclass(frozen=True)
class Step:
    """One piece of work, which saves one case. `estimate_s` is by the scale's pace."""

    name: str
    case: str
    estimate_s: float
    run: Callable[[], Awaitable[None]]


@dataclass
class Context:
    """One started server in one repeat."""

    config: LabConfig
    topology: LabTopology
    rep: int
    url: str
    server: ServerInfo
    pids: list[int] = field(default_factory=list)  # the server's processes
    engine: str = ""  # with its version
    capacity_rps: float | None = None
    foreign: float | None = None  # cores that others used during the latest load
    trace_path: Path | None = None
    trace: tuple[list[BenchRequest], TraceInfo] | None = None

    @property
    def scale(self) -> Scale:
        return self.config.scale

    def seed(self, *parts: object) -> int:
        """The same for every topology, so that all get the same traffic."""
        words = "/".join(map(str, (self.config.seed, self.rep, *parts)))
        return zlib.crc32(words.encode())

    def fits(self, input_len: int, output_len: int) -> bool:
        limit = self.server.max_model_len
        return limit is None or input_len + output_len <= limit

    @property
    def vocab_size(self) -> int:
        return self.server.vocab_size or DEFAULT_VOCAB_SIZE

    def fitted(self, input_len: int, output_len: int) -> int:
        """The input length, or as much of it as the context leaves beside the output."""
        limit = self.server.max_model_len
        return input_len if limit is None else max(1, min(input_len, limit - output_len))

    def prompts(
        self, lengths: Sequence[tuple[int, int]], *seed_parts: object, tag: str = ""
    ) -> list[BenchRequest]:
        """Distinct random prompts, one for each (input, output) length."""
        seed = self.seed(*seed_parts)
        return from_lengths(lengths, vocab_size=self.vocab_size, seed=seed, tag=tag)

    async def load(
        self,
        name: str,
        requests: Sequence[BenchRequest],
        mode: OpenLoop | ClosedLoop,
        stop: asyncio.Event | None = None,
    ) -> LoadResult:
        """Send and record. Request ids are unique in the run."""
        before = sample(self.pids)
        result = await run_load(
            self.url,
            requests,
            model=self.server.model,
            mode=mode,
            timeout_s=self.config.request_timeout_s,
            request_id_prefix=f"{self.topology.name}-{self.rep}-{name}",
            stop=stop,
        )
        self.foreign = foreign_cores(before, sample(self.pids))
        return result

    @asynccontextmanager
    async def streams(self, name: str) -> AsyncIterator[list[ClientRecord]]:
        """Keeps streams decoding while the body runs; the list holds their records afterwards."""
        count = self.scale.num_streams
        output_len = self.scale.stream_output_len
        limit = self.server.max_model_len
        if limit is not None:
            output_len = max(1, min(output_len, limit - STREAM_INPUT_LEN))
        lengths = stream_lengths(count, output_len)
        requests = self.prompts(lengths, name, "streams", tag=STREAM_TAG)
        stop = asyncio.Event()
        records: list[ClientRecord] = []
        load = asyncio.create_task(
            self.load(f"{name}-streams", requests, ClosedLoop(count), stop=stop)
        )
        try:
            yield records
        finally:
            stop.set()
            result = await asyncio.wait_for(load, _END_S)
        records.extend(result.records)

    def save(
        self,
        experiment: str,
        case: str,
        result: LoadResult,
        *,
        streams: Sequence[ClientRecord] = (),
        rate: float | None = None,
        input_len: int | None = None,
        output_len: int | None = None,
        distinct_prompts: bool = True,
        **parameters: Any,
    ) -> None:
        """Write one case. An open loop's window ends with its last arrival."""
        is_open = isinstance(result.mode, OpenLoop)
        last_ns = max((record.intended_ns for record in result.records), default=result.start_ns)
        info = CaseInfo(
            experiment=experiment,
            topology=self.topology.name,
            engine=self.engine,
            case=case,
            rep=self.rep,
            seed=self.config.seed,
            mode="open" if is_open else "closed",
            window_start_ns=result.start_ns,
            window_end_ns=last_ns if is_open else result.end_ns,
            rate=rate,
            input_len=input_len,
            output_len=output_len,
            distinct_prompts=distinct_prompts,
            foreign_cores=self.foreign,
            parameters=parameters,
        )
        write_case(self.config.out, Case(info, [*streams, *result.records]))


def stream_lengths(count: int, output_len: int) -> list[tuple[int, int]]:
    """(input, output) of background streams. Those of the first wave end one after the other, so
    that later ones neither begin all at once nor meet long contexts all at once."""
    first = [max(2, output_len * (index + 1) // count) for index in range(count)]
    later = [output_len] * (count * (STREAM_WAVES - 1))
    return [(STREAM_INPUT_LEN, length) for length in (*first, *later)]
