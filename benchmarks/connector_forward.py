"""What a consumer's announcement costs a prefill whose forward is bound by launching kernels.

    python benchmarks/connector_forward.py [--samples 61] [--launches 8] [--lengths 128 1024]

The engine's thread computes in Python: 32 layers of 0.25 ms and 1 ms of sampling, with `--launches`
moments a layer in which it lets go of the interpreter's lock, as torch's operations do; it calls
the connector's hooks as vLLM does, over `connector_hooks.py`'s stub device, whose copies land
`--lag` ms after they were issued. A consumer in another process announces `before` the step, in its
middle (`during`), or 5 ms after its token; it is told by a byte in each case, so that all do the
same work.

`forward`: ms from the step's begin to its token, median, and what it is more than the median of
`after`, the cases taken in turn. `main`, `thread`: how often the engine's and the producer's thread
went to sleep and were woken meanwhile (voluntary context switches, means). `done`: ms from the
token (`after`: from the byte) to the consumer's news that all has arrived, median.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import select
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from connector_hooks import (
    BLOCK_SIZE,
    DEADLINE_S,
    LAYERS,
    StubDevice,
    block_ids,
    launch_kernels,
    pages_of,
)

from pdrelay.core.clock import monotonic_ns
from pdrelay.integrations.vllm.consumer import Consumer
from pdrelay.integrations.vllm.producer import Producer
from pdrelay.integrations.vllm.service import ProducerService
from pdrelay.integrations.vllm.step import Chunk, Load, StepPlan

WHENS = ("after", "before", "during")
LAYER_MS, SAMPLING_LAYERS = 0.25, 4
DIGESTS = [b"d" * 16, b"e" * 16]


class TimedCopy:
    """Lands by itself."""

    def __init__(self, lag_ns: int) -> None:
        self._end_ns = monotonic_ns() + lag_ns

    def done(self) -> bool:
        return monotonic_ns() >= self._end_ns

    def wait(self) -> None:
        time.sleep(max(0, self._end_ns - monotonic_ns()) / 1e9)

    def busy_ns(self) -> int:
        return 0


class TimedDevice(StubDevice):
    def __init__(self, lag_ns: int) -> None:
        super().__init__()
        self._lag_ns = lag_ns

    def copy(self, *_: Any) -> Any:
        return TimedCopy(self._lag_ns)

    copy_pages = copy


@dataclass(frozen=True)
class Task:
    """For the consumer: announce at the byte `announce_at`."""

    name: str
    num_tokens: int
    blocks: list[int]
    announce_at: int


@dataclass
class Sample:
    forward_ns: int
    main: int
    thread: int
    done_ns: int  # after the token


def consume(address: str, link: Connection, go: int) -> None:
    """The consumer's process."""
    consumer = Consumer(
        pages=pages_of("split"),
        instance="d",
        rank=0,
        num_ranks=1,
        clock=monotonic_ns,
        lease_s=60.0,
        load_timeout_s=60.0,
    )
    while True:
        task = link.recv()
        if task is None:
            consumer.close()
            return
        for _ in range(task.announce_at):
            os.read(go, 1)
        transfer, count = f"T-{task.name}", task.num_tokens
        load = Load(task.name, transfer, address, 0, task.blocks, count, DIGESTS)
        consumer.begin_step(StepPlan(loads=[load]))
        while not consumer.take_finished():
            (source,) = consumer._sources.values()
            assert select.select([source.channel], [], [], DEADLINE_S)[0], "no answer"
            consumer.poll()
        link.send(monotonic_ns())
        for _ in range(2 - task.announce_at):
            os.read(go, 1)


@dataclass
class Rig:
    service: ProducerService
    link: Connection
    go: int
    launches: int
    spins: int  # of each of a layer's parts
    number: int = 0

    def layer(self) -> None:
        for _ in range(max(1, self.launches)):
            spin(self.spins)
            launch_kernels(min(1, self.launches))

    def prompt(self, num_tokens: int, when: str, src: list[int], dst: list[int]) -> Sample:
        self.number += 1
        name = f"r{self.number}"
        at = {"before": 0, "during": 1, "after": 2}[when]
        self.link.send(Task(name, num_tokens, dst, at))
        time.sleep(0.01)  # idle, as between two requests
        chunk = Chunk(name, f"T-{name}", num_tokens, DIGESTS[0], src, num_tokens)
        service, main = self.service, threading.get_native_id()
        thread = service._thread.native_id
        assert thread is not None
        slept = switches(main), switches(thread)
        start = time.perf_counter_ns()
        service.begin_step(StepPlan(chunks=[chunk]))
        for layer in range(LAYERS):
            if layer == LAYERS // 2:
                os.write(self.go, b"g")
            self.layer()
            service.layer_written(layer)
        service.end_step()
        service.take_finished()
        service.take_stats()
        for _ in range(SAMPLING_LAYERS):
            self.layer()
        forward_ns, token_ns = time.perf_counter_ns() - start, monotonic_ns()
        sample = Sample(forward_ns, switches(main) - slept[0], switches(thread) - slept[1], 0)
        told_ns = self._until_freed(name, token_ns)
        sample.done_ns = self.link.recv() - (told_ns if when == "after" else token_ns)
        return sample

    def _until_freed(self, name: str, token_ns: int) -> int:
        """vLLM steps once a millisecond while it holds blocks. Returns when the byte was sent."""
        told_ns = 0
        self.service.begin_step(StepPlan(held=[name]))
        freed = self.service.take_finished()
        while not told_ns or name not in freed:
            now_ns = monotonic_ns()
            assert now_ns < token_ns + DEADLINE_S * 1e9, "the blocks are not freed"
            if not told_ns and now_ns > token_ns + 5_000_000:
                os.write(self.go, b"g")
                told_ns = monotonic_ns()
            time.sleep(0.001)
            self.service.begin_step(StepPlan())
            freed |= self.service.take_finished()
        return told_ns


def switches(thread: int) -> int:
    """How often it went to sleep."""
    with open(f"/proc/self/task/{thread}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("voluntary"))


def spin(count: int) -> None:
    for _ in range(count):
        pass


def spins_a_ms() -> float:
    count, best = 20_000, float("inf")
    for _ in range(50):
        start = time.perf_counter_ns()
        spin(count)
        best = min(best, time.perf_counter_ns() - start)
    return count / best * 1e6


@contextmanager
def rig_of(launches: int, lag_ms: float) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory() as directory:
        address = f"{directory}/p.sock"
        pages = pages_of("split")
        device: Any = TimedDevice(int(lag_ms * 1e6))
        pages.device = device
        producer = Producer(
            pages=pages,
            address=address,
            instance="p",
            rank=0,
            num_ranks=1,
            lease_s=60.0,
            clock=monotonic_ns,
        )
        service = ProducerService(producer, monotonic_ns)
        context = multiprocessing.get_context("fork")
        link, theirs = context.Pipe()
        reading, writing = os.pipe()
        process = context.Process(target=consume, args=(address, theirs, reading), daemon=True)
        process.start()
        spins = int(spins_a_ms() * LAYER_MS / max(1, launches))
        yield Rig(service, link, writing, launches, spins)
        link.send(None)
        process.join(DEADLINE_S)
        service.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--launches", type=int, nargs="+", default=[0, 8], help="a layer")
    parser.add_argument("--samples", type=int, default=61)
    parser.add_argument("--lag", type=float, default=0.3, help="ms that a copy takes")
    args = parser.parse_args()
    print(f"{'launches':>8} {'tokens':>6} announced  forward    more   main  thread    done")
    for launches in args.launches:
        with rig_of(launches, args.lag) as rig:
            for length in args.lengths:
                made: dict[str, list[Sample]] = {when: [] for when in WHENS}
                for i in range(args.samples + 3):
                    for when in random.Random(i).sample(WHENS, len(WHENS)):
                        src, dst = block_ids(length, "shuffled", i)
                        assert len(src) * BLOCK_SIZE >= length
                        made[when].append(rig.prompt(length, when, src, dst))
                for line in lines(made):
                    print(f"{launches:8} {length:6} {line}", flush=True)


def lines(made: dict[str, list[Sample]]) -> Iterator[str]:
    kept = {when: samples[3:] for when, samples in made.items()}  # the first ones warm up
    forward = {
        when: statistics.median(one.forward_ns for one in samples) / 1e6
        for when, samples in kept.items()
    }
    for when, samples in kept.items():
        main, thread = (
            statistics.mean(getattr(one, name) for one in samples) for name in ("main", "thread")
        )
        done = statistics.median(one.done_ns for one in samples) / 1e6
        more = forward[when] - forward["after"]
        yield f"{when:9} {forward[when]:8.2f} {more:+7.2f} {main:6.1f} {thread:7.1f} {done:+7.2f}"


if __name__ == "__main__":
    main()
