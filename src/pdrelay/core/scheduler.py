"""Continuous batching with a token budget: which tokens of which requests run in the next step.

The scheduler is a deterministic function of the calls made to it. It owns the block manager and
every request of its instance, in each role:

    both      add -> (steps) -> finished
    prefill   add(samples_only_first) -> (steps) -> handing over -> release
    decode    expect -> (reserve) -> commit -> (steps) -> finished

`schedule` moves progress forward at once, `update` brings the sampled tokens: a caller may plan
step N+1 before the tokens of step N are in. `reserve` promises blocks between steps, so that a
producer need not wait for the next one. Preemption is by recomputation, latest first, as in
vLLM (Kwon et al., 2023, section 4.5).

A block goes back to the pool only when no planned step that touches it is unread: a finished
request lingers until its last step was updated, and a request with a step in flight is no victim
of preemption. So blocks may be promised to a producer, filled from a store or read by a transport
at once; nothing relies on the order of one device's stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdrelay.core.block_manager import BlockCounts, BlockManager
from pdrelay.core.messages import FinishReason
from pdrelay.core.request import Request, Status


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int


@dataclass(frozen=True)
class Chunk:
    """Tokens `start .. start + length` of a request run in this step."""

    request: Request
    start: int
    length: int
    samples: bool  # the last token's logits choose the next token
    token_pending: bool  # the input token is being sampled by a step still in flight

    @property
    def is_decode(self) -> bool:
        return self.length == 1 and self.start >= self.request.num_prompt_tokens


@dataclass(frozen=True)
class Reservation:
    """The consumer promises `blocks` for prompt blocks `first_block ..`."""

    request: Request
    first_block: int
    blocks: list[int]


@dataclass
class StepPlan:
    """Chunks in batch order: decodes first, then prefill chunks."""

    chunks: list[Chunk] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)  # scheduled for the first time
    preempted: list[Request] = field(default_factory=list)
    blocked: bool = False  # blocks are short until a step in flight is updated


@dataclass(frozen=True)
class NewToken:
    request: Request
    index: int  # into the step's sampled tokens
    token_id: int
    finish_reason: FinishReason | None
    stop_token_id: int | None


class ExternalPrefix(Protocol):
    """Pages that some store outside the pool holds by key."""

    def match(self, keys: Sequence[bytes]) -> int: ...

    def load(self, keys: Sequence[bytes], dst_blocks: Sequence[int]) -> int: ...


class Scheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        external_prefix: ExternalPrefix | None = None,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.expected: deque[Request] = deque()
        self.lingering: list[Request] = []  # finished, their blocks are in use by steps in flight
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens looked up
        self.prefix_hits = 0  # tokens found
        self._external_prefix = external_prefix

    # ---- requests in and out

    def add(self, request: Request) -> None:
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def expect(self, request: Request) -> None:
        """Consumer: promise blocks to `request` as soon as there are enough, first come first."""
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        request.status = Status.EXPECTED
        self.expected.append(request)

    def commit(self, request: Request, first_token: int) -> None:
        """Consumer: the prompt's KV is in the reserved blocks; go on from `first_token`. Nobody
        else may use it before `verified` is called, or a step of the request is read (`update`)."""
        assert request.status is Status.RESERVED
        self.blocks.end_transfer(request.block_table)
        request.num_computed_tokens = request.num_prompt_tokens
        request.token_ids.append(first_token)
        request.status = Status.WAITING
        self.waiting.append(request)

    def verified(self, request: Request) -> None:
        """Consumer: the prompt's KV that was committed is right, and the request has it still."""
        self._publish(request, request.num_prompt_tokens)

    def begin_closing(self, request: Request) -> None:
        """Consumer: give up a reserved request whose producer may still store into its blocks."""
        assert request.status is Status.RESERVED
        request.status = Status.CLOSING

    def finish(self, request: Request) -> None:
        """Forget the request, whatever its state; its blocks go back once no step uses them."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.EXPECTED:
            self.expected.remove(request)
        else:  # RESERVED, CLOSING, HANDING_OVER
            self.blocks.end_transfer(request.block_table)
        request.status = Status.FINISHED
        del self.requests[request.request_id]
        if request.num_steps_in_flight:
            self.lingering.append(request)
        else:
            self._free(request)

    def begin_hand_over(self, request: Request) -> None:
        """Producer: prefill is done; hold the blocks until the transfer is over (`finish`)."""
        assert request.status is Status.RUNNING
        self.running.remove(request)
        self.blocks.begin_transfer(request.block_table)
        request.status = Status.HANDING_OVER

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may plan something."""
        return bool(self.waiting or self.running or self.expected)

    @property
    def idle(self) -> bool:
        return not self.requests and not self.lingering

    def counts(self) -> BlockCounts:
        return self.blocks.counts()

    def check_integrity(self) -> None:
        """Assert the block invariants against all live requests."""
        holders = [*self.requests.values(), *self.lingering]
        self.blocks.check_integrity(r.block_table for r in holders)
        assert all(r.num_steps_in_flight for r in self.lingering)
        queued = [*self.waiting, *self.running, *self.expected]
        assert len(queued) == len({id(r) for r in queued})
        assert all(r.status is Status.WAITING for r in self.waiting)
        assert all(r.status is Status.RUNNING for r in self.running)
        assert all(r.status is Status.EXPECTED for r in self.expected)

    # ---- one step

    def schedule(self) -> StepPlan:
        plan = StepPlan(reservations=self.reserve())
        budget = self._schedule_running(plan, self.config.max_num_batched_tokens)
        if not plan.preempted and not plan.blocked:
            self._schedule_waiting(plan, budget)
        plan.chunks.sort(key=lambda chunk: not chunk.is_decode)
        return plan

    def hash_ahead(self, requests: Iterable[Request]) -> None:
        """Hash the prompts that `update` or `commit` will publish: free while a device computes
        them, here or at the producer."""
        for request in requests:
            request.extend_block_keys(self.config.block_size)

    def update(self, plan: StepPlan, sampled: Sequence[int]) -> list[NewToken]:
        """Take the tokens sampled for the plan's sampling chunks, in their order.

        Finished requests are forgotten and their blocks given back, except a producer's request
        that goes on elsewhere: that one stays RUNNING for `begin_hand_over`.
        """
        tokens: list[NewToken] = []
        position = 0
        for chunk in plan.chunks:
            request = chunk.request
            request.num_steps_in_flight -= 1
            token_id = -1
            if chunk.samples:
                token_id = sampled[position]
                position += 1
                request.num_in_flight -= 1
            if request.status is Status.FINISHED:
                self._stop_lingering(request)
                continue  # aborted, or finished by the previous step, while this one ran
            if chunk.samples:
                request.token_ids.append(token_id)
            if request.status is Status.RUNNING:
                self._publish(request, chunk.start + chunk.length)
            if chunk.samples:
                reason, stop_token_id = request.finish_reason()
                tokens.append(NewToken(request, position - 1, token_id, reason, stop_token_id))
                if reason is not None:
                    self.finish(request)
        assert position == len(sampled)
        return tokens

    def _stop_lingering(self, request: Request) -> None:
        if request.num_steps_in_flight == 0:
            self.lingering.remove(request)
            self._free(request)

    def reserve(self) -> list[Reservation]:
        """Consumer: promise blocks to expected requests, first come first, while there are enough.

        At any time, also while steps are in flight: what is free is touched by none of them.
        """
        reservations: list[Reservation] = []
        while self.expected:
            reservation = self._reserve(self.expected[0])
            if reservation is None:
                break
            self.expected.popleft()
            reservations.append(reservation)
        return reservations

    def _reserve(self, request: Request) -> Reservation | None:
        keys = request.prompt_keys(self.config.block_size)
        cached = self.blocks.match(keys)
        # Room for the first decoded token too, so that it is not preempted on arrival.
        needed = self._blocks_for(request.num_prompt_tokens + 1) - len(cached)
        self.blocks.acquire(cached)
        # A block for each running request stays back: promises must not preempt decodes.
        if needed + len(self.running) > self.blocks.num_available:
            self.blocks.release(cached)
            return None
        fresh = self.blocks.allocate(needed)
        assert fresh is not None
        request.block_table = cached + fresh
        request.num_published_blocks = len(cached)
        request.status = Status.RESERVED
        self.blocks.begin_transfer(request.block_table)
        return Reservation(request, len(cached), request.block_table[len(cached) : len(keys)])

    def _schedule_running(self, plan: StepPlan, budget: int) -> int:
        for request in list(self.running):
            if budget == 0:
                break
            if request.status is not Status.RUNNING or request.exhausted:
                continue
            length = min(request.num_uncomputed_tokens, budget)
            if length == 0:
                continue
            if not self._grow_or_preempt(request, length, plan):
                if plan.blocked:
                    break
                continue
            self._plan_chunk(plan, request, length)
            budget -= length
        if plan.preempted:
            kept = [c for c in plan.chunks if c.request.status is Status.RUNNING]
            assert len(kept) == len(plan.chunks), "a planned request was preempted"
        return budget

    def _grow_or_preempt(self, request: Request, length: int, plan: StepPlan) -> bool:
        """Give `request` blocks for `length` more tokens, taking them from the latest others."""
        while not self._grow(request, request.num_computed_tokens + length):
            victim = self.running[-1]
            if any(chunk.request is victim for chunk in plan.chunks):
                return False  # everyone behind is preempted already; wait for a finished request
            if self.lingering or victim.num_steps_in_flight:
                plan.blocked = True
                return False
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, plan: StepPlan, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            if request.num_in_flight:
                return  # preempted while a token of it is being sampled: its ids are not known yet
            if not request.block_table:
                self._take_cached_prefix(request)
            length = min(request.num_uncomputed_tokens, budget)
            if not self._grow(request, request.num_computed_tokens + length):
                if not self.running and not self.lingering and self._free_last_waiting(request):
                    continue
                if request.num_computed_tokens < request.num_prompt_tokens:
                    self._free(request)
                return
            self.waiting.popleft()
            request.status = Status.RUNNING
            self.running.append(request)
            if not request.started:
                request.started = True
                plan.admitted.append(request)
            self._plan_chunk(plan, request, length)
            budget -= length

    def _free_last_waiting(self, first: Request) -> bool:
        """Nothing runs and `first` does not fit: take the blocks of the latest that waits.

        On a consumer, handed-over requests wait with their KV; the latest is recomputed.
        """
        for other in reversed(self.waiting):
            if other is not first and other.block_table:
                self._free(other)
                return True
        return False

    def _plan_chunk(self, plan: StepPlan, request: Request, length: int) -> None:
        start = request.num_computed_tokens
        total = len(request.token_ids) + request.num_in_flight
        samples = start + length == total
        pending = start + length > len(request.token_ids)
        assert not pending or length == 1
        plan.chunks.append(Chunk(request, start, length, samples, pending))
        request.num_computed_tokens += length
        request.num_in_flight += samples
        request.num_steps_in_flight += 1

    # ---- blocks

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        missing = self._blocks_for(num_tokens) - len(request.block_table)
        if missing <= 0:
            return True
        fresh = self.blocks.allocate(missing)
        if fresh is None:
            return False
        request.block_table.extend(fresh)
        return True

    def _take_cached_prefix(self, request: Request) -> None:
        """Start behind the longest known prefix; at least the last token is always computed."""
        assert request.num_computed_tokens == 0
        if request.params.prompt_logprobs is not None and request.num_output_tokens == 0:
            request.num_cached_tokens = 0
            return
        keys = request.prefix_keys(self.config.block_size)
        cached = self.blocks.match(keys)
        self.blocks.acquire(cached)
        request.block_table = cached + self._load_external(keys, len(cached))
        request.num_published_blocks = len(cached)
        request.num_computed_tokens = len(request.block_table) * self.config.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.prefix_queries += len(request.token_ids)
            self.prefix_hits += request.num_computed_tokens

    def _load_external(self, all_keys: Sequence[bytes], num_cached: int) -> list[int]:
        if self._external_prefix is None or num_cached == len(all_keys):
            return []
        keys = all_keys[num_cached:]
        count = min(self._external_prefix.match(keys), self.blocks.num_available)
        blocks = self.blocks.allocate(count) or []
        loaded = self._external_prefix.load(keys[:count], blocks) if blocks else 0
        self.blocks.release(blocks[loaded:])
        return blocks[:loaded]

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        self.running.remove(request)
        self._free(request)
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        plan.preempted.append(request)

    def _free(self, request: Request) -> None:
        self.blocks.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = 0
        request.num_published_blocks = 0

    def _publish(self, request: Request, num_tokens: int) -> None:
        """Put the blocks that are full of the first `num_tokens` under their keys: those whose
        steps have been read, so that nothing writes them any more."""
        assert num_tokens <= min(request.num_computed_tokens, len(request.token_ids))
        full = num_tokens // self.config.block_size
        if full <= request.num_published_blocks:
            return
        request.extend_block_keys(self.config.block_size)
        for i in range(request.num_published_blocks, full):
            self.blocks.set_key(request.block_table[i], request.block_keys[i])
        request.num_published_blocks = full
