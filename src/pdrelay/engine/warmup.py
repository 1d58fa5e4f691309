"""First calls are slow (allocators, packed weights, kernel builds): make them before Ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig, StepPlan
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.step import RemoteSlots, Runner

_DECODE_STEPS = 4
_TOGETHER = (1, 17, 130, 600)
# On a GPU the libraries load another kernel for other lengths, a millisecond each: meet them now.
_ALONE = (5, 33, 65, 130, 190, 260, 400, 520, 800, 1100, 1600, 2100, 3100, 4200, 6200)


def warm_up(
    runner: Runner,
    config: SchedulerConfig,
    *,
    num_blocks: int,
    vocab_size: int,
    max_model_len: int,
    on_gpu: bool = False,
    remote_pool: Any = None,
) -> None:
    """Prefill prompts of several lengths and decode a few tokens, on a scheduler of its own.

    `on_gpu`: more lengths, up to a prompt in two chunks, the second one short and long; cheap
    there, seconds on a CPU.
    `remote_pool`: run prompts also as steps that store into a peer's pages, this pool, but nothing.
    """
    longest = min(max_model_len, num_blocks * config.block_size) - _DECODE_STEPS
    groups: list[Sequence[int]] = [_TOGETHER]
    if on_gpu:
        rest = config.max_num_batched_tokens
        groups += [(n,) for n in (*_ALONE, rest + 100, rest + 300)]
        groups += [(n, 3) for n in _ALONE]  # not a graph: short prompts that are not alone
    runs = [(0.0, None), (1.0, None)] + [(0.0, remote_pool)] * (remote_pool is not None)
    for temperature, pool in runs:
        for lengths in groups:
            scheduler = Scheduler(config, BlockManager(num_blocks, enable_prefix_caching=False))
            for length in lengths:
                if length <= longest:
                    scheduler.add(_request(length, vocab_size, temperature))
            while scheduler.has_work:
                plan = scheduler.schedule()
                remote = None if pool is None else _nowhere(plan, pool)
                tokens = runner.launch(plan, None, remote).result()
                scheduler.update(plan, tokens.token_ids)


def _nowhere(plan: StepPlan, pool: Any) -> RemoteSlots | None:
    """Of no row, for steps with prompts, as only those store into a peer's pages."""
    if all(chunk.is_decode for chunk in plan.chunks):
        return None
    return RemoteSlots(pool, np.full(sum(chunk.length for chunk in plan.chunks), -1, np.int64))


def _request(length: int, vocab_size: int, temperature: float) -> Request:
    params = SamplingParams(
        max_tokens=_DECODE_STEPS, seed=0, temperature=temperature, ignore_eos=True
    )
    source = EngineRequest(
        request_id=f"warm-up-{length}-{temperature:g}",
        prompt_token_ids=pack_ids(token % vocab_size for token in range(length)),
        params=params,
        arrived_ns=0,
    )
    return Request(source)
