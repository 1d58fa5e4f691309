"""The run directory: what the lab writes and the report reads. Nothing else passes between them.

    DIR/run.json           RunInfo: what ran, on what settings
    DIR/environment.json   cpu, cores, memory, kernel, packages, gpus, load average (free form)
    DIR/topologies/<name>/launch.json     LaunchInfo: the `pdrelay serve` command, start-up times
    DIR/topologies/<name>/workers.json    list of WorkerInfo: layout, resolved settings, peak RSS
    DIR/topologies/<name>/server*.log     one a server start; the first is server.log
    DIR/topologies/<name>/events*.jsonl   core.events.RequestRecord lines; one file a server start
    DIR/topologies/<name>/gpu*.jsonl      telemetry.log: GPU samples; one file a server start
    DIR/experiments/<experiment>/<name>/<case>/rep<k>/case.json       CaseInfo
    DIR/experiments/<experiment>/<name>/<case>/rep<k>/requests.jsonl  bench.record.ClientRecord
    DIR/report.html, summary.json, summary.txt, trace.json            made by `pdrelay report DIR`

`request_id` of a ClientRecord is `client_request_id` of its RequestRecord. All `*_ns` are
CLOCK_MONOTONIC of one host. Tags of ClientRecords: `stream` is background load that keeps decoding;
every other tag (`probe-512`, `long`, `chat`, ...) is measured traffic.

Cases by experiment, and the parameters the report reads:

    ttft          idle | busy                    parameters: num_streams
    traffic       poisson-<i> | trace | fixed    parameters: rate_fraction, workload
                  fixed-idle                     the fixed load's requests on an idle server
    interference  interference                   parameters: num_streams, long_input_len
    shapes        short-short | long-short | short-long   parameters: input_len, output_len
                  streams-<n>                    parameters: num_streams
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pdrelay.bench.record import ClientRecord
from pdrelay.bench.slo import Slo
from pdrelay.core.events import RequestRecord
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ConfigError
from pdrelay.telemetry.log import GpuRecord, read_gpu_record

SCHEMA_VERSION = 1
STREAM_TAG = "stream"
POISSON_CASE = "poisson-"  # followed by its index
FIXED_CASE = "fixed"
FIXED_IDLE_CASE = "fixed-idle"
STREAMS_CASE = "streams-"  # followed by their number
EXPERIMENTS = ("ttft", "traffic", "interference", "shapes")

T = TypeVar("T")


class RunInfo(msgspec.Struct, kw_only=True):
    """`run.json`."""

    schema_version: int = SCHEMA_VERSION
    pdrelay_version: str
    git_commit: str
    argv: list[str]  # of `pdrelay lab`
    config: dict[str, Any]
    model: str
    seeds: list[int]
    started: str  # ISO 8601, UTC
    ended: str = ""
    experiments: list[str]
    topologies: list[str]  # names in the order in which the report shows them
    engines: dict[str, str] = {}  # by topology: "vllm 0.32.0"
    quick: bool
    service_level: Slo
    capacity_rps: float | None = None  # of the baseline, closed loop, chat-like lengths
    baseline: str = ""
    notes: list[str] = []  # steps left out, and why


class LaunchInfo(msgspec.Struct, kw_only=True):
    """`launch.json`."""

    name: str
    num_gpus: int
    argv: list[str]  # reproduces the server
    engine: str = ""  # with its version: "vllm 0.32.0"
    startup_s: list[float] = []  # one a start


class WorkerInfo(msgspec.Struct, kw_only=True):
    """One rank in `workers.json`."""

    instance: str
    pid: int = 0
    rank: int = 0
    role: str = ""
    layout: KVLayout | None = None
    resolved: dict[str, str] = {}
    peak_rss_bytes: int = 0


class CaseInfo(msgspec.Struct, kw_only=True):
    """`case.json`. The window bounds the intended send times of the measured traffic."""

    schema_version: int = SCHEMA_VERSION
    experiment: str
    topology: str
    engine: str = ""  # with its version
    case: str
    rep: int
    seed: int
    mode: str  # "open" or "closed"
    window_start_ns: int
    window_end_ns: int
    rate: float | None = None  # requests/s offered
    input_len: int | None = None  # tokens; None: drawn
    output_len: int | None = None
    foreign_cores: float | None = None  # kept busy by other processes meanwhile, on average
    distinct_prompts: bool = True  # no two prompts share a block, so no prefix hit is possible
    parameters: dict[str, Any] = {}


@dataclass(frozen=True)
class Case:
    """One measured case: its parameters and its client's records."""

    info: CaseInfo
    records: list[ClientRecord]

    @property
    def measured(self) -> list[ClientRecord]:
        return [record for record in self.records if record.tag != STREAM_TAG]

    @property
    def streams(self) -> list[ClientRecord]:
        return [record for record in self.records if record.tag == STREAM_TAG]

    @property
    def path(self) -> str:
        return case_path(self.info)


@dataclass
class TopologyData:
    """One topology's files. `by_client_id` joins with ClientRecord.request_id."""

    launch: LaunchInfo
    workers: list[WorkerInfo] = field(default_factory=list)
    by_client_id: dict[str, RequestRecord] = field(default_factory=dict)
    gpu: list[GpuRecord] = field(default_factory=list)  # one a server start

    def layout_of(self, instance: str) -> KVLayout | None:
        return next((w.layout for w in self.workers if w.instance == instance), None)


@dataclass
class Run:
    """A run directory in memory."""

    root: Path
    info: RunInfo
    environment: dict[str, Any]
    topologies: dict[str, TopologyData]  # in the order of info.topologies
    cases: list[Case]

    def select(self, experiment: str, topology: str) -> list[Case]:
        """Cases of one experiment and topology, by case name, then repeat."""
        chosen = [
            case
            for case in self.cases
            if case.info.experiment == experiment and case.info.topology == topology
        ]
        return sorted(chosen, key=lambda case: (case.info.case, case.info.rep))


def case_path(info: CaseInfo) -> str:
    """The case's directory below `experiments`, with forward slashes."""
    return f"{info.experiment}/{info.topology}/{info.case}/rep{info.rep}"


# ---- writing


def claim_directory(out: Path) -> None:
    """Make `out`, which must be new or empty. Raises ConfigError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"cannot create {out}: {reason}; choose another --out") from error


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, indented, creating its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def write_jsonl(path: Path, values: list[Any]) -> None:
    """Write one JSON value a line, creating the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(msgspec.json.encode(value) + b"\n" for value in values))


def write_case(root: Path, case: Case) -> None:
    directory = root / "experiments" / case.path
    write_json(directory / "case.json", case.info)
    write_jsonl(directory / "requests.jsonl", case.records)


# ---- reading


def read_run(root: Path) -> Run:
    """Read a run directory. Raises ConfigError that names the file (and line) and the fix."""
    if not (root / "run.json").is_file():
        raise ConfigError(
            f"{root} is not a run directory: it has no run.json; make one with `pdrelay lab`"
        )
    info = read_json(root / "run.json", RunInfo)
    if info.schema_version != SCHEMA_VERSION:
        raise ConfigError(
            f"{root / 'run.json'} has schema_version {info.schema_version}, this pdrelay reads "
            f"{SCHEMA_VERSION}: use the pdrelay that made it ({info.pdrelay_version})"
        )
    environment_file = root / "environment.json"
    return Run(
        root=root,
        info=info,
        environment=read_json(environment_file, dict[str, Any])
        if environment_file.is_file()
        else {},
        topologies={
            name: _read_topology(root / "topologies" / name)
            for name in info.topologies
            if (root / "topologies" / name / "launch.json").is_file()
        },
        cases=[_read_case(path.parent) for path in _case_files(root)],
    )


def read_json(path: Path, kind: type[T]) -> T:
    """Decode one JSON file. Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; restore it") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is damaged: {error}; restore it from the run") from error


def read_jsonl(path: Path, kind: type[T]) -> list[T]:
    """Decode a JSONL file. A last line without its newline (a crash) is dropped.

    Raises ConfigError that names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; restore it") from error
    return list(_decode_lines(path, data, kind))


def _decode_lines(path: Path, data: bytes, kind: type[T]) -> Iterator[T]:
    decoder = msgspec.json.Decoder(kind)
    complete, _, _ = data.rpartition(b"\n")
    for number, line in enumerate(complete.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}:{number} is damaged: {error}; delete the line") from error


def _read_topology(directory: Path) -> TopologyData:
    data = TopologyData(launch=read_json(directory / "launch.json", LaunchInfo))
    workers = directory / "workers.json"
    if workers.is_file():
        data.workers = read_json(workers, list[WorkerInfo])
    for path in sorted(directory.glob("events*.jsonl")):
        for record in read_jsonl(path, RequestRecord):
            if record.client_request_id:
                data.by_client_id[record.client_request_id] = record
    data.gpu = [read_gpu_record(path) for path in sorted(directory.glob("gpu*.jsonl"))]
    return data


def _case_files(root: Path) -> list[Path]:
    return sorted((root / "experiments").glob("*/*/*/rep*/case.json"))


def _read_case(directory: Path) -> Case:
    return Case(
        info=read_json(directory / "case.json", CaseInfo),
        records=read_jsonl(directory / "requests.jsonl", ClientRecord),
    )
