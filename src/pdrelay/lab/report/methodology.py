"""How the lab measures, and what the lab exercise that it grew from got wrong."""

from __future__ import annotations

METHODS = (
    "Arrivals are drawn before the run and sent on an absolute schedule (open loop); every clock "
    "starts at the intended send, so a queue is never hidden. The idle probes of experiment 1, the "
    "background streams and the capacity burst are closed loops, and labelled so.",
    "TTFT: intended send to the first content token. ITL: every gap between consecutive tokens, "
    "pooled. TPOT: (end − first token)/(n − 1) of one request. Goodput: requests/s that meet every "
    "service level, per GPU (on a CPU: per rank); failed requests count as missed.",
    "A percentile needs at least 11 (p50), 64 (p90), 130 (p95) or 662 (p99) samples, MLPerf's "
    "early-stopping rule at 99 % confidence; below that the range and n are shown instead.",
    "Intervals are 95 %. With five or more repeats: Student's t across the repeats' percentiles; "
    "ratios from paired logarithms. With fewer: distribution-free order statistics of the run's "
    "own samples, which take requests (and gaps of one stream) as independent and are therefore "
    "optimistic for ITL. Requests of one run are never resampled.",
    "Interference: a gap of a running stream is busy where it overlaps the time from a long "
    "prompt's sending to its last token, quiet elsewhere: the hand-over and the long prompt's own "
    "decode steps are in the busy ones.",
    "Streams at once: sent together, as many requests as streams; ITL counts only while at least "
    "nine in ten of them decode, so that neither their prefills nor their ends are in it.",
    "Requests of one size arrive as a Poisson process, beside what a queue for prefill predicts: "
    "M/D/1 for one prefilling instance, M/D/X for X producers, for replicas the bounds M/D/N "
    "(least loaded) and N separate M/D/1 (random split). Service is the prefill measured on the "
    "idle server; decode steps and prompts that share a step are not in the model.",
    "Prompts are random token ids that differ from the first block on, so the prefix cache cannot "
    "answer; only traces share prefixes, where the trace says so.",
    "Topologies on the same number of GPUs are compared; one replica is the exercise's baseline "
    "and no rival. The bytes of every hand-over are checked against whole blocks of the prompt.",
)

HANDOUT: tuple[tuple[str, str], ...] = (
    (
        "times the whole non-streaming answer of 30 tokens and calls it TTFT",
        "TTFT needs streaming; those are end-to-end times",
    ),
    (
        "sends the same prompt ten times",
        "the prefix cache answers from the second on; prompts differ here from the first block",
    ),
    (
        "measures experiment 2 against the prefill server only",
        "nothing was disaggregated there; here the front door sends each request to both",
    ),
    (
        "p50 is the 5th of 10, p99 the largest of 10",
        "a p99 needs 662 samples; below the floor none is printed",
    ),
    (
        "one request at a time for “mixed traffic”",
        "interference needs long prompts arriving, open loop, over running decodes",
    ),
    (
        "compares 1 GPU with 2",
        "the same number: two replicas, TP=2, one prefill and one decode",
    ),
    (
        "32 KV heads, 512 KiB a token, elsewhere 65.5 KB",
        "Llama-3.1-8B has 8 KV heads: 2 × 32 × 8 × 128 × 2 = 131,072 B a token",
    ),
    (
        "100 Gbps moves 2,048 tokens in 11 ms",
        "268 MB at 12.5 GB/s take 21.5 ms",
    ),
    (
        "96 sends a request: K, V and hidden states of each layer",
        "that connector sent one tensor a layer, 32; hidden states are not sent",
    ),
    (
        "names PyNcclConnector, kv_rank, kv_parallel_size",
        "those are vLLM V0's; the connector is gone since 0.11, the keys since 0.32",
    ),
    (
        "says the connector is not meant for one node",
        "it was; its launch failed for other causes",
    ),
    (
        "finds prefill flat at 120 ms from 128 to 2,048 tokens",
        "that is the overhead of that set-up; 17 to 55 ms on an H200",
    ),
)
