"""What the scheduler's half of the connector tells the workers' halves in each step; no vLLM."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chunk:
    """Producer: in this step the prompt's KV becomes complete up to `num_ready` tokens."""

    request_id: str
    transfer_id: str
    num_tokens: int  # of the prompt
    digest: bytes
    blocks: list[int]  # of the request, from its first
    num_ready: int


@dataclass(frozen=True)
class Load:
    """Consumer: `blocks` are reserved for prompt blocks `first_block ..` of a request."""

    request_id: str
    transfer_id: str
    producer: str
    first_block: int
    blocks: list[int]
    num_tokens: int  # of the prompt
    digests: list[bytes]


@dataclass(frozen=True)
class Interest:
    """Consumer: a transfer at a producer that a request of ours waits for, or no longer does."""

    transfer_id: str
    producer: str


@dataclass
class StepPlan:
    """One step's news, in the order in which they must be applied."""

    # producer
    rewound: list[str] = field(default_factory=list)  # preempted: blocks are no longer theirs
    dropped: dict[str, str] = field(default_factory=dict)  # request -> why; blocks are freed
    refused: dict[str, str] = field(default_factory=dict)  # transfer -> why; never prefilled
    held: list[str] = field(default_factory=list)  # finished: blocks are freed once sent
    chunks: list[Chunk] = field(default_factory=list)
    # consumer
    cancelled: list[str] = field(default_factory=list)  # loads given up
    released: list[Interest] = field(default_factory=list)  # given up before blocks were reserved
    waiting: list[Interest] = field(default_factory=list)  # not reserved yet
    loads: list[Load] = field(default_factory=list)


def prompt_digest(token_ids: Sequence[int], extra: Iterable[str] = ()) -> bytes:
    """16 bytes that two prompts share only if their tokens and `extra` (adapter, images) agree."""
    state = hashlib.blake2b(array("q", token_ids), digest_size=16)
    return _with_extra(state, extra)


def prompt_digests(token_ids: Sequence[int], extra: Sequence[str] = ()) -> list[bytes]:
    """`prompt_digest` of the prompt, and of it without its last token, in one pass."""
    state = hashlib.blake2b(array("q", token_ids[:-1]), digest_size=16)
    shorter = _with_extra(state.copy(), extra)
    state.update(array("q", token_ids[-1:]))
    return [_with_extra(state, extra), shorter]


def _with_extra(state: hashlib.blake2b, extra: Iterable[str]) -> bytes:
    for text in extra:
        state.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return state.digest()
