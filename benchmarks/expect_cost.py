"""What a prompt costs the host before its KV can move: a consumer's part of `Expect` up to the
promise of blocks, and the front door's two frames.

    python benchmarks/expect_cost.py [--lengths 512 4096 8192] [--samples 15]

Best of `--samples`, microseconds. `expect`: decode, `Request`, queue. `reserve`: prefix
match (none is cached), allocation. `hash`: the keys of all blocks, which the engine computes once
the promise has left. `encode`: ids to the messages `Expect` and `Prefill`, framed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.framing import FrameCodec
from pdrelay.core.messages import EngineRequest, Expect, Prefill, ToWorker
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids

BLOCK_SIZE = 64
NUM_BLOCKS = 4096


def request_of(ids: list[int]) -> EngineRequest:
    params = SamplingParams(max_tokens=128, seed=0)
    return EngineRequest(
        request_id="r", prompt_token_ids=pack_ids(ids), params=params, arrived_ns=0
    )


def best_us(samples: int, prepare: Callable[[], Callable[[], object]]) -> float:
    """`prepare` is not timed; it returns what is."""
    times = []
    for _ in range(samples):
        run = prepare()
        begun_ns = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - begun_ns)
    return min(times) / 1e3


def measure(length: int, samples: int) -> tuple[float, float, float, float]:
    """(expect, reserve, hash, encode)"""
    ids = [i * 7919 % 128_000 for i in range(length)]
    codec: FrameCodec[ToWorker] = FrameCodec(ToWorker)
    frame = codec.encode(Expect(request_of(ids), "prefill-0"))

    def fresh() -> Scheduler:
        return Scheduler(SchedulerConfig(256, 8192, BLOCK_SIZE), BlockManager(NUM_BLOCKS))

    def expect(scheduler: Scheduler) -> None:
        (message,) = codec.feed(frame)
        assert isinstance(message, Expect)
        scheduler.expect(Request(message.request))

    def expected() -> Callable[[], object]:
        scheduler = fresh()
        expect(scheduler)
        return scheduler.reserve

    def encode() -> None:
        request = request_of(ids)
        codec.encode(Expect(request, "prefill-0"))
        codec.encode(Prefill(request, "decode-0", "/run/decode-0.sock"))

    def hashing() -> Callable[[], object]:
        request = Request(request_of(ids))
        return lambda: request.extend_block_keys(BLOCK_SIZE)

    def expecting() -> Callable[[], object]:
        scheduler = fresh()
        return lambda: expect(scheduler)

    return (
        best_us(samples, expecting),
        best_us(samples, expected),
        best_us(samples, hashing),
        best_us(samples, lambda: encode),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 8192])
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()
    print("tokens  expect  reserve    hash  encode   (us)")
    for length in args.lengths:
        expect, reserve, hashed, encode = measure(length, args.samples)
        print(f"{length:6}  {expect:6.1f}  {reserve:7.1f}  {hashed:6.1f}  {encode:6.1f}")


if __name__ == "__main__":
    main()
