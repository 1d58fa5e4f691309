"""First calls are slow (allocators, packed weights, kernel builds): make them before Ready."""

from __future__ import annotations

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.engine.step import Runner

_DECODE_STEPS = 4
_LENGTHS = (1, 17, 130, 600)


def warm_up(
    runner: Runner,
    config: SchedulerConfig,
    *,
    num_blocks: int,
    vocab_size: int,
    max_model_len: int,
    long_prompts: bool = False,
) -> None:
    """Prefill prompts of several lengths and decode a few tokens, on a scheduler of its own.

    `long_prompts`: one longer than a step, too (cheap on a GPU, seconds on a CPU).
    """
    scheduler = Scheduler(config, BlockManager(num_blocks, enable_prefix_caching=False))
    budget = config.max_num_batched_tokens
    # The last one is prefilled in two chunks.
    wanted = (*_LENGTHS, budget + 100) if long_prompts else _LENGTHS
    longest = min(max_model_len, num_blocks * config.block_size) - _DECODE_STEPS
    lengths = [n for n in wanted if n <= longest]
    for sampled in (False, True):
        for i, length in enumerate(lengths):
            params = SamplingParams(
                max_tokens=_DECODE_STEPS,
                seed=0,
                temperature=float(sampled),
                ignore_eos=True,
            )
            source = EngineRequest(
                request_id=f"warm-up-{sampled}-{i}",
                prompt_token_ids=[token % vocab_size for token in range(length)],
                params=params,
                arrived_ns=0,
            )
            scheduler.add(Request(source))
        while scheduler.has_work:
            plan = scheduler.schedule()
            scheduler.update(plan, runner.launch(plan, None, None).result().token_ids)
