"""A rank's counters in vLLM's log line and at its /metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from pdrelay.integrations.vllm.stats import add_stats

# Prometheus name, key of HandOverStats, factor, help
_COUNTERS = (
    ("handed_over", "num_transfers", 1, "Prompts whose KV was handed over, per rank."),
    ("bytes", "num_bytes", 1, "Bytes of KV handed over."),
    ("pieces", "num_pieces", 1, "Contiguous copies of KV."),
    ("failed", "num_failed", 1, "Hand-overs that failed or were aborted by the other side."),
    ("expired", "num_expired", 1, "Prompts whose KV nobody asked for within the lease."),
    ("copy_seconds", "busy_ns", 1e-9, "Time the producer spent in issuing copies."),
    ("span_seconds", "span_ns", 1e-9, "Time from first to last copy, summed over hand-overs."),
)


@dataclass
class PdrelayStats(KVConnectorStats):
    """Sums of an interval; `data` is what HandOverStats.take gives."""

    def reset(self) -> None:
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> PdrelayStats:
        self.data = add_stats(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        count = self.data.get("num_transfers", 0)
        span_ms = self.data.get("span_ns", 0) / 1e6
        return {
            "Hand-overs": count,
            "MB": round(self.data.get("num_bytes", 0) / 1e6, 3),
            "Mean first to last copy (ms)": round(span_ms / count, 3) if count else 0,
            "Failed": self.data.get("num_failed", 0),
            "Expired": self.data.get("num_expired", 0),
        }

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PdrelayPromMetrics(KVConnectorPromMetrics):
    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[Any]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters = [
            (
                key,
                factor,
                self._per_engine(
                    counter(name=f"vllm:pdrelay_{name}", documentation=text, labelnames=labelnames)
                ),
            )
            for name, key, factor, text in _COUNTERS
        ]

    def _per_engine(self, metric: Any) -> dict[int, Any]:
        return {
            engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, factor, metric in self._counters:
            metric[engine_idx].inc(transfer_stats_data.get(key, 0) * factor)
