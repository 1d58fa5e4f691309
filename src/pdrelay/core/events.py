"""What happened to one request, and when: the event list is *the* record.

Times are CLOCK_MONOTONIC nanoseconds, which all processes of one host share.
"""

from __future__ import annotations

import enum

import msgspec

SCHEMA_VERSION = 1


class EventKind(enum.StrEnum):
    ARRIVED = "arrived"  # front door: the request's last byte was read
    ROUTED = "routed"  # front door: instances chosen
    PREFILL_START = "prefill_start"  # first chunk begins
    PREFILL_END = "prefill_end"  # last chunk's forward pass is over
    RESERVED = "reserved"  # consumer: blocks are reserved for the prompt
    TRANSFER_START = "transfer_start"  # producer: first piece is sent
    TRANSFER_END = "transfer_end"  # consumer: all pieces are in its pages, right or not
    DECODE_ADMITTED = "decode_admitted"  # consumer: joined the running batch
    PREEMPTED = "preempted"
    FIRST_TOKEN = "first_token"  # sampled
    TOKEN = "token"  # sampled, from the second on
    FINISHED = "finished"
    FAILED = "failed"


class Event(msgspec.Struct, omit_defaults=True, gc=False):
    """One event. `num_bytes`, `num_pieces`, `busy_ns` belong to transfer events.

    There is one a token, and none can be part of a cycle: the collector, which would stop the front
    door for milliseconds to walk them, does not know of them.
    """

    kind: EventKind
    t_ns: int
    instance: str  # "router" or an instance id such as "prefill-0"
    num_bytes: int = 0
    num_pieces: int = 0
    busy_ns: int = 0  # time spent moving bytes, as opposed to waiting for the next layer
    transport: str = ""
    detail: str = ""


class RequestRecord(msgspec.Struct, kw_only=True):
    """The life of one request, one JSON line in `events.jsonl`."""

    schema_version: int = SCHEMA_VERSION
    request_id: str  # internal
    client_request_id: str = ""  # the client's X-Request-Id, when it sent one
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens served from the prefill side's prefix cache
    num_output_tokens: int = 0
    instances: list[str] = []  # co-located: one; P/D: producer, consumer
    finish_reason: str = ""
    events: list[Event] = []
