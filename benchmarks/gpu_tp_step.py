"""Time of one step of the CUDA engine with tensor parallelism over two GPUs.

    python benchmarks/gpu_tp_step.py [--model llama-3.1-8b]

Two processes that run the same plans; milliseconds of rank 0. Decode: `graph` is the device's time
of a step (events around many replays), `step` the wall time in a pipeline of two, as the loop runs
it; with norms fused into the all-reduce and apart. Prefill: wall time of one prompt from plan to
token. With one GPU both processes share it, and times mean nothing: pass --model tiny then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rank_processes import run_ranks

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.cuda_communicator import connect_gpus
from pdrelay.engine.cuda_engine import build_engine, prepare_backend
from pdrelay.engine.models import build_model
from pdrelay.engine.rendezvous import exchange
from pdrelay.engine.startup_clock import StartupClock
from pdrelay.engine.step_executor import StepLimits
from pdrelay.model.config import kv_layout, load_model_config

WORLD = 2
TIMEOUT_S = 120.0
BLOCK_SIZE = 64
GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0, ignore_eos=True)
BATCHES = (1, 2, 8, 32, 64)
CONTEXT = 512
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


class Rank:
    def __init__(self, options: argparse.Namespace) -> None:
        self.rank, self.directory, self.repeats = options.rank, options.directory, options.repeats
        self.device = torch.device("cuda", options.rank % torch.cuda.device_count())
        torch.cuda.set_device(self.device)
        self._meetings = 0
        self.startup = StartupClock(monotonic_ns)
        with self.startup.phase("ranks meet"):
            self.communicator = connect_gpus(
                rank=self.rank,
                world_size=WORLD,
                path=f"{self.directory}/tp",
                timeout_s=TIMEOUT_S,
                device=self.device,
            )
        config = load_model_config(options.model)
        self.config = config
        self.limits = StepLimits(
            max_num_seqs=BATCHES[-1],
            max_num_batched_tokens=LENGTHS[-1],
            max_model_len=LENGTHS[-1] + BLOCK_SIZE,
            block_size=BLOCK_SIZE,
        )
        with self.startup.phase("weights"):
            model = build_model(
                options.model,
                config,
                load_format="dummy",
                dtype=torch.bfloat16,
                device=self.device,
                communicator=self.communicator,
            )
        prepare_backend(model, config, self.limits, WORLD)
        self.num_blocks = max(BATCHES[-1] * CONTEXT, self.limits.max_model_len) // BLOCK_SIZE + 1
        layout = kv_layout(config, BLOCK_SIZE, self.num_blocks, "bfloat16", WORLD)
        pool = torch.zeros(layout.shape, dtype=torch.bfloat16, device=self.device)
        self.engine = build_engine(model, pool, self.limits, self.startup)
        self.runner = self.engine.runner
        self.runner.check = self.communicator.check

    def meet(self) -> None:
        torch.cuda.synchronize()
        self._meetings += 1
        path = f"{self.directory}/meet.{self._meetings}"
        exchange(path, rank=self.rank, world_size=WORLD, payload=b"", timeout_s=TIMEOUT_S)

    def request(self, name: str, num_tokens: int) -> Request:
        token_ids = [(7 * i) % self.config.vocab_size for i in range(num_tokens)]
        return Request(
            EngineRequest(
                request_id=name, prompt_token_ids=pack_ids(token_ids), params=GREEDY, arrived_ns=0
            )
        )

    def decode_plan(self, batch: int) -> StepPlan:
        width, chunks = CONTEXT // BLOCK_SIZE, []
        for i in range(batch):
            request = self.request(f"d{batch}-{i}", CONTEXT - 1)
            request.token_ids.append(i)
            request.block_table = list(range(i * width, (i + 1) * width))
            chunks.append(Chunk(request, CONTEXT - 1, 1, True, False))
        return StepPlan(chunks=chunks)

    def decode(self, batch: int) -> tuple[float, float]:
        """(graph, step) ms."""
        plan = self.decode_plan(batch)
        self.runner.launch(plan, None, None).result()
        graph = self.engine.executor._graphs[batch]
        self.meet()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.repeats):
            graph.replay()
        end.record()
        end.synchronize()
        device = begin.elapsed_time(end) / self.repeats
        self.meet()
        start = time.perf_counter()
        waiting = self.runner.launch(plan, None, None)
        for _ in range(self.repeats):
            following = self.runner.launch(plan, None, None)
            waiting.result()
            waiting = following
        waiting.result()
        return device, 1e3 * (time.perf_counter() - start) / (self.repeats + 1)

    def prefill(self, length: int) -> float:
        """Wall ms, the median of five after a first."""
        request = self.request(f"p{length}", length)
        request.block_table = list(range(-(-length // BLOCK_SIZE)))
        plan = StepPlan(chunks=[Chunk(request, 0, length, True, False)])
        times = []
        for _ in range(6):
            self.meet()
            start = time.perf_counter()
            self.runner.launch(plan, None, None).result()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])

    def run(self) -> list[str]:
        lines = [f"start-up: {self.startup}", "decode, context 512     graph ms    step ms"]
        for fuses in (True, False):
            self.communicator.fuses_norms = fuses
            if not fuses:
                self.engine.executor.capture_graphs(BATCHES)
            for batch in BATCHES:
                graph, step = self.decode(batch)
                label = f"B={batch:<4} norms {'fused' if fuses else 'apart'}"
                lines.append(f"{label:<20} {graph:>11.3f} {step:>10.3f}")
        self.communicator.fuses_norms = True
        lines.append("prefill                 wall ms")
        return [*lines, *(f"T={n:<18} {self.prefill(n):>10.3f}" for n in LENGTHS)]


@torch.inference_mode()
def rank_main(options: argparse.Namespace) -> None:
    lines = Rank(options).run()
    Path(options.directory, f"rank{options.rank}.json").write_text(json.dumps(lines))
    os._exit(0)  # nothing here needs an orderly end, and NCCL's may wait for a peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=240.0, help="give up after these")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options)
    if not torch.cuda.is_available():
        sys.exit("needs a GPU, better two")
    with tempfile.TemporaryDirectory(prefix="pdrelay-tp-") as directory:
        command = [sys.executable, *sys.argv, "--directory", directory]
        lines = run_ranks(command, directory, world_size=WORLD, seconds=options.seconds)
    shared = "" if torch.cuda.device_count() >= WORLD else ", shared: TIMES MEAN NOTHING"
    print(f"{options.model}, TP={WORLD} on {torch.cuda.get_device_name()}{shared}")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
