"""One request of a load, before it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class BenchRequest:
    """What to send, and when.

    `arrival_s` is in seconds after the start of the load (ignored in a closed loop). Exactly one
    of `prompt_token_ids` and `prompt` is set. `tag` groups records, such as "long". `extra_body`
    is merged over the JSON body last.
    """

    index: int
    arrival_s: float
    prompt_token_ids: list[int] | None
    prompt: str | None
    max_tokens: int
    tag: str = ""
    extra_body: dict[str, Any] = field(default_factory=dict)


def with_arrivals(
    requests: Sequence[BenchRequest], arrivals_s: Sequence[float]
) -> list[BenchRequest]:
    """The same requests, the i-th arriving at `arrivals_s[i]` seconds."""
    assert len(requests) == len(arrivals_s), "one arrival time for each request"
    return [replace(r, arrival_s=t) for r, t in zip(requests, arrivals_s, strict=True)]
