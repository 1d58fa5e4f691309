"""How late the host sees that a step is over: woken by the driver, or asking.

    python benchmarks/gpu_read_delay.py [--model llama-3.1-8b] [--steps 400]
    python benchmarks/gpu_read_delay.py --model tiny --device cpu      (a rehearsal, no GPU)

`woken`: the thread sleeps until a blocking CUDA event wakes another, which rings its eventfd.
`asking`: it asks the event over and over. `both`: asleep until 0.3 ms before the step is due, then
asking, as the engine's loop does for decode steps (`engine/step_wait.py`). `pauses`: asks every 50
us, as the loop does where no end is foreseen.

Decode: gaps between the ends that the host saw, of steps that take the device equally long, in a
pipeline of two. Prompts: from launch to seen end, one at a time. Percentiles 1, 10, 50, 90, 99, ms.
"""

from __future__ import annotations

import argparse
import select
import time
from collections.abc import Callable

import numpy as np
import torch
from gpu_engine_step import Bench

from pdrelay.core.scheduler import StepPlan
from pdrelay.engine.step import StepHandle

AHEAD_S = 0.3e-3
PAUSE_S = 50e-6
ROUNDS = 2


class Waiter:
    def __init__(self, bench: Bench) -> None:
        self._runner = bench.runner
        fd = bench.runner.fileno()
        self._bell = [] if fd is None else [fd]

    def woken(self, step: StepHandle, due: float) -> None:
        while not step.done():
            select.select(self._bell, [], [], 1.0)
            self._runner.drain_news()

    def asking(self, step: StepHandle, due: float) -> None:
        while not step.done():
            select.select([], [], [], 0)

    def pauses(self, step: StepHandle, due: float) -> None:
        while not step.done():
            select.select([], [], [], PAUSE_S)

    def both(self, step: StepHandle, due: float) -> None:
        select.select([], [], [], max(0.0, due - AHEAD_S - time.perf_counter()))
        self.asking(step, due)

    def quiet(self) -> None:
        """Take what the bell still rings for."""
        while select.select(self._bell, [], [], 1e-3)[0]:
            self._runner.drain_news()


Wait = Callable[[StepHandle, float], None]


def gaps_of(bench: Bench, plan: StepPlan, wait: Wait, steps: int, period_s: float) -> list[float]:
    """Seconds between ends."""
    ends = []
    running = bench.runner.launch(plan, None, None)
    end = time.perf_counter()
    for _ in range(steps):
        following = bench.runner.launch(plan, None, None)
        wait(running, end + period_s)
        end = time.perf_counter()
        running.result()
        ends.append(end)
        running = following
    running.result()
    bench.synchronize()
    return list(np.diff(ends)[5:])


def durations_of(bench: Bench, plan: StepPlan, wait: Wait, steps: int) -> list[float]:
    """Seconds from launch to end."""
    durations = []
    for _ in range(steps):
        bench.synchronize()
        begun = time.perf_counter()
        step = bench.runner.launch(plan, None, None)
        wait(step, begun)
        durations.append(time.perf_counter() - begun)
        step.result()
    return durations


def percentiles(seconds: list[float]) -> str:
    return "  ".join(f"{1e3 * np.percentile(seconds, q):7.3f}" for q in (1, 10, 50, 90, 99))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.on_gpu else "CPU"
    print(f"{options.model} on {name}, torch {torch.__version__}")
    waiter = Waiter(bench)
    decode = bench.decode_plan(16 if bench.on_gpu else 2, 900)
    assert decode is not None
    period_s = float(np.median(gaps_of(bench, decode, waiter.asking, 20, 0.0)))
    prompts = {length: bench.prefill_plan(length) for length in (512, 2048)}
    print("\n                       p1      p10      p50      p90      p99")
    for _ in range(ROUNDS):
        for wait in (waiter.woken, waiter.asking, waiter.both, waiter.pauses):
            waiter.quiet()
            seconds = gaps_of(bench, decode, wait, options.steps, period_s)
            print(f"decode       {wait.__name__:<7}{percentiles(seconds)}", flush=True)
        for length, plan in prompts.items():
            for wait in (waiter.woken, waiter.asking, waiter.pauses):
                waiter.quiet()
                seconds = durations_of(bench, plan, wait, max(4, options.steps // 8))
                print(f"prompt {length:<6}{wait.__name__:<7}{percentiles(seconds)}", flush=True)
    bench.accelerator.close()


if __name__ == "__main__":
    main()
