"""What a consumer's rank and a producer's rank say to each other over their Unix socket.

    consumer (connects)                      producer (listens)
    Hello, with its pages' descriptors  -->
                                        <--  Welcome | Refused
    Ask(T)          keep T's KV for me  -->
    Announce(T)     put it here         -->
                                        <--  Done(T) | Failed(T)
    Cancel(T)       not needed any more -->
                                        <--  Closed(T)

The producer may store into announced blocks until it has sent Done, Failed or Closed for them, or
its socket has ended. Ask, Announce and the prefill come in any order.
"""

from __future__ import annotations

import msgspec

from pdrelay.integrations.vllm.page_layout import PageLayout

PROTOCOL = 1


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message. How to reach the pages (`handles`, file descriptors) is the mover's matter."""

    protocol: int
    instance: str
    rank: int
    num_ranks: int
    transport: str
    layout: PageLayout
    handles: list[bytes]


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    instance: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    reason: str


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """The consumer's request is waiting: renew the lease."""

    transfer_id: str


class Announce(msgspec.Struct, frozen=True, kw_only=True, tag="announce"):
    """`blocks` are reserved for prompt blocks `first_block ..`; the earlier ones are cached."""

    transfer_id: str
    first_block: int
    blocks: list[int]
    num_tokens: int  # of the consumer's prompt: the producer's, or that and its first token
    digests: list[bytes]  # of its first num_tokens and num_tokens - 1 tokens


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    transfer_id: str


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Every block that the producer has for the request is stored."""

    transfer_id: str
    num_tokens: int  # of the producer's prompt
    num_bytes: int
    num_pieces: int
    start_ns: int  # CLOCK_MONOTONIC: first store
    end_ns: int  # last store
    busy_ns: int  # in copies


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The producer gave up and stores nothing more."""

    transfer_id: str
    reason: str


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """Answer to Cancel: nothing more is stored."""

    transfer_id: str


FromConsumer = Hello | Ask | Announce | Cancel
FromProducer = Welcome | Refused | Done | Failed | Closed
