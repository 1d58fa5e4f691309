"""Prometheus metrics under vLLM's names, each with model_name, role, and instance.

In P/D the first token's time is the producer's, every later token's the consumer's. `pdrelay:`
names are what vLLM has no name for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdrelay.core.events import Event
from pdrelay.core.messages import WorkerStats
from pdrelay.router.cluster import Cluster

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "role", "instance")
# vLLM's buckets (v1/metrics/loggers.py), with finer ones below for small models.
_TTFT_S: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_S: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_E2E_S: tuple[float, ...] = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TRANSFER_S: tuple[float, ...] = (
    *(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
)

_GAUGES = {
    "vllm:num_requests_running": ("num_running", "Requests in the running batch."),
    "vllm:num_requests_waiting": ("num_waiting", "Requests waiting for blocks or a batch slot."),
    "pdrelay:num_requests_transferring": ("num_transferring", "Requests whose KV is on its way."),
    "pdrelay:num_kv_blocks": ("num_blocks", "Blocks in the KV pool."),
    "pdrelay:peak_rss_bytes": ("peak_rss_bytes", "Peak resident memory of rank 0."),
}
_COUNTERS = {
    "vllm:prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up."),
    "vllm:prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found."),
    "vllm:num_preemptions": ("num_preemptions", "Preemptions by recomputation."),
    "pdrelay:engine_steps": ("num_steps", "Forward passes."),
    "pdrelay:kv_bytes_sent": ("kv_bytes_sent", "KV bytes handed over."),
    "pdrelay:kv_bytes_received": ("kv_bytes_received", "KV bytes taken over."),
    "pdrelay:kv_transfer_failures": ("kv_transfer_failures", "Hand-overs that failed."),
}
_BLOCK_STATES = ("free", "cached", "used", "in_transfer")


class InstanceMetrics:
    """The request metrics of one instance, labels bound."""

    def __init__(self, families: _Families, labels: tuple[str, str, str]) -> None:
        self.time_to_first_token = families.time_to_first_token.labels(*labels)
        self.inter_token_latency = families.inter_token_latency.labels(*labels)
        self.e2e_latency = families.e2e_latency.labels(*labels)
        self.prompt_tokens = families.prompt_tokens.labels(*labels)
        self.generation_tokens = families.generation_tokens.labels(*labels)
        self.success = {
            reason: families.success.labels(*labels, reason)
            for reason in ("stop", "length", "abort")
        }


class _Families:
    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, registry=registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_LABELS, *labels), registry=registry)

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT_S
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "Gap between tokens of a request.", _ITL_S
        )
        self.e2e_latency = histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to end, requests that succeeded.", _E2E_S
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of prefilled requests.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens relayed.")
        self.success = counter("vllm:request_success", "Requests ended.", "finished_reason")


class Metrics:
    """One registry for one front door."""

    def __init__(self, model_name: str, cluster: Cluster) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        families = _Families(self._registry)
        self._instances = {
            client.instance: InstanceMetrics(families, (model_name, client.role, client.instance))
            for client in cluster.clients
        }
        link = ("model_name", "producer", "consumer", "transport")
        self._model_name = model_name
        self._transfer_bytes = Counter(
            "pdrelay:kv_transfer_bytes", "KV bytes moved.", link, registry=self._registry
        )
        self._transfer_seconds = Histogram(
            "pdrelay:kv_transfer_seconds",
            "First piece sent to all pieces at the consumer.",
            link,
            registry=self._registry,
            buckets=_TRANSFER_S,
        )
        self._failures = Counter(
            "pdrelay:request_failures",
            "Requests refused or lost, by error code.",
            ("model_name", "code"),
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(model_name, cluster))

    def add(self, collector: Collector) -> None:
        """Show what `collector` has, too."""
        self._registry.register(collector)

    def of(self, instance: str) -> InstanceMetrics:
        return self._instances[instance]

    def transfer(self, producer: str, end: Event, seconds: float | None) -> None:
        """A hand-over ended; `end` is its TRANSFER_END event. `seconds` None: nothing moved."""
        labels = (self._model_name, producer, end.instance, end.transport)
        self._transfer_bytes.labels(*labels).inc(end.num_bytes)
        if seconds is not None:
            self._transfer_seconds.labels(*labels).observe(seconds)

    def failed(self, code: str) -> None:
        self._failures.labels(self._model_name, code).inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What workers report of themselves, read when scraped. Counters restart with the worker."""

    def __init__(self, model_name: str, cluster: Cluster) -> None:
        self._model_name = model_name
        self._cluster = cluster

    def collect(self) -> Iterable[Metric]:
        for name, (field, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for labels, stats in self._stats():
                gauge.add_metric(labels, getattr(stats, field))
            yield gauge
        for name, (field, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            for labels, stats in self._stats():
                counter.add_metric(labels, getattr(stats, field))
            yield counter
        yield self._busy()
        yield self._kv_usage()
        yield self._kv_blocks()
        yield self._up()

    def _stats(self) -> Iterator[tuple[list[str], WorkerStats]]:
        for client in self._cluster.clients:
            yield [self._model_name, client.role, client.instance], client.stats

    def _busy(self) -> Metric:
        busy = CounterMetricFamily(
            "pdrelay:engine_busy_seconds", "Time inside forward passes.", labels=_LABELS
        )
        for labels, stats in self._stats():
            busy.add_metric(labels, stats.busy_ns / 1e9)
        return busy

    def _kv_usage(self) -> Metric:
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels=_LABELS
        )
        for labels, stats in self._stats():
            held = stats.num_used_blocks + stats.num_in_transfer_blocks
            usage.add_metric(labels, held / max(stats.num_blocks, 1))
        return usage

    def _kv_blocks(self) -> Metric:
        blocks = GaugeMetricFamily(
            "pdrelay:kv_blocks", "KV blocks by state.", labels=(*_LABELS, "state")
        )
        for labels, stats in self._stats():
            for state in _BLOCK_STATES:
                blocks.add_metric([*labels, state], getattr(stats, f"num_{state}_blocks"))
        return blocks

    def _up(self) -> Metric:
        up = GaugeMetricFamily("pdrelay:instance_up", "1 while it answers.", labels=_LABELS)
        for client in self._cluster.clients:
            up.add_metric(
                [self._model_name, client.role, client.instance], 1.0 if client.alive else 0.0
            )
        return up
