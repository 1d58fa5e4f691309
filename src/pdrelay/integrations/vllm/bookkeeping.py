"""The scheduler's half of the connector: which requests are handed over; no vLLM, no sockets.

Builds each step's StepPlan. Both books may serve one instance (kv_both).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdrelay.core.clock import Clock
from pdrelay.integrations.vllm.params import RemoteDecode, RemotePrefill
from pdrelay.integrations.vllm.step import (
    Chunk,
    Interest,
    Load,
    StepPlan,
    prompt_digest,
    prompt_digests,
)

_RENEWALS = 3  # asks in the time of one lease
_MAX_USED = 4096  # transfer ids remembered so that none is loaded twice


@dataclass(frozen=True)
class Prompt:
    """What identifies a prompt's KV. `extra`: adapter, images, cache salt."""

    token_ids: Sequence[int]
    extra: tuple[str, ...] = ()

    def digest(self) -> bytes:
        return prompt_digest(self.token_ids, self.extra)

    def digests(self) -> list[bytes]:
        return prompt_digests(self.token_ids, self.extra)


@dataclass
class Handing:
    """A request whose KV goes to a consumer."""

    transfer_id: str
    num_tokens: int
    digest: bytes
    num_preemptions: Callable[[], int]
    seen_preemptions: int
    blocks: list[int]
    prefilled: bool = False  # the step that completes the prompt is planned


class ProducerBook:
    def __init__(self) -> None:
        self._handing: dict[str, Handing] = {}
        self._held: set[str] = set()  # finished, blocks not freed yet
        self._plan = StepPlan()

    @property
    def num_held(self) -> int:
        return len(self._held)

    def tracks(self, request_id: str) -> bool:
        return request_id in self._handing

    def admit(
        self,
        request_id: str,
        params: RemoteDecode,
        prompt: Prompt,
        num_preemptions: Callable[[], int],
    ) -> None:
        """The scheduler has given the request its first blocks, or new ones; idempotent."""
        if request_id not in self._handing:
            num_tokens = len(prompt.token_ids)
            self._handing[request_id] = Handing(
                params.transfer_id,
                num_tokens,
                prompt.digest(),
                num_preemptions,
                num_preemptions(),
                [],
            )

    def scheduled(
        self, request_id: str, blocks: Sequence[int], *, anew: bool, num_computed: int
    ) -> None:
        """In this step the request is computed up to `num_computed` tokens. `blocks` are appended
        to its blocks, or (`anew`) are all of them."""
        handing = self._handing.get(request_id)
        if handing is None:
            return
        if anew:
            self._check_preempted(request_id, handing)
            handing.blocks = []
        handing.blocks.extend(blocks)
        if handing.prefilled:
            return
        num_ready = min(num_computed, handing.num_tokens)
        handing.prefilled = num_ready == handing.num_tokens
        self._plan.chunks.append(
            Chunk(
                request_id,
                handing.transfer_id,
                handing.num_tokens,
                handing.digest,
                list(handing.blocks),
                num_ready,
            )
        )

    def _check_preempted(self, request_id: str, handing: Handing) -> None:
        now = handing.num_preemptions()
        if now != handing.seen_preemptions:
            handing.seen_preemptions = now
            handing.prefilled = False
            self._plan.rewound.append(request_id)

    def finished(self, request_id: str, params: RemoteDecode, *, delivers: bool) -> bool:
        """The request has ended. True: its blocks must be kept until the worker reports it."""
        handing = self._handing.pop(request_id, None)
        if handing is None:
            reason = "the producer's request was aborted before its prefill"
            self._plan.refused[params.transfer_id] = reason
            return False
        if not delivers or not handing.prefilled:
            self._plan.dropped[request_id] = "the producer's request was aborted"
            return False
        self._plan.held.append(request_id)
        self._held.add(request_id)
        return True

    def freed(self, request_id: str) -> None:
        self._held.discard(request_id)

    def take(self) -> StepPlan:
        for request_id, handing in self._handing.items():
            self._check_preempted(request_id, handing)
        plan, self._plan = self._plan, StepPlan()
        return plan


@dataclass
class Wanted:
    """A request that waits for its KV. `renew_ns` None: it is loading, its worker renews."""

    params: RemotePrefill
    renew_ns: int | None


class ConsumerBook:
    def __init__(self, *, block_size: int, lease_s: float, clock: Clock) -> None:
        self._block_size = block_size
        self._renewal_ns = int(lease_s * 1e9 / _RENEWALS)
        self._clock = clock
        self._wanted: dict[str, Wanted] = {}
        self._loading: dict[str, str] = {}  # transfer -> request
        self._used: dict[str, None] = {}  # transfers that were loaded, or not needed
        self._cancelled: list[str] = []
        self._released: list[Interest] = []
        self._loads: list[Load] = []

    def want(self, request_id: str, params: RemotePrefill) -> None:
        """The request waits for blocks; idempotent. Its lease is renewed from the next step on."""
        if request_id not in self._wanted and params.transfer_id not in self._used:
            self._wanted[request_id] = Wanted(params, self._clock())

    def num_external_tokens(
        self, params: RemotePrefill, num_prompt_tokens: int, num_computed: int
    ) -> int | None:
        """How many prompt tokens the producer provides; None: ask again later, another request
        (of the same `n`) is loading them, and will leave them in the prefix cache."""
        if params.transfer_id in self._used:
            return 0
        if params.transfer_id in self._loading:
            return None
        return max(0, num_prompt_tokens - num_computed)

    def reserve(
        self,
        request_id: str,
        params: RemotePrefill,
        prompt: Prompt,
        blocks: Sequence[int],
        num_external: int,
    ) -> None:
        """`blocks` are the request's, from its first; the last `num_external` prompt tokens come
        from the producer. Only the first call for a transfer loads."""
        if params.transfer_id in self._loading or params.transfer_id in self._used:
            return
        if num_external <= 0:
            self._release(request_id)
            return
        num_tokens = len(prompt.token_ids)
        first = (num_tokens - num_external) // self._block_size
        stop = -(-num_tokens // self._block_size)
        assert len(blocks) >= stop
        self._loading[params.transfer_id] = request_id
        self._wanted[request_id] = Wanted(params, None)
        self._loads.append(
            Load(
                request_id,
                params.transfer_id,
                params.producer,
                first,
                list(blocks[first:stop]),
                num_tokens,
                prompt.digests(),
            )
        )

    def loaded(self, request_id: str) -> None:
        """The workers have ended the load, well or not."""
        wanted = self._wanted.pop(request_id, None)
        if wanted is not None:
            self._use(wanted.params.transfer_id)

    def finished(self, request_id: str) -> None:
        """The request has ended in any state; idempotent."""
        wanted = self._wanted.get(request_id)
        if wanted is None:
            return
        if wanted.renew_ns is None:
            self._cancelled.append(request_id)
        else:
            self._release(request_id)

    def take(self, plan: StepPlan) -> None:
        """Put the step's news into `plan`."""
        plan.cancelled, self._cancelled = self._cancelled, []
        plan.released, self._released = self._released, []
        plan.loads, self._loads = self._loads, []
        now_ns = self._clock()
        for wanted in self._wanted.values():
            if wanted.renew_ns is not None and now_ns >= wanted.renew_ns:
                wanted.renew_ns = now_ns + self._renewal_ns
                plan.waiting.append(Interest(wanted.params.transfer_id, wanted.params.producer))

    def _release(self, request_id: str) -> None:
        """The producer need not keep the KV."""
        wanted = self._wanted.pop(request_id, None)
        if wanted is not None:
            params = wanted.params
            self._use(params.transfer_id)
            self._released.append(Interest(params.transfer_id, params.producer))

    def _use(self, transfer_id: str) -> None:
        self._loading.pop(transfer_id, None)
        self._used[transfer_id] = None
        while len(self._used) > _MAX_USED:
            del self._used[next(iter(self._used))]
