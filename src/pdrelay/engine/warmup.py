"""First calls are slow (allocators, packed weights, kernel builds): make them before Ready."""

from __future__ import annotations

from collections.abc import Sequence

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.engine.step import Runner

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
) -> None:
    """Prefill prompts of several lengths and decode a few tokens, on a scheduler of its own.

    `on_gpu`: more lengths, up to a prompt in two chunks; cheap there, seconds on a CPU.
    """
    longest = min(max_model_len, num_blocks * config.block_size) - _DECODE_STEPS
    groups: list[Sequence[int]] = [_TOGETHER]
    if on_gpu:
        groups += [(n,) for n in (*_ALONE, config.max_num_batched_tokens + 100)]
    for temperature in (0.0, 1.0):
        for lengths in groups:
            scheduler = Scheduler(config, BlockManager(num_blocks, enable_prefix_caching=False))
            for length in lengths:
                if length <= longest:
                    scheduler.add(_request(length, vocab_size, temperature))
            while scheduler.has_work:
                plan = scheduler.schedule()
                tokens = runner.launch(plan, None, None).result()
                scheduler.update(plan, tokens.token_ids)


def _request(length: int, vocab_size: int, temperature: float) -> Request:
    params = SamplingParams(
        max_tokens=_DECODE_STEPS, seed=0, temperature=temperature, ignore_eos=True
    )
    source = EngineRequest(
        request_id=f"warm-up-{length}-{temperature:g}",
        prompt_token_ids=[token % vocab_size for token in range(length)],
        params=params,
        arrived_ns=0,
    )
    return Request(source)
