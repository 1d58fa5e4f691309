"""The asynchronous runner: packs and queues steps on a CUDA device, reads their tokens later.

A step costs the host one packing, one upload and one graph replay. Sampled tokens stay on the
device, where the next step takes them, and are copied to pinned memory behind the step; an event
tells when they are there. What the host must choose itself (penalties, biases, barred ids,
log-probabilities) is chosen in `launch`, which waits for the device then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pdrelay.core.messages import TokenLogprobs
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.engine.accelerator import Accelerator, DeviceEvent
from pdrelay.engine.batch import wants_prompt_logprobs
from pdrelay.engine.runner import output_index, sample_on_host, sampling_row
from pdrelay.engine.sampler import is_host_choice
from pdrelay.engine.step import DoneStep, LayerHook, RemoteSlots, StepHandle, StepTokens
from pdrelay.engine.step_executor import StepExecutor, StepLimits
from pdrelay.engine.step_input import StepMessage
from pdrelay.engine.step_packer import Sampling, StepPacker

_DEPTH = 2


@dataclass(frozen=True)
class _Staging:
    """Pinned memory of one step in flight."""

    words: torch.Tensor  # what is uploaded
    sampled: torch.Tensor  # what comes back


def _stagings(accelerator: Accelerator, limits: StepLimits) -> deque[_Staging]:
    """One more than steps may be in flight."""
    return deque(
        _Staging(
            accelerator.pinned(limits.max_words),
            accelerator.pinned(limits.max_num_seqs),
        )
        for _ in range(_DEPTH + 1)
    )


class CudaFollower:
    """Rank 1..'s part: runs what rank 0 sends, in order. It samples as rank 0 does, from the same
    bits, so that pending tokens are known here too; what rank 0's host chooses comes with the next
    step."""

    def __init__(
        self, executor: StepExecutor, accelerator: Accelerator, limits: StepLimits
    ) -> None:
        self._executor = executor
        self.check: Callable[[], None] = _nothing  # as the runner's
        self._stagings = [(s, accelerator.event()) for s in _stagings(accelerator, limits)]

    def run(self, message: StepMessage) -> None:
        staging, uploaded = self._stagings.pop(0)
        uploaded.synchronize()
        self.check()
        words = np.frombuffer(message.words, dtype=np.int64)
        staging.words.numpy()[: len(words)] = words
        self._executor.run(message.header, staging.words)
        uploaded.record()
        self._stagings.append((staging, uploaded))


class CudaRunner:
    """Rank 0's runner on a device. At most `depth` steps may be unread."""

    depth = _DEPTH

    def __init__(
        self, executor: StepExecutor, accelerator: Accelerator, limits: StepLimits
    ) -> None:
        self._executor = executor
        self._accelerator = accelerator
        # Hands each step to the other ranks, which run it with a `CudaFollower`.
        self.broadcast: Callable[[StepMessage], None] | None = None
        # Raises when a step that is over went wrong on the device: before its tokens are used.
        self.check: Callable[[], None] = _nothing
        self._packer = StepPacker(
            block_size=limits.block_size,
            max_num_seqs=limits.max_num_seqs,
            first_host_token=limits.first_host_token,
            table_width=limits.table_width,
            bucket_of=executor.bucket_of,
            prefill_bucket_of=executor.prefill_graphs.bucket_of,
        )
        self._free = _stagings(accelerator, limits)
        # Where the last step's sampled tokens are: a row on the device, or known to the host.
        self._sampled_rows: dict[str, int] = {}
        self._known_tokens: dict[str, int] = {}

    def fileno(self) -> int | None:
        return self._accelerator.fileno()

    def drain_news(self) -> None:
        self._accelerator.drain_news()

    @property
    def has_idle_work(self) -> bool:
        return self._executor.prefill_graphs.due

    @torch.inference_mode()
    def do_idle_work(self) -> None:
        self._executor.prefill_graphs.capture_next()

    def pool_opened(self, pool: Any) -> None:
        """Steps may store into this pool of a peer from now on: `RemoteSlots.tensor`."""
        if self.broadcast is None:  # capturing would be a step that the other ranks have to join
            self._executor.prefill_graphs.open_pool(pool)

    def pool_closed(self, pool: Any) -> None:
        """They will not any more. Call it before the mapping is closed."""
        self._executor.prefill_graphs.close_pool(pool)

    @torch.inference_mode()
    def launch(
        self, plan: StepPlan, after_layer: LayerHook | None, remote: RemoteSlots | None
    ) -> StepHandle:
        staging = self._free.popleft()
        sampling_chunks = [chunk for chunk in plan.chunks if chunk.samples]
        on_host = _host_chooses(plan.chunks)
        rows = []
        if not on_host and not all(chunk.request.params.greedy for chunk in sampling_chunks):
            rows = [sampling_row(chunk) for chunk in sampling_chunks]
        header = self._packer.pack(
            plan,
            Sampling(rows, on_host=on_host),
            self._sampled_rows,
            self._known_tokens,
            remote,
            staging.words.numpy(),
        )
        if self.broadcast is not None:
            used = staging.words[: header.words().end]
            self.broadcast(StepMessage(header, used.numpy().tobytes()))
        remote_pool = None if remote is None else remote.tensor
        logits = self._executor.run(header, staging.words, after_layer, remote_pool)
        self._sampled_rows, self._known_tokens = {}, {}
        request_ids = [chunk.request.request_id for chunk in sampling_chunks]
        if on_host and logits is not None:
            tokens = sample_on_host(plan, logits.float())
            self.check()
            self._known_tokens = dict(zip(request_ids, tokens.token_ids, strict=True))
            self._free.append(staging)  # the upload is over: the logits were read
            return DoneStep(tokens)
        self._sampled_rows = {request_id: i for i, request_id in enumerate(request_ids)}
        count = len(request_ids)
        if count:
            staging.sampled[:count].copy_(self._executor.sampled[:count], non_blocking=True)
        # An event of its own: the watching thread may still hold an earlier step's.
        event = self._accelerator.event()
        event.record()
        self._accelerator.watch(event)
        return _CudaStep(staging, event, count, self._free, self.check)


class _CudaStep:
    """A step on the device."""

    def __init__(
        self,
        staging: _Staging,
        event: DeviceEvent,
        num_sampled: int,
        free: deque[_Staging],
        check: Callable[[], None],
    ) -> None:
        """`event`: behind the step's copies in both directions."""
        self._staging = staging
        self._event = event
        self._num_sampled = num_sampled
        self._free = free
        self._check = check

    def done(self) -> bool:
        return self._event.query()

    def result(self) -> StepTokens:
        self._event.synchronize()
        self._check()
        token_ids: list[int] = self._staging.sampled[: self._num_sampled].tolist()
        self._free.append(self._staging)
        logprobs: list[TokenLogprobs | None] = [None] * self._num_sampled
        return StepTokens(token_ids, logprobs, {})


def _nothing() -> None:
    """No peers: nothing can have gone wrong."""


def _host_chooses(chunks: Sequence[Chunk]) -> bool:
    return any(
        wants_prompt_logprobs(chunk)
        or (chunk.samples and is_host_choice(chunk.request.params, output_index(chunk)))
        for chunk in chunks
    )
