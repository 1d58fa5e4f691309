"""Every figure that the report shows, as `summary.json` holds it. Milliseconds unless named.

The HTML and the terminal tables are drawn from these structs alone, so nothing is shown that the
file does not hold.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pdrelay.lab.rundir import RunInfo
from pdrelay.lab.stats import Estimate
from pdrelay.telemetry.sample import GpuInfo

SCHEMA_VERSION = 1
STALL = 5.0  # times the quiet median ITL
FULL_SHARE = 0.9  # of the streams that must decode for an ITL to count as theirs
Severity = Literal["error", "warning", "info"]
TrafficKind = Literal["poisson", "trace", "fixed"]


class TopologyFigures(msgspec.Struct, kw_only=True):
    """One topology as it was started."""

    name: str
    label: str
    engine: str = ""  # with its version
    num_gpus: int
    argv: list[str]
    startup_s: list[float]
    bytes_per_token: int | None  # KV, all ranks of an instance
    peak_rss_bytes: dict[str, int]  # by instance, the largest of its ranks
    resolved: dict[str, dict[str, str]]  # by instance

    @property
    def unit(self) -> str:
        """What `num_gpus` counts: on a CPU a core stands for a GPU."""
        on_cpu = any(each.get("device") == "cpu" for each in self.resolved.values())
        return "core" if on_cpu else "GPU"


class TtftRow(msgspec.Struct, kw_only=True):
    """TTFT at one input length. `hand_over` is the first gap minus the request's median later gap:
    what a client sees of the hand-over."""

    topology: str
    condition: str  # idle | busy
    input_len: int
    ttft: Estimate
    ttft_p90: Estimate
    ttst: Estimate
    hand_over: Estimate
    samples: list[float]  # TTFTs, only where there is no percentile


class RatioRow(msgspec.Struct, kw_only=True):
    """P/D over another topology, same condition and input length or case."""

    topology: str  # the P/D one
    versus: str
    case: str
    input_len: int | None
    metric: str
    ratio: Estimate


class Percentiles(msgspec.Struct, kw_only=True):
    """Of a prediction, so without interval."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


class TrafficRow(msgspec.Struct, kw_only=True):
    """One offered load on one topology.

    kind: "poisson" is chat-like traffic at one of several rates, "trace" a trace, "fixed" requests
    of one size.
    """

    topology: str
    case: str
    kind: TrafficKind = "poisson"
    workload: str
    rate: float | None  # requests/s offered
    rate_fraction: float | None  # of the baseline's measured capacity, where that was measured
    num_requests: int
    num_failed: int
    ttft: Estimate
    ttft_p90: Estimate
    ttft_p99: Estimate
    itl: Estimate
    itl_p99: Estimate
    tpot: Estimate
    attainment: Estimate  # share of offered requests that met the service level
    goodput: Estimate  # good requests/s a GPU
    completed_rate: Estimate  # requests/s
    output_rate: Estimate  # tokens/s
    sustained: bool


class QueueRow(msgspec.Struct, kw_only=True):
    """The fixed load on one topology beside what a queue for prefill predicts (lab/queueing.py).

    `model` names the queue; replicas have two rows, one for each way to share the load out. TTFTs
    predicted are the idle one plus a percentile of the wait. `steady`: of the steady state.
    `replayed`: of this run's own arrivals, sent through the same queue; None where the model says
    nothing of single requests. None in `steady`: no steady state at this load.
    """

    topology: str
    model: str
    input_len: int
    output_len: int
    rate: float
    num_servers: int  # of one queue
    service_ms: float
    service_source: str
    idle_ttft: Estimate
    utilisation: float
    mean_wait_ms: float | None
    steady: Percentiles
    replayed: Percentiles
    ttft: Estimate
    ttft_p90: Estimate
    ttft_p99: Estimate


class Distribution(msgspec.Struct, kw_only=True):
    """A set of ITL gaps."""

    p50: Estimate
    p90: Estimate
    p99: Estimate
    worst: float | None
    n: int
    cdf: list[tuple[float, float]]  # (gap, share at or below), thinned


class InterferenceRow(msgspec.Struct, kw_only=True):
    """Streams decode; long prompts arrive.

    busy: gaps that overlap [a long prompt's sending, its last token]: the steps in which it decodes
    beside the streams, after a hand-over or not, are what they feel of it too. quiet: the others,
    before and between the long prompts. period: all gaps between the first long prompt's sending
    and the last's last token, whether or not one was in the system. stalled: the share of the busy
    gaps' time that lies in gaps longer than STALL times the quiet median; a percentile of gaps
    misses it where some streams stall and others go on, because a stalled stream has few gaps.
    """

    topology: str
    num_streams: int
    long_input_len: int
    num_long: int
    quiet: Distribution
    busy: Distribution
    period: Distribution
    long_ttft: Estimate
    stalled: Estimate
    factor: float | None  # busy at `factor_percentile` over quiet p50
    factor_percentile: float | None  # the highest whose sample floor the busy gaps meet


class ShapeRow(msgspec.Struct, kw_only=True):
    """One of the handout's shapes on one topology."""

    topology: str
    case: str
    input_len: int
    output_len: int
    rate: float | None
    ttft: Estimate
    itl: Estimate
    e2e: Estimate
    output_rate: Estimate


class StreamsRow(msgspec.Struct, kw_only=True):
    """`num_streams` requests of one size, sent together, on one topology.

    ITL is of the gaps within which at least `FULL_SHARE` of the streams decode (report/streams.py).
    `hand_over` as in TtftRow: TTST less TTFT less an ordinary gap.
    """

    topology: str
    num_streams: int
    input_len: int
    output_len: int
    ttft: Estimate
    itl: Estimate
    itl_p99: Estimate
    hand_over: Estimate
    output_rate: Estimate  # tokens/s while that many decode


class PhaseRow(msgspec.Struct, kw_only=True):
    """Mean TTFT by phase, so that the phases add up to the mean TTFT.

    route: intended send to instances chosen. wait: to the first chunk's start. prefill: to the end
    of the last chunk. transfer: hand-over that delayed the first token. return_: the rest, until
    the client has the token. `hidden_transfer` is what was still to move after prefill ended.
    """

    topology: str
    condition: str
    input_len: int
    n: int
    route: float
    wait: float
    prefill: float
    transfer: float
    return_: float
    hidden_transfer: float | None  # None: co-located

    @property
    def total(self) -> float:
        return self.route + self.wait + self.prefill + self.transfer + self.return_


class TransferRow(msgspec.Struct, kw_only=True):
    """KV hand-overs of one experiment and input length. Times are medians over the transfers."""

    topology: str
    experiment: str
    input_len: str  # one length, or a range
    transport: str
    n: int
    num_bytes: float
    num_pieces: float
    busy_ms: float
    gb_per_s: float | None  # bytes over busy time, of what was copied
    wall_ms: float
    overlap: float | None  # share of the transfer's wall time that lies within prefill
    tail_ms: float  # transfer end after prefill end
    bytes_matched: int
    bytes_wrong: int
    bytes_unverified: int  # the consumer's cached blocks are not in the record
    first_wrong: str  # which request, and both numbers


class GpuRow(msgspec.Struct, kw_only=True):
    """One instance's GPUs during one experiment: means over its cases' windows and GPUs.

    Shares are 0 to 1. `working` restricts to samples in which the instance computed throughout: a
    producer prefills, a consumer decodes, others do either. None: the GPU does not tell.
    """

    topology: str
    experiment: str
    instance: str
    gpus: list[int]
    n: int
    sm: float | None
    tensor: float | None
    dram: float | None  # of the peak
    dram_tb_per_s: float | None
    dram_tb_per_s_max: float | None
    nvlink_tx_gb_per_s: float | None
    nvlink_rx_gb_per_s: float | None
    utilization: float | None  # NVML's plain one
    memory_gb: float | None  # the most
    power_w: float | None
    working_n: int
    working_sm: float | None
    working_dram_tb_per_s: float | None
    working_dram: float | None


class GpuTrack(msgspec.Struct, kw_only=True):
    """One GPU over one case: (seconds from the window's start, shares)."""

    topology: str
    instance: str
    gpu: int
    case: str
    points: list[tuple[float, float | None, float | None]]  # (s, SMs or utilisation, DRAM)


class GpuFigures(msgspec.Struct, kw_only=True):
    """What the GPUs did, or why nothing is known."""

    missing: list[str]  # reasons
    gpus: list[GpuInfo]
    assignment: list[str]
    rows: list[GpuRow]
    tracks: list[GpuTrack]


class Counter(msgspec.Struct, kw_only=True):
    """Samples of one GPU under a timeline: (start, end, share), ms after the intended send."""

    name: str
    steps: list[tuple[float, float, float]]


class Segment(msgspec.Struct, kw_only=True):
    """One bar of a timeline lane, ms after the client's intended send."""

    start: float
    end: float
    label: str
    kind: str  # wait | route | prefill | transfer | decode | stream


class Lane(msgspec.Struct, kw_only=True):
    name: str
    segments: list[Segment]
    marks: list[tuple[float, str]]  # instants: tokens, reservations


class Timeline(msgspec.Struct, kw_only=True):
    """The life of one request."""

    topology: str
    request_id: str
    num_prompt_tokens: int
    ttft: float
    until: float  # right edge, ms
    lanes: list[Lane]
    counters: list[Counter] = []


class CaseFlag(msgspec.Struct, kw_only=True):
    """Why a case's figures may not be believed, or how they are qualified."""

    topology: str
    experiment: str
    case: str
    rep: int
    code: str
    severity: Severity
    message: str


class Sentence(msgspec.Struct, kw_only=True):
    """One sentence of the verdict. `rule` names the rule in lab/verdict.py that made it."""

    rule: str
    tone: Literal["good", "bad", "neutral"]
    text: str


class Verdict(msgspec.Struct, kw_only=True):
    """`decision` is for the first P/D topology."""

    decision: Literal["disaggregate", "do-not-disaggregate", "depends", "no-evidence"]
    headline: str
    sentences: list[Sentence]


class Summary(msgspec.Struct, kw_only=True):
    """`summary.json`."""

    schema_version: int = SCHEMA_VERSION
    run: RunInfo
    environment: dict[str, Any]
    topologies: list[TopologyFigures]
    verdict: Verdict
    ttft: list[TtftRow]
    ratios: list[RatioRow]
    traffic: list[TrafficRow]
    queues: list[QueueRow] = []
    interference: list[InterferenceRow]
    shapes: list[ShapeRow]
    streams: list[StreamsRow] = []
    phases: list[PhaseRow]
    transfers: list[TransferRow]
    gpu: GpuFigures
    timelines: list[Timeline]
    flags: list[CaseFlag]
    num_cases: int

    @property
    def unit(self) -> str:
        return next((t.unit for t in self.topologies), "GPU")

    def label(self, name: str) -> str:
        return next((t.label for t in self.topologies if t.name == name), name)
