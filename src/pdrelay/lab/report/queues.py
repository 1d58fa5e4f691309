"""The fixed load beside the prediction of a queue in front of the prefill.

A prefill is taken as a server that works on one prompt at a time, in order of arrival, for as long
as it takes on an idle server. Decode steps between prefills, prompts that share a step, and a KV
pool that is full are left out: what is measured above the prediction is theirs.

Which queue a topology is:

    tp:N        M/D/1
    pd:X:Y      M/D/X: the front door gives a prompt to the producer with the least to do
    replicas:N  between M/D/N (every prompt meets the instance that is free first: a lower bound of
                a least-loaded choice) and N separate M/D/1, each with 1/N of the arrivals (a random
                split); both are given
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pdrelay.bench.percentile import percentile
from pdrelay.errors import ConfigError
from pdrelay.lab.queueing import MDc, utilisation, waits_of
from pdrelay.lab.report.figures import Percentiles, QueueRow
from pdrelay.lab.report.joined import joined
from pdrelay.lab.report.phases import phases_of
from pdrelay.lab.report.samples import by_repeat, group_by_case, ttft
from pdrelay.lab.rundir import FIXED_CASE, FIXED_IDLE_CASE, Case, Run
from pdrelay.lab.stats import percentile_estimate
from pdrelay.lab.topology import parse_name


@dataclass(frozen=True)
class QueueModel:
    """A queue that stands for a topology. `share`: its part of the arrivals."""

    name: str
    servers: int
    share: float = 1.0


def models_of(topology: str) -> list[QueueModel]:
    """From a topology's name."""
    kind, counts = parse_name(topology)
    if kind == "replicas" and counts[0] > 1:
        count = counts[0]
        return [
            QueueModel(f"M/D/{count} (least loaded, lower bound)", count),
            QueueModel(f"{count} × M/D/1 (random split)", 1, 1 / count),
        ]
    servers = counts[0] if kind == "pd" else 1
    return [QueueModel(f"M/D/{servers}", servers)]


def queue_rows(run: Run) -> list[QueueRow]:
    """By topology; none where the fixed load or its idle requests are missing."""
    rows = []
    for name in run.topologies:
        groups = group_by_case(run.select("traffic", name))
        loaded, idle = groups.get(FIXED_CASE, []), groups.get(FIXED_IDLE_CASE, [])
        if loaded and any(record.ok for case in idle for record in case.measured):
            rows += [_row(run, name, model, loaded, idle) for model in models_of(name)]
    return rows


def service_ms(run: Run, idle: Sequence[Case]) -> tuple[float, str]:
    """Median prefill of the idle requests, else their median TTFT; and which of the two."""
    phases = [phases_of(request) for case in idle for request in joined(run, case)]
    prefills = [each.prefill for each in phases if each is not None and each.prefill > 0]
    if prefills:
        return statistics.median(prefills), "prefill, idle"
    ttfts = [value for group in by_repeat(idle, ttft) for value in group]
    return statistics.median(ttfts), "TTFT, idle"


def _row(
    run: Run, topology: str, model: QueueModel, loaded: Sequence[Case], idle: Sequence[Case]
) -> QueueRow:
    info = loaded[0].info
    assert info.rate is not None
    service, source = service_ms(run, idle)
    rate = info.rate * model.share
    idle_ttft = percentile_estimate(by_repeat(idle, ttft))
    base_ms = statistics.median(v for group in by_repeat(idle, ttft) for v in group)
    mean_ms, steady = _steady(rate, service, model.servers, base_ms)
    ttfts = by_repeat(loaded, ttft)
    return QueueRow(
        topology=topology,
        model=model.name,
        input_len=info.input_len or 0,
        output_len=info.output_len or 0,
        rate=info.rate,
        num_servers=model.servers,
        service_ms=service,
        service_source=source,
        idle_ttft=idle_ttft,
        utilisation=utilisation(rate, service / 1e3, model.servers),
        mean_wait_ms=mean_ms,
        steady=steady,
        replayed=_replayed(loaded, service, model, base_ms),
        ttft=percentile_estimate(ttfts),
        ttft_p90=percentile_estimate(ttfts, 90),
        ttft_p99=percentile_estimate(ttfts, 99),
    )


def _steady(
    rate: float, service: float, servers: int, base_ms: float
) -> tuple[float | None, Percentiles]:
    """Mean wait and percentiles of TTFT, ms."""
    try:
        queue = MDc(rate, service / 1e3, servers)
    except ConfigError:  # no steady state
        return None, Percentiles()
    p50, p90, p99 = (base_ms + 1e3 * queue.wait_s(p) for p in (50.0, 90.0, 99.0))
    return 1e3 * queue.mean_wait_s, Percentiles(p50=p50, p90=p90, p99=p99)


def _replayed(
    loaded: Sequence[Case], service: float, model: QueueModel, base_ms: float
) -> Percentiles:
    """TTFT of this run's arrivals in the queue, ms, all repeats pooled."""
    if model.share != 1.0:
        return Percentiles()
    waits: list[float] = []
    for case in loaded:
        arrivals = sorted(record.intended_ns / 1e9 for record in case.measured)
        waits += waits_of(arrivals, service / 1e3, model.servers)
    p50, p90, p99 = (base_ms + 1e3 * percentile(waits, p) for p in (50.0, 90.0, 99.0))
    return Percentiles(p50=p50, p90=p90, p99=p99)
