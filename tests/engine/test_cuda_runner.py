"""The CUDA runner's logic on the CPU: packing, buckets, pending tokens, sampling.

Kernels are torch's, graphs are eager calls, copies are done when they return. What only a GPU can
show is in test_cuda_gpu.py.
"""

from __future__ import annotations

import queue
import random
import threading
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_harness import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.accelerator import HostAccelerator
from pdrelay.engine.attention import AttentionShape
from pdrelay.engine.backend import cuda_backend
from pdrelay.engine.block_table_rows import BlockTableRows
from pdrelay.engine.communicator import ThreadGroup
from pdrelay.engine.cuda_runner import CudaFollower, CudaRunner
from pdrelay.engine.decode_buckets import bucket_of, decode_buckets
from pdrelay.engine.kernels.gpu import TorchKernels
from pdrelay.engine.models import build_model
from pdrelay.engine.prefill_graphs import prefill_buckets
from pdrelay.engine.runner import ModelRunner
from pdrelay.engine.step import needs_host_tokens
from pdrelay.engine.step_executor import StepExecutor, StepLimits
from pdrelay.engine.step_input import Prefill, StepHeader, StepMessage
from pdrelay.engine.warmup import warm_up
from pdrelay.model.config import kv_layout

torch.set_num_threads(1)

CPU = torch.device("cpu")
BLOCK_SIZE = 8
VOCAB = 101


LIMITS = StepLimits(6, 48, 256, BLOCK_SIZE)


def make_executor(config, *, num_blocks=64, communicator=None, accelerator=None):
    """One rank's executor on the CPU, and its pool."""
    ranks = communicator.world_size if communicator else 1
    shape = AttentionShape(config.num_heads // ranks, config.num_kv_heads // ranks, config.head_dim)
    backend = cuda_backend(shape, torch.float32, CPU, TorchKernels())
    options = dict(load_format="dummy", seed=3, backend=backend, communicator=communicator)
    model = build_model("small", config, **options)
    backend.qkv_buffer.reserve(LIMITS.max_num_batched_tokens)
    layout = kv_layout(config, BLOCK_SIZE, num_blocks, "float32", ranks)
    pool = torch.full(layout.shape, 7.5)
    executor = StepExecutor(model, pool, accelerator or HostAccelerator(), LIMITS)
    executor.capture_prefill_graphs()
    executor.capture_graphs()
    return executor, pool


def make_runner(config, **options):
    executor, pool = make_executor(config, **options)
    return CudaRunner(executor, HostAccelerator(), LIMITS), pool


def plain_runner(config, num_blocks=64):
    model = build_model("small", config, load_format="dummy", seed=3, use_kernels=False)
    pool = torch.full(kv_layout(config, BLOCK_SIZE, num_blocks, "float32").shape, 7.5)
    return ModelRunner(model, pool, BLOCK_SIZE)


def make_scheduler(num_blocks=64, seqs=6, budget=48):
    return Scheduler(SchedulerConfig(seqs, budget, BLOCK_SIZE), BlockManager(num_blocks))


def add(scheduler, name, prompt, **params):
    params = SamplingParams(**{"max_tokens": 8, "seed": 5, "temperature": 0.0, **params})
    scheduler.add(
        Request(
            EngineRequest(
                request_id=name, prompt_token_ids=pack_ids(prompt), params=params, arrived_ns=0
            )
        )
    )


def serve(runner, scheduler, depth):
    """Run to the end with `depth` steps unread. Returns tokens, logprobs by request."""
    outputs, in_flight = {}, []
    for _ in range(2000):
        if not scheduler.has_work and not in_flight:
            return outputs
        ahead = not any(needs_host_tokens(c.request) for plan, _ in in_flight for c in plan.chunks)
        if len(in_flight) < depth and ahead and scheduler.has_work:
            plan = scheduler.schedule()
            if plan.chunks:
                in_flight.append((plan, runner.launch(plan, None, None)))
                continue
        plan, handle = in_flight.pop(0)
        assert handle.done()
        tokens = handle.result()
        starts = {chunk.request.request_id: chunk.start for chunk in plan.chunks}
        for request_id, logprobs in tokens.prompt_logprobs.items():
            if starts[request_id] == 0:  # preempted in mid-prompt: scored anew
                outputs[request_id] = [("prompt", [])]
            outputs[request_id][0][1].extend(p.logprob for p in logprobs)
        for token in scheduler.update(plan, tokens.token_ids):
            logprobs = tokens.logprobs[token.index]
            shown = [] if logprobs is None else [logprobs.logprob]
            entry = ((token.token_id, token.finish_reason), shown)
            outputs.setdefault(token.request.request_id, []).append(entry)
    pytest.fail("does not come to an end")


def assert_same(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, entries in wanted.items():
        assert [what for what, _ in actual[name]] == [what for what, _ in entries], name
        for (_, mine), (_, theirs) in zip(actual[name], entries, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


def random_params(rng):
    return rng.choice(
        [
            {},
            {},
            {"temperature": 0.8},
            {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
            {"temperature": 1.0, "min_p": 0.05},
            {"logprobs": 2},
            {"presence_penalty": 1.0},
            {"logit_bias": {3: 8.0}},
            {"min_tokens": 4, "stop_token_ids": (7, 8, 9)},
            {"prompt_logprobs": 1},
        ]
    )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kinds", ["greedy", "all"])
def test_same_tokens_as_the_plain_runner(depth, kinds):
    config = small_config(head_dim=16)
    rng = random.Random(depth)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    requests = []
    for i in range(24):
        prompt = shared[: rng.choice([0, 9, 24])] + [rng.randrange(VOCAB) for _ in range(5 + i)]
        params = random_params(rng) if kinds == "all" else {}
        requests.append((f"r{i}", prompt, {"max_tokens": rng.randint(1, 12), "seed": i, **params}))
    outputs = []
    cuda, _ = make_runner(config, num_blocks=16)
    for runner, unread in ((plain_runner(config, 16), 1), (cuda, depth)):
        scheduler = make_scheduler(num_blocks=16)
        for name, prompt, params in requests:
            add(scheduler, name, prompt, **params)
        outputs.append(serve(runner, scheduler, unread))
        assert scheduler.num_preemptions > 0
    assert_same(*outputs)


def test_qwen3_norms_and_biases():
    config = small_config(architectures=["Qwen3ForCausalLM"], attention_bias=True)
    outputs = []
    for runner, depth in ((plain_runner(config), 1), (make_runner(config)[0], 2)):
        scheduler = make_scheduler()
        for i in range(4):
            add(scheduler, f"r{i}", list(range(i, 30 * i + 5)))
        outputs.append(serve(runner, scheduler, depth))
    assert_same(*outputs)


def test_decode_steps_run_graphs_and_padding_writes_nothing():
    config = small_config()
    runner, pool = make_runner(config)
    scheduler = make_scheduler()
    for i in range(3):  # bucket 4: one padding row
        add(scheduler, f"r{i}", [i, i + 1, i + 2], max_tokens=4)
    replays = []
    graphs = runner._executor._graphs
    for bucket, graph in list(graphs.items()):
        original = graph.replay
        object.__setattr__(graph, "replay", lambda b=bucket, f=original: (replays.append(b), f()))
    serve(runner, scheduler, 2)
    assert set(replays) == {4}
    used = sorted({block for block in range(64) if not torch.all(pool[:, block] == 7.5)})
    assert used == [0, 1, 2], "three requests of one block each"


class LaunchOrder(TorchDispatchMode):
    """What a step launches: "input" (writes what attention may read before it waits), "gather", and
    kernels that may be launched with PDL, by name."""

    def __init__(self, executor, monkeypatch):
        super().__init__()
        self.seen = []
        self._inputs = {t.untyped_storage().data_ptr() for t in (executor._words, executor._tables)}
        kernels = executor._kernels
        for name in (n for n in dir(kernels) if not n.startswith("_")):
            if callable(original := getattr(kernels, name)):
                label = "input" if name == "decode_cut" else name
                monkeypatch.setattr(kernels, name, partial(self._called, label, original))

    def _called(self, label, original, *args):
        if not label.endswith("_wins"):  # a question, no kernel
            self.seen.append(label)
        return original(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default:
            self.seen.append("gather")
        copies = func is torch.ops.aten.copy_.default
        if copies and args[0].untyped_storage().data_ptr() in self._inputs:
            self.seen.append("input")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixed", [False, True])
def test_what_attention_reads_before_it_waits_lies_behind_the_gather(mixed, monkeypatch):
    runner, _ = make_runner(small_config())
    scheduler = make_scheduler()
    add(scheduler, "a", [1, 2, 3], max_tokens=4)
    first = scheduler.schedule()
    scheduler.update(first, runner.launch(first, None, None).result().token_ids)
    if mixed:
        add(scheduler, "b", [4, 5, 6, 7], max_tokens=4)
    plan = scheduler.schedule()
    with LaunchOrder(runner._executor, monkeypatch) as order:
        runner.launch(plan, None, None).result()
    seen = order.seen
    gather = seen.index("gather")
    assert set(seen[:gather]) == {"input"} and len(seen[:gather]) >= 2, "upload, (tables,) parts"
    attention = len(seen) - 1 - seen[::-1].index("paged_decode")
    assert "input" not in seen[gather:attention]


def test_a_step_stores_into_a_peers_pages_too():
    config = small_config()
    runner, pool = make_runner(config)
    peer = torch.full((config.num_layers, 9, *pool.shape[2:]), 7.5)
    scheduler = make_scheduler()
    prompt = list(range(20))
    add(scheduler, "a", prompt, max_tokens=1)
    plan = scheduler.schedule()
    (table,) = [chunk.request.block_table for chunk in plan.chunks]
    blocks = [8, 2, 5]  # in the peer's pool
    slots = [blocks[p // 8] * 8 + p % 8 if p >= 8 else -1 for p in range(20)]  # it has the first
    runner.launch(plan, None, SimpleNamespace(tensor=peer, slots=np.array(slots))).result()
    assert torch.equal(peer[:, 2], pool[:, table[1]])
    assert torch.equal(peer[:, 5, :, :4], pool[:, table[2], :, :4])
    untouched = [b for b in range(9) if b not in (2, 5)]
    assert torch.all(peer[:, untouched] == 7.5) and torch.all(peer[:, 5, :, 4:] == 7.5)


def prompt_plan(name, length):
    scheduler = make_scheduler()
    add(scheduler, name, [(7 * i) % VOCAB for i in range(length)], max_tokens=1)
    return scheduler.schedule()


class CountingAccelerator(HostAccelerator):
    """Counts replays; `barred`: replays that must not happen any more."""

    def __init__(self):
        self.replays = 0
        self.barred = False

    def capture(self, work):
        def replay():
            assert not self.barred
            self.replays += 1
            work()

        return replay


def counted_runner(config):
    accelerator = CountingAccelerator()
    executor, pool = make_executor(config, accelerator=accelerator)
    return CudaRunner(executor, accelerator, LIMITS), pool, accelerator


@pytest.mark.parametrize("length", [1, 31, 32, 33, 47, 48])
def test_a_short_prompt_alone_runs_a_graph_and_padding_changes_nothing(length):
    config = small_config()
    runner, pool, accelerator = counted_runner(config)
    plain = plain_runner(config)
    plan = prompt_plan("a", length)
    (table,) = [chunk.request.block_table for chunk in plan.chunks]
    tokens = runner.launch(plan, None, None).result().token_ids
    assert accelerator.replays == 1
    assert tokens == plain.launch(plan, None, None).result().token_ids
    torch.testing.assert_close(pool, plain._kv_pool)
    others = [block for block in range(64) if block not in table]
    assert torch.all(pool[:, others] == 7.5), "padding rows were stored"


def test_what_is_not_one_fresh_prompt_runs_without_a_prefill_graph():
    runner, _, accelerator = counted_runner(small_config())
    scheduler = make_scheduler()
    add(scheduler, "a", list(range(20)), max_tokens=1)
    add(scheduler, "b", list(range(50, 59)), max_tokens=1)
    serve(runner, scheduler, 1)  # two prompts in a step
    add(scheduler, "c", list(range(40)), max_tokens=1)
    serve(runner, scheduler, 1)  # behind cached tokens
    add(scheduler, "d", [9] * 20, max_tokens=1, prompt_logprobs=1)
    serve(runner, scheduler, 1)
    add(scheduler, "e", [8] * 60, max_tokens=1)
    serve(runner, scheduler, 1)  # two chunks
    assert accelerator.replays == 0
    add(scheduler, "f", [3] * 20, max_tokens=1, temperature=0.7, top_k=3, logprobs=2)
    serve(runner, scheduler, 1)
    assert accelerator.replays == 1


def test_layers_of_a_graph_step_are_announced_in_order_behind_it():
    config = small_config()
    runner, pool, accelerator = counted_runner(config)
    plan = prompt_plan("a", 20)
    (table,) = [chunk.request.block_table for chunk in plan.chunks]
    seen = []

    def hook(layer):
        assert accelerator.replays == 1 and not torch.any(pool[:, table[0]] == 7.5)
        seen.append(layer)

    runner.launch(plan, hook, None).result()
    assert seen == list(range(config.num_layers))


def stored(runner, peer, length=20):
    """Launch a prompt that is stored into `peer` too, at blocks 4, 5 and 6; its hand-over's
    pages, and the own ones."""
    plan = prompt_plan("a", length)
    slots = np.arange(length) + 4 * BLOCK_SIZE
    runner.launch(plan, None, SimpleNamespace(tensor=peer, slots=slots)).result()
    return plan.chunks[0].request.block_table


def test_graphs_of_a_peers_pool_store_what_the_same_step_stores_without_one():
    config = small_config()
    runner, pool, accelerator = counted_runner(config)
    peers = [torch.full((config.num_layers, 9, *pool.shape[2:]), 7.5) for _ in range(2)]
    for peer in peers:
        runner.pool_opened(peer)
    assert runner.has_idle_work
    table = stored(runner, peers[0])
    assert accelerator.replays == 0, "not captured yet"
    eager = peers[0].clone()
    assert torch.equal(eager[:, 4:6], pool[:, table[:2]])
    while runner.has_idle_work:
        runner.do_idle_work()
    assert accelerator.replays == 0 and torch.equal(peers[0], eager), "capturing stores nothing"
    peers[0].fill_(7.5)
    table = stored(runner, peers[0])
    assert accelerator.replays == 1 and torch.equal(peers[0][:, 4:6], pool[:, table[:2]])
    assert torch.equal(peers[0], eager), "bits must not depend on when a graph was captured"
    assert torch.all(peers[1] == 7.5)
    stored(runner, peers[1])
    assert accelerator.replays == 2 and torch.equal(peers[1], peers[0])


def test_no_graph_is_captured_by_one_rank_of_several():
    runner, pool, _ = counted_runner(small_config())
    runner.broadcast = lambda message: None
    runner.pool_opened(pool)
    assert not runner.has_idle_work
    runner.pool_closed(pool)
    assert not runner.has_idle_work


@pytest.mark.parametrize("captured", ["none", "some", "all"])
def test_graphs_go_with_the_peers_pool(captured):
    """Not even another pool at the same address runs them."""
    config = small_config()
    runner, pool, accelerator = counted_runner(config)
    peer = torch.full((config.num_layers, 9, *pool.shape[2:]), 7.5)
    runner.pool_opened(peer)
    for _ in range({"none": 0, "some": 1, "all": 9}[captured]):
        if runner.has_idle_work:
            runner.do_idle_work()
    runner.pool_closed(peer)
    runner.pool_closed(peer)  # twice is once
    accelerator.barred = True
    again = peer.view(peer.shape)
    assert again.data_ptr() == peer.data_ptr()
    bucket_of = runner._executor.prefill_graphs.bucket_of
    assert bucket_of(20, peer) is None and bucket_of(20, again) is None
    stored(runner, again)
    for bucket in runner._executor.prefill_graphs.buckets:
        with pytest.raises(AssertionError, match="not open"):
            runner._executor.prefill_graphs.run(bucket, peer)
    while runner.has_idle_work:
        runner.do_idle_work()
    assert bucket_of(20, peer) is None
    runner.pool_opened(again)
    while runner.has_idle_work:
        runner.do_idle_work()
    accelerator.barred = False
    assert bucket_of(20, again) == 32 and bucket_of(20, None) == 32
    assert accelerator.replays == 0


def test_prefill_buckets():
    assert prefill_buckets(8192) == prefill_buckets(1024)
    assert prefill_buckets(1024)[-1] == 1024
    assert prefill_buckets(300)[-2:] == (256, 300)
    assert prefill_buckets(5) == (5,)
    assert all(a < b for a, b in pairwise(prefill_buckets(1024)))


def test_buckets():
    assert decode_buckets(1) == (1,)
    assert decode_buckets(8) == (1, 2, 4, 8)
    assert decode_buckets(20) == (1, 2, 4, 8, 16, 20)
    assert decode_buckets(200)[-5:] == (96, 128, 160, 192, 200)
    for n in (1, 3, 8, 21, 64, 65, 200):
        bucket = bucket_of(decode_buckets(200), n)
        assert n <= bucket <= max(2 * n, n + 32)
    assert bucket_of(decode_buckets(8), 9) is None
    assert bucket_of(decode_buckets(8), 0) is None


def test_block_table_rows_follow_growth_preemption_and_departures():
    rows = BlockTableRows(3, 5)
    requests = [
        Request(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=pack_ids([1]),
                arrived_ns=0,
                params=SamplingParams(max_tokens=1, seed=0),
            )
        )
        for i in range(7)
    ]
    for request in requests:
        request.block_table = [1, 2]
    rows.begin_step()
    first = rows.row(requests[0])
    requests[0].block_table.append(9)
    rows.begin_step()
    assert rows.row(requests[0]) == first
    assert rows.table[first, :3].tolist() == [1, 2, 9]
    requests[0].block_table = [4, 5, 6]  # preempted and admitted again: as long, other blocks
    assert rows.table[rows.row(requests[0]), :3].tolist() == [4, 5, 6]
    for i in range(1, 7):
        rows.begin_step()
        indices = {rows.row(requests[0]), rows.row(requests[i])}
        assert len(indices) == 2 and indices <= {0, 1, 2}
    assert np.array_equal(rows.table[rows.row(requests[6]), :2], [1, 2])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_arrays_of_a_step_are_aligned_do_not_overlap_and_fit(seed):
    rng = random.Random(seed)
    limits = StepLimits(rng.randint(1, 40), rng.randint(40, 300), rng.randint(64, 900), 16)
    decodes = rng.randint(0, limits.max_num_seqs)
    prefills, row = [], decodes
    while decodes + len(prefills) < limits.max_num_seqs and row < limits.max_num_batched_tokens:
        length = rng.randint(1, limits.max_num_batched_tokens - row)
        prefills.append(Prefill(row, length, 0, rng.randint(0, limits.table_width)))
        row += length
    header = StepHeader(
        rows=row,
        num_decodes=decodes,
        table_width=rng.randint(1, limits.table_width),
        prefills=tuple(prefills),
        num_logits=rng.randint(0, row),
        is_graph=False,
        greedy=False,
        num_draws=decodes + len(prefills),
        truncates=True,
        has_min_p=True,
        has_remote=True,
    )
    at = header.words()
    starts = [at.token_ids, at.sources, at.positions, at.slots, at.seq_lens, at.logits_rows]
    starts += [at.remote, at.draws, at.tables]
    sizes = [row] * 4 + [-(-row // 2), header.num_logits, row, 5 * header.num_draws]
    assert all(start % 2 == 0 for start in starts)
    for (start, following), size in zip(pairwise(starts), sizes, strict=True):
        assert start + size <= following
    entry = decodes * header.table_width
    for first, segment in zip(at.table_at, prefills, strict=True):
        assert first % 4 == 0 and first >= entry
        entry = first + segment.table_len
    assert at.tables + -(-entry // 2) <= at.end <= limits.max_words
    assert limits.first_host_token % 2 == 0 and limits.first_host_token >= limits.max_num_seqs


def test_warm_up_runs_every_kind_of_step_and_stores_nothing_remotely():
    config = small_config()
    runner, pool = make_runner(config)
    peer = torch.full_like(pool, 7.5)
    warm_up(
        runner,
        SchedulerConfig(6, 48, BLOCK_SIZE),
        num_blocks=64,
        vocab_size=VOCAB,
        max_model_len=256,
        on_gpu=True,
        remote_pool=peer,
    )
    assert torch.all(peer == 7.5) and not torch.all(pool == 7.5)


def test_a_second_rank_follows():
    """Pending tokens, draws and tokens that rank 0's host chose are known on both ranks."""
    config = small_config()
    requests = [
        (f"r{i}", list(range(i, 20 + i)), params)
        for i, params in enumerate([{}, {"temperature": 1.0}, {"logprobs": 1}, {"min_tokens": 3}])
    ]
    group, steps, outputs = ThreadGroup(2), queue.SimpleQueue(), []

    def follow():
        executor, _ = make_executor(config, communicator=group.rank(1))
        follower = CudaFollower(executor, HostAccelerator(), LIMITS)
        while (message := steps.get()) is not None:
            decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=StepMessage)
            follower.run(decoded)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    executor, _ = make_executor(config, communicator=group.rank(0))
    pair = CudaRunner(executor, HostAccelerator(), LIMITS)
    pair.broadcast = steps.put
    for runner, depth in ((plain_runner(config), 1), (pair, 2)):
        scheduler = make_scheduler()
        for name, prompt, params in requests:
            add(scheduler, name, prompt, **params)
        outputs.append(serve(runner, scheduler, depth))
    steps.put(None)
    thread.join(30)
    assert not thread.is_alive()
    assert_same(*outputs)
