"""A run directory made by a small queueing model instead of servers, for the report's tests.

Co-located instances stall their streams while they prefill; P/D does not. All times are computed,
none is measured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from pdrelay.bench.record import ClientRecord
from pdrelay.bench.slo import Slo
from pdrelay.core.events import Event, EventKind, RequestRecord
from pdrelay.core.kv_layout import KVLayout
from pdrelay.lab.queueing import waits_of
from pdrelay.lab.rundir import (
    STREAM_TAG,
    Case,
    CaseInfo,
    LaunchInfo,
    RunInfo,
    WorkerInfo,
    write_case,
    write_json,
    write_jsonl,
)
from pdrelay.lab.topology import LabTopology, parse_topologies
from pdrelay.telemetry.fake import FakeSource
from pdrelay.telemetry.sample import GpuLog, GpuSample

MS = 1_000_000
LAYOUT = KVLayout(
    num_layers=4, num_blocks=2048, block_size=16, num_kv_heads=4, head_dim=32, dtype="float32"
)
FIXED_LEN, FIXED_RATE, NUM_FIXED = 512, 12.0, 200  # tokens, requests/s
TOPOLOGIES = "replicas:2,tp:2,pd:1:1,replicas:1"


def prefill_ms(tokens: int) -> float:
    return 4 + 0.07 * tokens + 2.5e-5 * tokens**2


@dataclass
class World:
    """Makes records of one topology; `t_ns` is the clock."""

    topology: LabTopology
    seed: int
    wrong_bytes: bool = False
    t_ns: int = 1_000_000_000_000
    records: list[RequestRecord] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed}/{self.topology.name}")

    @property
    def is_pd(self) -> bool:
        return self.topology.kind == "pd"

    @property
    def itl_ms(self) -> float:
        return {"replicas": 2.0, "tp": 1.5, "pd": 2.0}[self.topology.kind]

    def noise(self, share: float = 0.04) -> float:
        return self.random.lognormvariate(0.0, share)

    def request(
        self,
        tag: str,
        input_len: int,
        output_len: int,
        *,
        at_ns: int,
        wait_ms: float = 0.3,
        slow: float = 1.0,
        stalls: list[tuple[int, int]] | None = None,
    ) -> ClientRecord:
        """One request's client record; its server record is kept. `stalls` hold tokens back."""
        self.count += 1
        name = f"{self.topology.name}-{self.count}"
        speed = 0.7 if self.topology.kind == "tp" else 1.0
        t = at_ns + round(0.2 * MS)
        events = [Event(EventKind.ARRIVED, t, "router")]
        t += round(0.3 * MS * self.noise())
        events.append(Event(EventKind.ROUTED, t, "router"))
        instances = ["prefill-0", "decode-0"] if self.is_pd else [f"{self.topology.kind}-0"]
        start = t + round(wait_ms * MS * self.noise())
        end = start + round(prefill_ms(input_len) * speed * slow * self.noise() * MS)
        events.append(Event(EventKind.PREFILL_START, start, instances[0]))
        events.append(Event(EventKind.PREFILL_END, end, instances[0]))
        events.append(Event(EventKind.FIRST_TOKEN, end + 50_000, instances[0]))
        tail = 0
        if self.is_pd:
            tail = round(0.4 * MS * self.noise())
            events += self._transfer(instances, input_len, start, end, tail)
        first = end + round(0.4 * MS)
        tokens = [first]
        for index in range(output_len - 1):
            late = tail + round(0.8 * MS) if index == 0 and self.is_pd else 0
            t = tokens[-1] + round(self.itl_ms * self.noise() * MS) + late
            for stall_start, stall_end in stalls or []:
                if stall_start < t < stall_end and not self.is_pd:
                    t = stall_end + self.random.randrange(MS)
            tokens.append(t)
            events.append(Event(EventKind.TOKEN, t - 200_000, instances[-1]))
        events.append(Event(EventKind.FINISHED, tokens[-1], instances[-1]))
        self.records.append(
            RequestRecord(
                request_id=f"r{self.count}",
                client_request_id=name,
                num_prompt_tokens=input_len,
                num_output_tokens=output_len,
                instances=instances,
                finish_reason="length",
                events=events,
            )
        )
        return ClientRecord(
            request_id=name,
            index=self.count,
            tag=tag,
            intended_ns=at_ns,
            sent_ns=at_ns + 100_000,
            first_token_ns=first,
            chunk_ns=tokens,
            end_ns=tokens[-1],
            max_tokens=output_len,
            num_prompt_tokens=input_len,
            num_output_tokens=output_len,
        )

    def _transfer(
        self, instances: list[str], input_len: int, start: int, end: int, tail: int
    ) -> list[Event]:
        blocks = -(-input_len // LAYOUT.block_size)
        moved = blocks * LAYOUT.block_bytes + (LAYOUT.block_bytes if self.wrong_bytes else 0)
        return [
            Event(EventKind.RESERVED, start + 100_000, instances[1], detail="first_block=0"),
            Event(EventKind.TRANSFER_START, (start + end) // 2, instances[0]),
            Event(
                EventKind.TRANSFER_END,
                end + tail,
                instances[1],
                num_bytes=moved,
                num_pieces=LAYOUT.num_layers,
                busy_ns=moved // 6,
                transport="mapped",
            ),
            Event(EventKind.DECODE_ADMITTED, end + tail + 300_000, instances[1]),
        ]

    # ---- cases

    def case(
        self, experiment: str, case: str, rep: int, records: list[ClientRecord], **info: object
    ) -> Case:
        start = min(record.intended_ns for record in records)
        end = max(record.intended_ns for record in records)
        self.t_ns = max(record.end_ns for record in records) + 100 * MS
        made = CaseInfo(
            experiment=experiment,
            topology=self.topology.name,
            case=case,
            rep=rep,
            seed=self.seed,
            mode="open",
            window_start_ns=start,
            window_end_ns=end,
            **info,  # type: ignore[arg-type]
        )
        return Case(made, records)

    def ttft(self, condition: str, rep: int) -> Case:
        lengths = [128] * 12 + [512] * 12 + [2048] * 12 + [8192] * 3
        self.random.shuffle(lengths)
        records = []
        slow = 1.6 if condition == "busy" and not self.is_pd else 1.0
        t = self.t_ns
        for length in lengths:
            records.append(self.request(f"probe-{length}", length, 8, at_ns=t, slow=slow))
            t = records[-1].end_ns + 20 * MS
        return self.case("ttft", condition, rep, records, parameters={"num_streams": 4})

    def poisson(self, index: int, fraction: float, rate: float, rep: int) -> Case:
        records, t, free = [], self.t_ns, self.t_ns
        for _ in range(40):
            t += round(self.random.expovariate(rate) * 1e9)
            length = min(1024, round(self.random.lognormvariate(5, 0.8)))
            servers = 1 if self.is_pd else self.topology.num_gpus
            wait = max(0, free - t) / MS + 0.2
            free = max(free, t) + round(500 / 12 / servers * MS * fraction)
            records.append(self.request("chat", length, 40, at_ns=t, wait_ms=wait))
        parameters = {"rate_fraction": fraction, "workload": "chat-like"}
        name = f"poisson-{index}"
        return self.case("traffic", name, rep, records, rate=rate, parameters=parameters)

    def trace(self, rep: int) -> Case:
        records = [
            self.request("trace", 200 + 40 * i, 20, at_ns=self.t_ns + 300 * MS * i)
            for i in range(12)
        ]
        return self.case(
            "traffic",
            "trace",
            rep,
            records,
            rate=3.3,
            distinct_prompts=False,
            parameters={"workload": "synthetic bursts, Azure format"},
        )

    def fixed(self, rep: int) -> list[Case]:
        """One size, idle and then Poisson arrivals at FIXED_RATE in front of FCFS prefills."""
        idle = [
            self.request("fixed", FIXED_LEN, 2, at_ns=self.t_ns + 300 * MS * i) for i in range(12)
        ]
        cases = [self.case("traffic", "fixed-idle", rep, idle, input_len=FIXED_LEN, output_len=2)]
        servers = self.topology.num_gpus if self.topology.kind == "replicas" else 1
        arrivals = list(accumulate(self.random.expovariate(FIXED_RATE) for _ in range(NUM_FIXED)))
        service_s = prefill_ms(FIXED_LEN) * (0.7 if self.topology.kind == "tp" else 1.0) / 1e3
        waits = waits_of(arrivals, service_s, servers)
        start = self.t_ns
        records = [
            self.request(
                "fixed", FIXED_LEN, 8, at_ns=start + round(at * 1e9), wait_ms=0.3 + 1e3 * wait
            )
            for at, wait in zip(arrivals, waits, strict=True)
        ]
        loaded = self.case(
            "traffic",
            "fixed",
            rep,
            records,
            rate=FIXED_RATE,
            input_len=FIXED_LEN,
            output_len=8,
            parameters={"workload": f"{FIXED_LEN} in / 8 out, Poisson"},
        )
        return [*cases, loaded]

    def streams(self, count: int, rep: int) -> Case:
        """`count` requests sent together, prefilled one after the other."""
        each = prefill_ms(64)
        records = [
            self.request("of-many", 64, 60, at_ns=self.t_ns, wait_ms=0.3 + each * index)
            for index in range(count)
        ]
        return self.case(
            "shapes",
            f"streams-{count}",
            rep,
            records,
            input_len=64,
            output_len=60,
            parameters={"num_streams": count},
        )

    def interference(self, rep: int) -> Case:
        t0 = self.t_ns
        longs = [
            self.request("long", 4096, 4, at_ns=t0 + 3_000 * MS + 2_000 * MS * i) for i in range(6)
        ]
        stalls = [(long.intended_ns + MS, long.first_token_ns or 0) for long in longs]
        streams = []
        for index in range(4):
            mine = stalls if self.topology.num_gpus == 1 or index % 2 == 0 else []
            if self.topology.kind == "tp":
                mine = stalls
            streams.append(self.request(STREAM_TAG, 32, 13_000, at_ns=t0, stalls=mine))
        parameters = {"num_streams": 4, "long_input_len": 4096}
        return self.case(
            "interference", "interference", rep, streams + longs, parameters=parameters
        )

    def shape(self, name: str, input_len: int, output_len: int, rep: int) -> Case:
        records = [
            self.request(name, input_len, output_len, at_ns=self.t_ns + 700 * MS * i)
            for i in range(12)
        ]
        return self.case(
            "shapes", name, rep, records, rate=1.4, input_len=input_len, output_len=output_len
        )


def write_run(
    root: Path,
    *,
    repeats: int = 1,
    topologies: str = TOPOLOGIES,
    wrong_bytes: bool = False,
    seed: int = 7,
) -> RunInfo:
    """Write a complete run directory and return its RunInfo."""
    chosen = parse_topologies(topologies)
    info = RunInfo(
        pdrelay_version="0.0.0",
        git_commit="0123abc",
        argv=["pdrelay", "lab", "--quick"],
        config={"quick": True},
        model="tiny",
        seeds=[seed],
        started="2030-01-01T00:00:00Z",
        ended="2030-01-01T00:05:00Z",
        experiments=["ttft", "traffic", "interference", "shapes"],
        topologies=[topology.name for topology in chosen],
        quick=True,
        service_level=Slo(250, 10),
        capacity_rps=12.0,
        baseline="replicas-1",
    )
    write_json(root / "run.json", info)
    write_json(root / "environment.json", {"cpu": "synthetic <CPU> & co", "cores": 2, "gpus": []})
    for topology in chosen:
        _write_topology(root, World(topology, seed, wrong_bytes), repeats)
    return info


def _write_topology(root: Path, world: World, repeats: int) -> None:
    topology = world.topology
    for rep in range(repeats):
        cases = [world.ttft("idle", rep), world.ttft("busy", rep)]
        cases += [world.poisson(i, f, 12 * f, rep) for i, f in enumerate((0.5, 1.0, 1.5))]
        cases += [*world.fixed(rep), world.trace(rep), world.interference(rep)]
        cases += [world.streams(1, rep), world.streams(4, rep)]
        cases.append(world.shape("short-short", 100, 20, rep))
        cases.append(world.shape("long-short", 2048, 30, rep))
        cases.append(world.shape("short-long", 20, 200, rep))
        for case in cases:
            write_case(root, case)
    directory = root / "topologies" / topology.name
    argv = ["pdrelay", "serve", "tiny", *topology.serve_args]
    launch = LaunchInfo(
        name=topology.name, num_gpus=topology.num_gpus, argv=argv, startup_s=[3.2] * repeats
    )
    write_json(directory / "launch.json", launch)
    instances = list(dict.fromkeys(name for record in world.records for name in record.instances))
    workers = [
        WorkerInfo(
            instance=name, layout=LAYOUT, resolved={"dtype": "float32"}, peak_rss_bytes=400_000_000
        )
        for name in instances
    ]
    write_json(directory / "workers.json", workers)
    write_jsonl(directory / "events.jsonl", list(world.records))
    write_jsonl(directory / "gpu.jsonl", _gpu_lines(world, instances))


def _gpu_lines(world: World, instances: list[str]) -> list[GpuLog | GpuSample]:
    """One GPU an instance, read every 100 ms from the first event to the last."""
    source = FakeSource(len(instances))
    placed = {name: [index] for index, name in enumerate(instances)}
    log = GpuLog(gpus=source.gpus, instances=placed, assignment="as made up", period_s=0.1)
    times = [event.t_ns for record in world.records for event in record.events]
    samples = []
    for t_ns in range(min(times) - 100 * MS, max(times), 100 * MS):
        for sample in source.read():
            sample.t_ns = t_ns
            samples.append(sample)
    return [log, *samples]
