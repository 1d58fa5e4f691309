"""What the front door, the ranks and P/D peers say to each other, as msgpack over Unix sockets.

    front door -> rank 0   Submit | Prefill | Expect | Abort | Ping | Drain
    rank 0 -> front door   Ready | Met | StepResult | Pong | Fatal
    producer -> consumer   PeerIntro | Commit | Cancel | Closed
    consumer -> producer   PeerHello | Reserve | Cancel | Closed

Every message is a tagged struct; an unknown tag or a wrong type is a ProtocolError at the reader.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from pdrelay.core.events import Event
from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import TokenIds


class Role(enum.StrEnum):
    """What an instance does. `BOTH` is a co-located instance."""

    BOTH = "both"
    PREFILL = "prefill"  # KV producer
    DECODE = "decode"  # KV consumer


FinishReason = Literal["stop", "length", "abort"]


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A validated, tokenized request. `request_id` is internal and never reused."""

    request_id: str
    prompt_token_ids: TokenIds
    params: SamplingParams
    arrived_ns: int
    cache_salt: str = ""  # separates prefix caches


# ---- front door -> rank 0


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Prefill and decode here (role both)."""

    request: EngineRequest


class Prefill(msgspec.Struct, frozen=True, tag="prefill"):
    """Prefill here, hand the KV to `consumer`, sample and report the first token."""

    request: EngineRequest
    consumer: str  # instance id
    consumer_address: str  # path of the consumer's peer socket (a new one each incarnation)


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """Connect to `consumer` and prepare steps that store into its pages, before prompts come.
    Answered by `Met`."""

    consumer: str
    consumer_address: str  # as in Prefill


class Expect(msgspec.Struct, frozen=True, tag="expect"):
    """Reserve blocks here, take the KV from `producer`, decode from the second token on."""

    request: EngineRequest
    producer: str


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget the request. Idempotent; unknown ids are ignored; nothing is reported back."""

    request_id: str
    reason: str = ""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    nonce: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what runs, accept nothing new, exit 0 when idle."""


ToWorker = Submit | Prefill | Meet | Expect | Abort | Ping | Drain


# ---- rank 0 -> front door


class WorkerStats(msgspec.Struct, kw_only=True):
    """A snapshot of one instance: gauges now, counters since start."""

    t_ns: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_transferring: int = 0  # requests whose KV is on its way
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_used_blocks: int = 0
    num_in_transfer_blocks: int = 0
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed or found in the cache
    num_generated_tokens: int = 0
    kv_bytes_sent: int = 0
    kv_bytes_received: int = 0
    kv_transfer_failures: int = 0
    peak_rss_bytes: int = 0
    busy_ns: int = 0  # time inside forward passes


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    instance: str
    role: Role
    pid: int
    layout: KVLayout
    peer_address: str = ""  # consumers: where producers connect
    max_model_len: int
    transport: str = ""
    resolved: dict[str, str] = {}  # what "auto" became, for printing


class Met(msgspec.Struct, frozen=True, tag="met"):
    """Answer to Meet: nothing that it made due is left to do. Also where the consumer cannot be
    reached or is gone, which the next Prefill for it reports."""

    consumer: str
    consumer_address: str  # as in Meet


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    rank: int  # 1 is the most likely


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, from the raw logits, and the alternatives asked for."""

    token_id: int
    logprob: float
    rank: int
    top: list[TopLogprob] = []


class Output(msgspec.Struct, kw_only=True, omit_defaults=True):
    """New tokens of one request, in order. `finish_reason` closes it on this instance."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # which id ended it, for reason "stop"
    num_cached_tokens: int | None = None  # with the first token
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token; [0] is None
    events: list[Event] = []


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One request failed on this instance and holds nothing here any more."""

    request_id: str
    status: int  # the HTTP status it deserves
    code: str
    message: str
    events: list[Event] = []


class StepResult(msgspec.Struct, kw_only=True, omit_defaults=True, tag="step"):
    """One message a step: everything that became known in it."""

    t_ns: int  # when the step's tokens were sampled
    outputs: list[Output] = []
    failures: list[Failure] = []
    stats: WorkerStats | None = None  # at most every 100 ms, and when the worker goes idle


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    nonce: int
    stats: WorkerStats


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The worker is about to exit; `message` names the cause and the fix in one line."""

    message: str


FromWorker = Ready | Met | StepResult | Pong | Fatal


# ---- P/D peers


class PeerIntro(msgspec.Struct, frozen=True, tag="peer_intro"):
    """First message on a peer socket, from the producer that connected."""

    instance: str


class PeerHello(msgspec.Struct, frozen=True, kw_only=True, tag="peer_hello"):
    """The consumer's answer to PeerIntro; file descriptors travel with it."""

    instance: str
    layout: KVLayout
    transport: str
    descriptor: bytes  # what the transport's producer side needs to reach the consumer's pages


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag="reserve"):
    """The consumer promises `blocks` for prompt blocks `first_block ..` of the request."""

    request_id: str
    first_block: int  # earlier blocks are in the consumer's prefix cache already
    blocks: list[int]


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    """All pages are sent; the request is the consumer's now."""

    request_id: str
    first_token: int
    num_tokens: int  # prompt tokens whose KV was handed over (cached ones included)
    checksum: int
    num_bytes: int
    num_pieces: int
    start_ns: int  # first piece sent
    busy_ns: int  # inside copies or socket calls


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The sender gave the request up. The receiver stops, frees, and answers Closed."""

    request_id: str
    reason: str = ""


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """Answer to Cancel: no further store or send of this request will happen from this side."""

    request_id: str


PeerMessage = PeerIntro | PeerHello | Reserve | Commit | Cancel | Closed
