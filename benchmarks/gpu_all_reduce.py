"""All-reduce and all-gather between two GPUs by size, in CUDA graphs: NCCL, torch's one-shot over
symmetric memory, and pdrelay's kernel with its variants.

    python benchmarks/gpu_all_reduce.py [--repeats 20] [--out all_reduce.json]

Two processes, bf16, microseconds an operation: the median over replays of a graph of dependent
operations, so the gap to the next kernel is in them. With one GPU both processes share it: results
are checked, and times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rank_processes import run_ranks

from pdrelay.engine.cuda_communicator import connect_gpus, one_shot_limit
from pdrelay.engine.ipc_collectives import IpcCollectives
from pdrelay.engine.kernels.triton.norm import add_rms_norm
from pdrelay.engine.rendezvous import exchange
from pdrelay.transport.cuda.driver import Driver

WORLD = 2
TIMEOUT_S = 60.0
KIB, MIB = 1 << 10, 1 << 20
SIZES = [8 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB]
LARGE = [32 * MIB]
GATHERS = [128 * KIB, MIB, 4 * MIB]  # each rank's part; the first is one row of 64,128 logits
VARIANTS = [(128, True), (256, True), (256, False), (512, True), (1024, True)]  # block, PDL
OPERATIONS = 20  # a graph

Operation = Callable[[torch.Tensor], object]


class Rank:
    def __init__(self, rank: int, directory: str, repeats: int) -> None:
        self.rank = rank
        self.directory = directory
        self.alone = torch.cuda.device_count() >= WORLD  # a GPU for each
        self.repeats = repeats if self.alone else 1
        self.operations = OPERATIONS if self.alone else 2
        self.device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(self.device)
        self._meetings = 0
        self.communicator = connect_gpus(
            rank=rank,
            world_size=WORLD,
            path=f"{directory}/tp",
            timeout_s=TIMEOUT_S,
            device=self.device,
        )
        self.results: dict[str, dict[int, float]] = {}
        self.notes: list[str] = []

    def meet(self) -> None:
        torch.cuda.synchronize()
        self._meetings += 1
        path = f"{self.directory}/meet.{self._meetings}"
        exchange(path, rank=self.rank, world_size=WORLD, payload=b"", timeout_s=TIMEOUT_S)

    def measure(self, name: str, size: int, operation: Operation) -> None:
        """Check it on random numbers, then time it in a graph."""
        self.check(name, size, operation)
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=self.device)
        operation(x)
        self.meet()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(self.operations):
                operation(x)
        self.meet()
        graph.replay()
        times = []
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / self.operations)
        self.meet()
        graph.reset()  # it holds on to NCCL's communicator
        self.results.setdefault(name, {})[size] = statistics.median(times)

    def check(self, name: str, size: int, operation: Operation) -> None:
        parts = []
        for rank in range(WORLD):
            generator = torch.Generator(device=self.device).manual_seed(rank)
            values = torch.randn(size // 2, generator=generator, device=self.device)
            parts.append(values.to(torch.bfloat16))
        x = parts[self.rank].clone()
        result = operation(x)
        if "gather" in name:
            got, wanted = result, torch.stack(parts)
        else:
            got = result if isinstance(result, torch.Tensor) else x
            wanted = (parts[0].float() + parts[1].float()).to(torch.bfloat16)
        assert torch.equal(got.view(-1), wanted.view(-1)), f"{name} is wrong at {size} bytes"

    # ---- who is measured

    def kernels(self) -> Iterator[tuple[str, IpcCollectives]]:
        for block, pdl in VARIANTS if self.alone else VARIANTS[1:3]:
            name = f"ours, {block}{' pdl' if pdl else ''}"
            kernel = IpcCollectives(
                rank=self.rank,
                world_size=WORLD,
                socket_path=f"{self.directory}/{block}.{int(pdl)}",
                timeout_s=TIMEOUT_S,
                max_bytes=SIZES[-1],
                device=self.device,
                driver=Driver(),
                block=block,
                pdl=pdl,
            )
            yield name, kernel
            self.meet()
            kernel.check()
            kernel.close()

    def ours(self) -> None:
        for name, kernel in self.kernels():
            for size in SIZES:
                self.measure(name, size, kernel.all_reduce_)
            for size in GATHERS:
                self.measure(f"gather: {name}", size, kernel.all_gather)

    def nccl(self) -> None:
        nccl = self.communicator._large
        if nccl is None:
            self.notes.append("NCCL refuses two ranks on one GPU")
            return
        for size in SIZES + LARGE:
            self.measure("NCCL", size, nccl.all_reduce_)
        for size in GATHERS:
            self.measure("gather: NCCL", size, nccl.all_gather)

    def as_served(self) -> None:
        """Kernel or NCCL by size."""
        for size in SIZES + LARGE:
            self.measure("pdrelay", size, self.communicator.all_reduce_)

    def norms(self) -> None:
        """With the residual added and normed: one kernel or two, rows of 4,096 numbers."""
        communicator, width = self.communicator, 4096
        weight = torch.ones(width, dtype=torch.bfloat16, device=self.device)

        def fused(x: torch.Tensor) -> None:
            rows = x.view(-1, width)
            assert communicator.all_reduce_add_rms_norm(rows, rows, weight, 1e-5) is not None

        def apart(x: torch.Tensor) -> None:
            rows = x.view(-1, width)
            add_rms_norm(communicator.all_reduce_(rows), rows, weight, 1e-5, pdl=True)

        for name, operation in (("norm fused", fused), ("norm apart", apart)):
            for num_rows in (2, 8, 16, 32, 64):
                self._time_only(name, 2 * width * num_rows, operation)

    def symmetric_memory(self) -> None:
        """Checked with a copy into symmetric memory, timed without: its best case."""
        if not self.alone:
            return
        import torch.distributed as dist
        from torch.distributed import _symmetric_memory as symmetric

        store = dist.FileStore(f"{self.directory}/symm", WORLD)
        dist.init_process_group("nccl", store=store, rank=self.rank, world_size=WORLD)
        group = dist.group.WORLD.group_name
        shared = symmetric.empty(SIZES[-1] // 2, dtype=torch.bfloat16, device=self.device)
        symmetric.rendezvous(shared, group)
        names = {"one-shot": "one_shot_all_reduce", "two-shot": "two_shot_all_reduce_"}
        for name, operation in names.items():
            function = getattr(torch.ops.symm_mem, operation)
            for size in SIZES:
                run = functools.partial(_shared, shared[: size // 2], function, group)
                self.check(name, size, run)
                inside = functools.partial(_in_place, shared[: size // 2], function, group)
                self._time_only(f"symm_mem {name}", size, inside)
        dist.destroy_process_group()

    def _time_only(self, name: str, size: int, operation: Operation) -> None:
        checked, self.check = self.check, lambda *_: None
        try:
            self.measure(name, size, operation)
        finally:
            self.check = checked


def _shared(shared: torch.Tensor, function: Callable, group: str, x: torch.Tensor) -> torch.Tensor:
    shared.copy_(x)
    return function(shared, "sum", group)


def _in_place(shared: torch.Tensor, function: Callable, group: str, _: torch.Tensor) -> None:
    function(shared, "sum", group)


def rank_main(options: argparse.Namespace) -> None:
    rank = Rank(options.rank, options.directory, options.repeats)
    rank.ours()
    rank.nccl()
    rank.as_served()
    rank.norms()
    rank.communicator.barrier()
    try:
        rank.symmetric_memory()
    except (RuntimeError, AttributeError, ImportError, AssertionError) as error:
        rank.notes.append(f"no symm_mem: {str(error).splitlines()[0] if str(error) else error!r}")
    answer = {
        "gpu": torch.cuda.get_device_name(),
        "alone": rank.alone,
        "times_us": rank.results,
        "notes": rank.notes,
    }
    Path(options.directory, f"rank{options.rank}.json").write_text(json.dumps(answer))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # NCCL's and torch's own endings may wait for a peer that is gone already


def show(answer: dict) -> None:
    if not answer["alone"]:
        print("one GPU for two ranks: results are right, TIMES MEAN NOTHING")
    times = answer["times_us"]
    for title, gather in (("all-reduce, us", False), ("all-gather, us (a rank's part)", True)):
        rows = {name: row for name, row in times.items() if name.startswith("gather") == gather}
        sizes = sorted({int(size) for row in rows.values() for size in row})
        print(f"\n{title:<32}" + "".join(f"{_size(size):>9}" for size in sizes))
        for name, row in rows.items():
            cells = (row.get(str(size)) for size in sizes)
            shown = "".join(f"{'-' if cell is None else format(cell, '.1f'):>9}" for cell in cells)
            print(f"{name.removeprefix('gather: '):<32}{shown}")
    for note in answer["notes"]:
        print(note)
    print(f"pdrelay takes its kernel up to {_size(one_shot_limit(WORLD))}, then NCCL")


def _size(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes // KIB} KiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="give up after these")
    parser.add_argument("--out", type=Path, help="the figures as JSON, too")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options)
    if not torch.cuda.is_available():
        sys.exit("needs a GPU, better two")
    with tempfile.TemporaryDirectory(prefix="pdrelay-ar-") as directory:
        command = [sys.executable, *sys.argv, "--directory", directory]
        answer = run_ranks(command, directory, world_size=WORLD, seconds=options.seconds)
    print(f"{answer['gpu']}, torch {torch.__version__}, {WORLD} ranks")
    show(answer)
    if options.out is not None:
        options.out.write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
