"""One request inside an engine instance."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import overload

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


class PrefixKeys(Sequence[bytes]):
    """Keys of a request's first blocks, hashed when they are asked for: a search for a cached
    prefix ends at the first key that nobody has."""

    def __init__(
        self, request: Request, block_size: int, num_full: int, *, has_tail: bool = False
    ) -> None:
        self._request = request
        self._block_size = block_size
        self._num_full = num_full
        self._has_tail = has_tail  # a partial block behind the full ones

    def __len__(self) -> int:
        return self._num_full + self._has_tail

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        request, known = self._request, self._request.block_keys
        if index == self._num_full:
            return tail_key(request.request_id)
        if index >= len(known):
            request.extend_block_keys(self._block_size, max(index + 1, 2 * len(known)))
        return known[index]


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

    def extend_block_keys(self, block_size: int, num_blocks: int | None = None) -> None:
        """Have `block_keys` of all full blocks so far, or of `num_blocks` of them at least."""
        salt = self.source.cache_salt
        extend_keys(self.block_keys, self.token_ids, block_size, salt, num_blocks)

    def prompt_keys(self, block_size: int) -> Sequence[bytes]:
        """A key for every prompt block; a partial last block gets one that nobody else has."""
        num_full, rest = divmod(self.num_prompt_tokens, block_size)
        return PrefixKeys(self, block_size, num_full, has_tail=rest > 0)

    def prefix_keys(self, block_size: int) -> Sequence[bytes]:
        """Of the full blocks before the last token."""
        return PrefixKeys(self, block_size, (len(self.token_ids) - 1) // block_size)

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
