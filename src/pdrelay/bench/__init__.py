"""The open-loop load generator: workloads, traces, client, records, summary."""

from pdrelay.bench.client import ClosedLoop, LoadResult, OpenLoop, run_load
from pdrelay.bench.record import ClientRecord, read_records, write_records
from pdrelay.bench.request import BenchRequest, with_arrivals
from pdrelay.bench.slo import SLO_PRESETS, Slo, parse_goodput, slo_preset
from pdrelay.bench.summary import metric_samples, summarize
from pdrelay.bench.traces import TraceInfo, read_trace

__all__ = [
    "SLO_PRESETS",
    "BenchRequest",
    "ClientRecord",
    "ClosedLoop",
    "LoadResult",
    "OpenLoop",
    "Slo",
    "TraceInfo",
    "metric_samples",
    "parse_goodput",
    "read_records",
    "read_trace",
    "run_load",
    "slo_preset",
    "summarize",
    "with_arrivals",
    "write_records",
]
