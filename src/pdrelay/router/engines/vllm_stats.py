"""What a vLLM instance counts of itself, from its /metrics."""

from __future__ import annotations

import re

from pdrelay.core.messages import WorkerStats

_FIELDS = {
    b"vllm:num_requests_running": "num_running",
    b"vllm:num_requests_waiting": "num_waiting",
    b"vllm:prefix_cache_queries_total": "prefix_cache_queries",
    b"vllm:prefix_cache_hits_total": "prefix_cache_hits",
    b"vllm:num_preemptions_total": "num_preemptions",
    b"vllm:prompt_tokens_total": "num_prompt_tokens",
    b"vllm:generation_tokens_total": "num_generated_tokens",
}
_LINE = re.compile(
    rb"^(" + b"|".join(map(re.escape, _FIELDS)) + rb")(?:\{[^}\n]*\})? ([0-9.e+]+)$", re.MULTILINE
)


def read_stats(text: bytes, t_ns: int) -> WorkerStats:
    """Gauges and counters, summed over engine cores; what is not there stays 0. Blocks are not
    told: vLLM gives their share only."""
    totals = dict.fromkeys(_FIELDS.values(), 0.0)
    for name, value in _LINE.findall(text):
        totals[_FIELDS[name]] += float(value)
    return WorkerStats(t_ns=t_ns, **{field: int(value) for field, value in totals.items()})
