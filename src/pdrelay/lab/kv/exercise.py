"""What the lab exercise that pdrelay grew from says of KV transfers, and what is so."""

from __future__ import annotations

from pdrelay.lab.kv.config import GPU, LINKS
from pdrelay.lab.kv.model import Roofline
from pdrelay.model.config import BUILT_IN

ABOUT_MODEL = "llama-3.1-8b"
LARGE_MODEL = ("llama-3.1-70b", 4)  # of its third question, with the TP size of both sides
BYTES_A_TOKEN = (
    "The exercise's 524,288 B (512 KiB) a token counts 32 KV heads where Llama-3.1-8B has 8; its "
    "65.5 KB leaves out the factor 2 for K and V."
)


def corrections() -> list[tuple[str, str]]:
    """(what it says, what is so), from the model of `model.py`."""
    small, large = _roofline(ABOUT_MODEL, 1), _roofline(*LARGE_MODEL)
    long = 32_768
    shares = [large.transfer_s(t) / large.prefill_s(t) for t in (4096, long, 100_000)]
    gb = small.transfer_bytes(2048) / 1e9
    return [
        ("512 KiB a token; elsewhere 65.5 KB", BYTES_A_TOKEN),
        (
            "Q1: 2,048 tokens take 11 ms over 100 Gb/s",
            f"{gb * 1e3:.0f} MB at 12.5 GB/s take {small.transfer_s(2048) * 1e3:.1f} ms",
        ),
        (
            "NVLink moves 600 GB/s from one GPU to the other",
            "900 GB/s is the sum of both directions: 450 one way by the data sheet, 390 measured",
        ),
        (
            f"Q3: 70B, TP=4, {long:,} tokens: 890 ms over 100 Gb/s, “comparable to prefill”",
            f"{large.transfer_bytes(long) / 1e9:.1f} GB take "
            f"{large.transfer_s(long) * 1e3:.0f} ms; prefill takes {large.prefill_s(long):.1f} s",
        ),
        (
            "Q3: transfer overtakes prefill at about 100,000 tokens, and beyond that P/D loses",
            "transfer grows with the length, prefill with its square: the share of prefill falls, "
            + " / ".join(f"{share:.0%}" for share in shares)
            + f" at 4,096 / {long:,} / 100,000 tokens; there is no such crossover",
        ),
        (
            "Q4: 96 sends of K, V and hidden states a request, 192 MB for 512 tokens",
            "that connector sent one tensor a layer, 32 of "
            f"{small.transfer_bytes(512) / 32 / 1e6:.1f} MB, {small.transfer_bytes(512) / 1e6:.0f} "
            "MB together; hidden states stay",
        ),
        (
            "KV transfer time is TTFT of P/D less prefill alone",
            "that difference holds routing, queueing and D's first step too; here transfers are "
            "timed themselves, and what they add to TTFT and to the second token is shown apart",
        ),
    ]


def _roofline(name: str, tp: int) -> Roofline:
    return Roofline(BUILT_IN[name], "bfloat16", tp, GPU, LINKS[-1])
