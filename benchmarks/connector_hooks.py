"""What the vLLM connector's hooks take of the prefill engine's thread in one step.

    python benchmarks/connector_hooks.py [--lengths 128 1024 8192] [--samples 31]

Llama-3.1-8B's cache (32 layers, 8 KV heads of 128, bf16, blocks of 16 tokens) on a device that does
nothing, so that what is timed is our Python; a consumer announces over a real socket. `form`: K and
V of a layer apart (`split`) or together. `blocks`: in one run on both sides, or shuffled. `when`:
the announcement is read before the prefill, comes in its middle, is read after it, or two steps
share a prompt (`chunked`, announced before).

Medians, microseconds. `begin`: metadata bound; `layers`: all 32 layers' hooks together; `end`: the
forward is issued; `after`: what is asked at the end of each step; `sum` of these. `answer`: to read
and match the announcement, in the middle by one of the layers' hooks, else by the producer's
thread. `copies` and `events`: submissions to the device and events recorded, of the prompt's steps
(after: those of the other thread too); `turns`: how often the producer's thread ran meanwhile. With
`--launches n` a layer also makes n short calls that let go of the interpreter's lock, as launching
kernels does; `step` is then what a step takes longer than one without a connector.
"""

from __future__ import annotations

import argparse
import random
import select
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pdrelay.core.clock import monotonic_ns
from pdrelay.integrations.vllm.consumer import Consumer
from pdrelay.integrations.vllm.device_pages import DeviceKVPages, Region
from pdrelay.integrations.vllm.page_layout import LayerLayout, PageLayout, Plane
from pdrelay.integrations.vllm.producer import Producer
from pdrelay.integrations.vllm.service import ProducerService
from pdrelay.integrations.vllm.step import Chunk, Load, StepPlan

LAYERS, NUM_BLOCKS, BLOCK_SIZE = 32, 2048, 16
PLANE_BYTES = BLOCK_SIZE * 8 * 128 * 2  # of K, or of V
WHENS = ("before", "during", "after", "chunked")
TIMED = ("begin", "layers", "end", "after", "sum", "answer")
COUNTED = ("copies", "events", "turns")
DEADLINE_S = 10.0


class StubCopy:
    """Lands when told to."""

    def __init__(self) -> None:
        self.landed = threading.Event()

    def done(self) -> bool:
        return self.landed.is_set()

    def wait(self) -> None:
        assert self.landed.wait(DEADLINE_S)

    def busy_ns(self) -> int:
        return 0


class StubDevice:
    """As much of a Device as DeviceKVPages asks for; counts, and moves nothing."""

    def __init__(self) -> None:
        self.num_copies = self.num_events = 0
        self._copies: list[StubCopy] = []

    def launched(self) -> object:
        self.num_events += 1
        return None

    def copy(self, *_: Any) -> StubCopy:
        self.num_copies += 1
        self._copies.append(StubCopy())
        return self._copies[-1]

    copy_pages = copy

    def land(self) -> None:
        while self._copies:
            self._copies.pop(0).landed.set()

    def prepare_page_copies(self, pool: object) -> None:
        pass

    def open_peer(self, handle: bytes, num_bytes: int) -> int:
        return 1 << 40

    def close_peer(self, address: int) -> None:
        pass

    def close(self) -> None:
        pass


def pages_of(form: str) -> DeviceKVPages:
    """vLLM's tensors, one a layer, all in one allocation."""
    layer_bytes = NUM_BLOCKS * 2 * PLANE_BYTES
    planes: tuple[Plane, ...] = (Plane(0, 2 * PLANE_BYTES, 2 * PLANE_BYTES),)
    if form == "split":
        far = NUM_BLOCKS * PLANE_BYTES
        planes = tuple(Plane(i * far, PLANE_BYTES, PLANE_BYTES) for i in range(2))
    layout = PageLayout(
        NUM_BLOCKS,
        BLOCK_SIZE,
        (layer_bytes,) * LAYERS,
        tuple(LayerLayout(f"layers.{i}", i, form, planes) for i in range(LAYERS)),
    )
    starts = [i * layer_bytes for i in range(LAYERS)]
    regions = [Region((1 << 40) + at, b"h", layer_bytes * LAYERS, at) for at in starts]
    device: Any = StubDevice()
    return DeviceKVPages(layout, device, regions)


@dataclass
class Times:
    """Of one prompt, ns; `step` whole, with what stands for the launches of kernels."""

    begin: int = 0
    layers: int = 0
    end: int = 0
    after: int = 0
    answer: int = 0
    step: int = 0
    copies: int = 0
    events: int = 0
    turns: int = 0

    @property
    def sum(self) -> int:
        return self.begin + self.layers + self.end + self.after


@dataclass
class Rig:
    pages: DeviceKVPages
    device: StubDevice
    producer: Producer
    service: ProducerService
    consumer: Consumer
    launches: int
    address: str
    reads: list[int] = field(default_factory=list)  # ns of each
    turns: list[int] = field(default_factory=list)  # of the thread
    number: int = 0

    def announce(self, name: str, num_tokens: int, blocks: list[int]) -> None:
        digests = [b"d" * 16, b"e" * 16]
        load = Load(name, f"T-{name}", self.address, 0, blocks, num_tokens, digests)
        self.consumer.begin_step(StepPlan(loads=[load]))

    def load(self, name: str, num_tokens: int, blocks: list[int]) -> None:
        """Announce, and wait until it is read."""
        before = len(self.reads)
        self.announce(name, num_tokens, blocks)
        until(lambda: self._announced(f"T-{name}"))
        until(lambda: len(self.reads) > before)

    def _announced(self, transfer_id: str) -> bool:
        outgoing = self.producer._transfers._by_transfer.get(transfer_id)
        links = list(self.producer._links.all)
        return any(transfer_id in link.early for link in links) or (
            outgoing is not None and outgoing.link is not None
        )

    def step(
        self, times: Times, plan: StepPlan, between: Callable[[int], None] = lambda layer: None
    ) -> None:
        """One step of the engine. What `between` does is not timed."""
        clock, service = time.perf_counter_ns, self.service
        begun = clock()
        service.begin_step(plan)
        times.begin += clock() - begun
        aside = 0
        for layer in range(LAYERS):
            launch_kernels(self.launches)
            entered = clock()
            between(layer)
            start = clock()
            aside += start - entered
            service.layer_written(layer)
            times.layers += clock() - start
        start = clock()
        service.end_step()
        times.end += clock() - start
        start = clock()
        service.take_finished()
        service.take_stats()
        times.after += clock() - start
        times.step += clock() - begun - aside

    def prompt(self, num_tokens: int, when: str, src: list[int], dst: list[int]) -> Times:
        self.number += 1
        name, times = f"r{self.number}", Times()
        copies, events = self.device.num_copies, self.device.num_events
        if when in ("before", "chunked"):
            self.load(name, num_tokens, dst)
        turns = len(self.turns)

        def announce(layer: int) -> None:
            if layer == LAYERS // 2 and when == "during":
                self.announce(name, num_tokens, dst)

        stops = [num_tokens // 2, num_tokens] if when == "chunked" else [num_tokens]
        for stop in stops:
            blocks = src[: -(-stop // BLOCK_SIZE)]
            chunk = Chunk(name, f"T-{name}", num_tokens, b"d" * 16, blocks, stop)
            self.step(times, StepPlan(chunks=[chunk]), announce)
        times.copies, times.events = (
            self.device.num_copies - copies,
            self.device.num_events - events,
        )
        times.turns = len(self.turns) - turns
        if when == "after":
            self.load(name, num_tokens, dst)
            times.copies = self.device.num_copies - copies
        times.answer = self.reads[-1]
        self._finish(name)
        return times

    def _finish(self, name: str) -> None:
        self.device.land()
        done: set[str] = set()
        freed: set[str] = set()

        def ended() -> bool:
            self.device.land()
            self.consumer.poll()
            done.update(self.consumer.take_finished())
            return name in done

        until(ended)
        self.service.begin_step(StepPlan(held=[name]))
        until(lambda: bool(freed.update(self.service.take_finished()) or name in freed))
        assert not self.consumer.take_failed_blocks()


def timed(call: Callable[..., None], times: list[int]) -> Callable[..., None]:
    def timing(*args: Any) -> None:
        start = time.perf_counter_ns()
        call(*args)
        times.append(time.perf_counter_ns() - start)

    return timing


def launch_kernels(count: int) -> None:
    """Each gives the interpreter's lock away for a moment."""
    for _ in range(count):
        select.select((), (), (), 0)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, "the other side does not answer"
        select.select((), (), (), 0.0002)


@contextmanager
def rig_of(form: str, launches: int) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory() as directory:
        address = f"{directory}/p.sock"
        pages = pages_of(form)
        identity: dict[str, Any] = {"rank": 0, "num_ranks": 1, "clock": monotonic_ns}
        producer = Producer(pages=pages, address=address, instance="p", lease_s=60.0, **identity)
        consumer = Consumer(
            pages=pages_of(form), instance="d", lease_s=60.0, load_timeout_s=60.0, **identity
        )
        device: Any = pages.device
        service = ProducerService(producer, monotonic_ns)
        rig = Rig(pages, device, producer, service, consumer, launches, address)
        links = producer._links
        vars(links)["_read"] = timed(links._read, rig.reads)
        vars(service)["_turn"] = timed(service._turn, rig.turns)
        yield rig
        consumer.close()
        service.close()


def block_ids(num_tokens: int, order: str, seed: int) -> tuple[list[int], list[int]]:
    count = -(-num_tokens // BLOCK_SIZE)
    if order == "run":
        return list(range(7, 7 + count)), list(range(99, 99 + count))
    rng = random.Random(seed)
    return rng.sample(range(NUM_BLOCKS), count), rng.sample(range(NUM_BLOCKS), count)


def bare_step_ns(launches: int, samples: int) -> float:
    times = []
    for _ in range(samples):
        start = time.perf_counter_ns()
        for _ in range(LAYERS):
            launch_kernels(launches)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


def measure(rig: Rig, form: str, length: int, order: str, when: str, samples: int) -> str:
    made = [rig.prompt(length, when, *block_ids(length, order, i)) for i in range(samples + 3)][3:]
    bare = bare_step_ns(rig.launches, samples) * (2 if when == "chunked" else 1)
    medians = {
        name: statistics.median(getattr(one, name) for one in made)
        for name in (*TIMED, "step", *COUNTED)
    }
    medians["step"] -= bare
    cells = [f"{form:8} {length:6} {order:8} {when:8}"]
    cells += [f"{medians[name] / 1e3:8.1f}" for name in TIMED]
    cells.append(f"{medians['step'] / 1e3:8.0f}" if rig.launches else f"{'-':>8}")
    cells += [f"{medians[name]:6g}" for name in COUNTED]
    return " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument(
        "--forms", nargs="+", choices=["split", "together"], default=["split", "together"]
    )
    parser.add_argument(
        "--orders", nargs="+", choices=["run", "shuffled"], default=["run", "shuffled"]
    )
    parser.add_argument("--whens", nargs="+", choices=WHENS, default=WHENS)
    parser.add_argument("--samples", type=int, default=31)
    parser.add_argument("--launches", type=int, default=0, help="stand-ins for kernels, a layer")
    args = parser.parse_args()
    titles = [f"{name:>8}" for name in (*TIMED, "step")] + [f"{name:>6}" for name in COUNTED]
    print(f"{'form':8} {'tokens':>6} {'blocks':8} {'when':8} {' '.join(titles)}   (us)")
    for form in args.forms:
        with rig_of(form, args.launches) as rig:
            for length in args.lengths:
                for order in args.orders:
                    for when in args.whens:
                        print(measure(rig, form, length, order, when, args.samples), flush=True)


if __name__ == "__main__":
    main()
