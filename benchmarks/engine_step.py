"""Time of one engine step: decode by batch and context, prefill by prompt length.

    OMP_NUM_THREADS=1 python benchmarks/engine_step.py [--model tiny] [--torch] [--repeats N]

Prints the fastest and the median of the repeats: model forward, logits and greedy choice, without
scheduler and messages. Prefill runs in chunks of --max-num-batched-tokens, as the engine does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pdrelay.core.sampling_params import SamplingParams
from pdrelay.engine import kernels
from pdrelay.engine.attention import DecodeSegment, ForwardContext, PrefillSegment
from pdrelay.engine.models import CausalLM, build_model
from pdrelay.engine.sampler import SamplingRow, sample
from pdrelay.model.config import kv_layout, load_model_config

GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
Step = Callable[[], object]


def decode_step(model: CausalLM, pool: torch.Tensor, batch: int, context_len: int) -> Step:
    """One token for each of `batch` requests that have `context_len` tokens."""
    block_size = pool.shape[3]
    width = -(-context_len // block_size)
    pages = torch.randperm(pool.shape[1])[: batch * width]
    tables = pages.to(torch.int32).view(batch, width).contiguous()
    position = context_len - 1
    context = ForwardContext(
        kv_pool=pool,
        slot_mapping=tables[:, position // block_size].long() * block_size + position % block_size,
        decode=DecodeSegment(0, tables, torch.full((batch,), context_len, dtype=torch.int32)),
    )
    token_ids = torch.arange(batch)
    positions = torch.full((batch,), position)
    rows = [SamplingRow(GREEDY, [], [], 0)] * batch
    return lambda: sample(model.logits(model.forward(token_ids, positions, context)), rows)


def prefill_steps(model: CausalLM, pool: torch.Tensor, length: int, budget: int) -> Step:
    """A prompt of `length` tokens in chunks of `budget`, and its first token."""
    block_size = pool.shape[3]
    table = torch.randperm(pool.shape[1])[: -(-length // block_size)].tolist()
    slots = (torch.tensor(table)[:, None] * block_size + torch.arange(block_size)).flatten()
    token_ids = torch.randint(0, 256, (length,))

    def run() -> None:
        for start in range(0, length, budget):
            positions = torch.arange(start, min(start + budget, length))
            segment = PrefillSegment(0, len(positions), start, table)
            context = ForwardContext(pool, slots[positions], [segment])
            hidden = model.forward(token_ids[positions], positions, context)
        sample(model.logits(hidden[-1:]), [SamplingRow(GREEDY, [], [], 0)])

    return run


def milliseconds(step: Step, repeats: int) -> str:
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return f"min {min(times):9.3f} ms   median {statistics.median(times):9.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--torch", action="store_true", help="torch operations, no C kernels")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_model_config(options.model)
    model = build_model(options.model, config, load_format="dummy", use_kernels=not options.torch)
    layout = kv_layout(config, options.block_size, 16_384 // options.block_size, "float32")
    pool = torch.zeros(layout.shape)
    print(
        f"{options.model}: kernels {'torch' if options.torch else kernels.describe()}, one thread"
    )
    with torch.inference_mode():
        for batch, context_len in ((1, 128), (1, 512), (1, 2048), (1, 8192), (8, 512), (16, 512)):
            step = decode_step(model, pool, batch, context_len)
            print(f"decode  B={batch:<3} ctx={context_len:<5}", milliseconds(step, options.repeats))
        for length in (128, 512, 2048, 8192):
            step = prefill_steps(model, pool, length, options.max_num_batched_tokens)
            repeats = max(3, min(options.repeats, options.repeats * 128 // length))
            print(f"prefill T={length:<10}   ", milliseconds(step, repeats))


if __name__ == "__main__":
    main()
