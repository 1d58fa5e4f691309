"""One request inside an engine instance."""

from __future__ import annotations

import enum

from pdrelay.core.block_hash import extend_keys, tail_key
from pdrelay.core.messages import EngineRequest, FinishReason


class Status(enum.Enum):
    WAITING = enum.auto()  # for blocks, budget, or a place in the batch
    RUNNING = enum.auto()
    EXPECTED = enum.auto()  # consumer: waits for blocks to promise
    RESERVED = enum.auto()  # consumer: blocks promised, KV on its way
    HANDING_OVER = enum.auto()  # producer: prefill done, KV on its way
    CLOSING = enum.auto()  # consumer: given up, the producer may still store into its blocks
    FINISHED = enum.auto()


class Request:
    """Tokens, progress, and blocks. Owned by one scheduler.

    `num_computed_tokens` counts tokens whose KV is computed or being computed by a scheduled step;
    `num_in_flight` counts output tokens being sampled by steps whose results are not in yet, so
    that a step can be planned before the previous one is read (overlap scheduling).
    `num_steps_in_flight` counts planned steps that read or write its blocks and are not read yet.
    """

    def __init__(self, source: EngineRequest, *, samples_only_first: bool = False) -> None:
        self.source = source
        self.request_id = source.request_id
        self.params = source.params
        self.samples_only_first = samples_only_first  # producer: the rest is the consumer's
        self.token_ids = source.prompt_token_ids[:]
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_steps_in_flight = 0
        self.num_cached_tokens: int | None = None  # set at first admission
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_published_blocks = 0
        self.status = Status.WAITING
        self.started = False  # a first chunk was scheduled

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_in_flight - self.num_computed_tokens

    @property
    def max_output_tokens(self) -> int:
        return 1 if self.samples_only_first else self.params.max_tokens

    @property
    def exhausted(self) -> bool:
        """No further token may be scheduled, counting those in flight."""
        return self.num_output_tokens + self.num_in_flight >= self.max_output_tokens

    def extend_block_keys(self, block_size: int) -> None:
        extend_keys(self.block_keys, self.token_ids, block_size, self.source.cache_salt)

    def prompt_keys(self, block_size: int) -> list[bytes]:
        """A key for every prompt block; a partial last block gets one that nobody else has."""
        self.extend_block_keys(block_size)
        keys = self.block_keys[: self.num_prompt_tokens // block_size]
        if self.num_prompt_tokens % block_size:
            keys = [*keys, tail_key(self.request_id)]
        return keys

    def finish_reason(self) -> tuple[FinishReason | None, int | None]:
        """Whether the last token ends the request: `(reason, stop token id)`."""
        last = self.token_ids[-1]
        if (
            last in self.params.terminal_token_ids
            and self.num_output_tokens > self.params.min_tokens
        ):
            return "stop", last
        if self.num_output_tokens >= self.params.max_tokens:
            return "length", None
        return None, None
