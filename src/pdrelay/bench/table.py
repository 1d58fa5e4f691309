"""The summary as text, in the shape of `vllm bench serve`'s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WIDTH = 50
_HEADERS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
_PERCENTILES = (("p90", "P90"), ("p99", "P99"))


def _line(label: str, value: Any) -> str:
    if value is None:
        text = "too few samples"
    elif isinstance(value, float):
        text = f"{value:.2f}"
    else:
        text = str(value)
    return f"{label:<40} {text:<10}".rstrip()


def format_table(summary: Mapping[str, Any]) -> str:
    """Several lines, ending with the validity flags."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines.append(_line("Successful requests:", summary["completed"]))
    lines.append(_line("Failed requests:", summary["failed"]))
    for key, label in (("cancelled", "Cancelled requests:"), ("unsent", "Requests never sent:")):
        if summary[key]:
            lines.append(_line(label, summary[key]))
    if summary.get("max_concurrency") is not None:
        lines.append(_line("Maximum request concurrency:", summary["max_concurrency"]))
    if isinstance(summary.get("request_rate"), float):
        lines.append(_line("Request rate configured (RPS):", summary["request_rate"]))
    lines += [
        _line("Benchmark duration (s):", summary["duration"]),
        _line("Total input tokens:", summary["total_input_tokens"]),
        _line("Total generated tokens:", summary["total_output_tokens"]),
        _line("Request throughput (req/s):", summary["request_throughput"]),
    ]
    if summary["request_goodput"] is not None:
        lines.append(_line("Request goodput (req/s):", summary["request_goodput"]))
        lines.append(_line("Attainment (%):", 100 * summary["attainment"]))
    lines += [
        _line("Output token throughput (tok/s):", summary["output_throughput"]),
        _line("Peak output token throughput (tok/s):", summary["max_output_tokens_per_s"]),
        _line("Peak concurrent requests:", summary["max_concurrent_requests"]),
        _line("Total token throughput (tok/s):", summary["total_token_throughput"]),
        _line("P99 send lag (ms):", summary["send_lag_p99_ms"]),
    ]
    for metric, (name, header) in _HEADERS.items():
        lines.append(f"{header:-^{_WIDTH}}")
        lines.append(_line(f"Mean {name} (ms):", summary[f"mean_{metric}_ms"]))
        lines.append(_line(f"Median {name} (ms):", summary[f"median_{metric}_ms"]))
        for key, label in _PERCENTILES:
            lines.append(_line(f"{label} {name} (ms):", summary[f"{key}_{metric}_ms"]))
    lines.append("=" * _WIDTH)
    for flag in summary["validity_flags"]:
        word = "INVALID" if flag["severity"] == "error" else "note"
        lines.append(f"{word}: {flag['message']}")
    return "\n".join(lines)
