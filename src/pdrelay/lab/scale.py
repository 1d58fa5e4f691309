"""How much each experiment sends: one Scale for `tiny` on CPU cores, one for 8B models on GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Pace:
    """How fast servers are, roughly, in seconds: for estimates of time only.

    A prefill of T tokens takes `prefill_s + token_s * T + square_s * T**2`.
    """

    prefill_s: float
    token_s: float
    square_s: float
    step_s: float  # a decode step of a few streams
    start_s: float  # to start, warm up and stop a native server
    external_start_s: float  # the same on a production engine that has to compile first
    external_again_s: float  # and where its compile cache has it already

    def prefill(self, tokens: int) -> float:
        return self.prefill_s + self.token_s * tokens + self.square_s * tokens**2

    def request(self, input_len: int, output_len: int) -> float:
        """One request on an idle server."""
        return self.prefill(input_len) + output_len * self.step_s

    def start(self, *, native: bool, compiled: bool = False) -> float:
        if native:
            return self.start_s
        return self.external_again_s if compiled else self.external_start_s


@dataclass(frozen=True)
class Shape:
    """Requests of one size, open loop. The rate is low enough for no queue to form."""

    name: str
    input_len: int
    output_len: int
    rate: float  # requests/s


@dataclass(frozen=True)
class FixedLoad:
    """Poisson arrivals of one size, for comparison with a queue's prediction."""

    input_len: int
    output_len: int
    rate: float  # requests/s
    num_requests: int


@dataclass(frozen=True)
class Scale:
    """How much each experiment sends. Seconds are of wall time, lengths in tokens.

    `quick` meets the p50 sample floor (11), except for the longest prompts on a CPU; `full` meets
    p90's (64) by repeats.
    """

    name: str  # "cpu" or "gpu"
    pace: Pace
    warmup_lengths: tuple[int, ...]
    # 1: (input length, requests) on an idle server, and beside streams
    probes: tuple[tuple[int, int], ...]
    busy_probes: tuple[tuple[int, int], ...]
    num_streams: int  # background streams of experiments 1 and 3
    stream_output_len: int
    # 2: requests/s offered, or (where empty) shares of the baseline's measured capacity
    rates: tuple[float, ...]
    rate_fractions: tuple[float, ...]
    traffic_s: float
    synthetic_trace_s: float  # stands in where no trace is given; 0: nothing does
    chat_output_mean: float
    chat_max_output_len: int
    fixed: FixedLoad | None
    # 3: `num_long` prompts every `long_gap_s`, with a pause after each `long_group`
    quiet_s: float
    long_input_len: int
    num_long: int
    long_gap_s: float
    long_group: int
    long_pause_s: float
    # 4: shapes, then ITL with so many streams of (input, output) at once
    shapes: tuple[Shape, ...]
    shape_requests: int
    stream_counts: tuple[int, ...]
    stream_shape: tuple[int, int]
    budget_s: float | None  # for the whole run; steps that no longer fit are left out and named


# `tiny` in float32, one core a rank (docs/LOG.md).
CPU_PACE = Pace(
    prefill_s=0.0,
    token_s=7.5e-5,
    square_s=2.67e-8,
    step_s=0.003,
    start_s=8.0,
    external_start_s=60.0,
    external_again_s=40.0,
)
# Llama-3.1-8B in bfloat16 on an H200, between this engine's times and vLLM's.
GPU_PACE = Pace(
    prefill_s=0.008,
    token_s=2.2e-5,
    square_s=4e-10,
    step_s=0.005,
    start_s=18.0,
    external_start_s=95.0,
    external_again_s=50.0,
)

QUICK = Scale(
    name="cpu",
    pace=CPU_PACE,
    warmup_lengths=(64, 512, 2048),
    probes=((128, 12), (512, 12), (2048, 12), (8192, 3)),
    busy_probes=((128, 11), (512, 11), (2048, 11), (8192, 1)),
    num_streams=4,
    stream_output_len=400,
    rates=(),
    rate_fractions=(0.5, 1.0, 1.5),
    traffic_s=4.0,
    synthetic_trace_s=4.0,
    chat_output_mean=64.0,
    chat_max_output_len=128,
    fixed=FixedLoad(1024, 8, 4.0, 16),
    quiet_s=1.5,
    long_input_len=2048,
    num_long=8,
    long_gap_s=0.9,
    long_group=8,
    long_pause_s=0.0,
    shapes=(
        Shape("short-short", 100, 20, 6.0),
        Shape("long-short", 2048, 30, 2.0),
        Shape("short-long", 20, 200, 3.0),
    ),
    shape_requests=12,
    stream_counts=(1, 8),
    stream_shape=(64, 96),
    budget_s=330.0,
)

_FULL_PROBES = (*((length, 16) for length in (128, 256, 512, 1024, 2048, 4096)), (8192, 12))

FULL = replace(
    QUICK,
    probes=_FULL_PROBES,
    busy_probes=_FULL_PROBES,
    rate_fractions=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    traffic_s=20.0,
    synthetic_trace_s=20.0,
    chat_max_output_len=256,
    fixed=FixedLoad(1024, 8, 4.0, 140),
    quiet_s=3.0,
    num_long=24,
    shape_requests=24,
    budget_s=None,
)

_GPU_LENGTHS = (128, 512, 1024, 2048, 4096, 8192)

# Rates in requests/s, so that runs on different engines are offered the same load. Four topologies
# of the native engine on 8B take about 8 minutes.
GPU_QUICK = Scale(
    name="gpu",
    pace=GPU_PACE,
    warmup_lengths=(64, 512, 2048, 4096, 8192),
    probes=tuple((length, 12) for length in _GPU_LENGTHS),
    busy_probes=tuple((length, 11) for length in _GPU_LENGTHS),
    num_streams=16,
    stream_output_len=1024,
    rates=(6.0, 24.0, 60.0),
    rate_fractions=(),
    traffic_s=5.0,
    synthetic_trace_s=0.0,
    chat_output_mean=180.0,
    chat_max_output_len=512,
    fixed=FixedLoad(4096, 128, 7.0, 80),
    quiet_s=2.0,
    long_input_len=8192,
    num_long=16,
    long_gap_s=0.5,
    long_group=8,
    long_pause_s=1.0,
    shapes=(
        Shape("short-short", 128, 32, 8.0),
        Shape("long-short", 4096, 32, 3.0),
        Shape("short-long", 128, 512, 4.0),
    ),
    shape_requests=12,
    stream_counts=(1, 32, 64),
    stream_shape=(512, 256),
    budget_s=480.0,
)

# 700 requests of the fixed load are enough for a p99 (floor: 662) in one repeat.
GPU_FULL = replace(
    GPU_QUICK,
    probes=tuple((length, 20) for length in _GPU_LENGTHS),
    busy_probes=tuple((length, 20) for length in _GPU_LENGTHS),
    rates=(2.0, 6.0, 12.0, 24.0, 48.0, 72.0),
    traffic_s=20.0,
    fixed=FixedLoad(4096, 128, 7.0, 700),
    quiet_s=3.0,
    num_long=64,
    shape_requests=24,
    budget_s=None,
)


def choose_scale(name: str, *, quick: bool) -> Scale:
    """The scale called "cpu" or "gpu"."""
    assert name in ("cpu", "gpu")
    if name == "gpu":
        return GPU_QUICK if quick else GPU_FULL
    return QUICK if quick else FULL
