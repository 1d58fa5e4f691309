"""The CUDA engine on a GPU: graphs against eager, overlap against the plain loop, logits against
torch's operations, and nothing compiled in service."""

from __future__ import annotations

import random

import pytest
import torch

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.clock import monotonic_ns
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids
from pdrelay.model.config import kv_layout, parse_model_config

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="the CUDA engine needs the triton package")

from pdrelay.engine.attention import ForwardContext, PrefillSegment
from pdrelay.engine.cuda_engine import build_engine, prepare_backend
from pdrelay.engine.kernels.gpu import TorchKernels, gathered_prefill
from pdrelay.engine.models import build_model
from pdrelay.engine.startup_clock import StartupClock
from pdrelay.engine.step import RemoteSlots
from pdrelay.engine.step_executor import StepLimits
from pdrelay.engine.warmup import warm_up

CUDA = torch.device("cuda")
BLOCK_SIZE, NUM_BLOCKS, VOCAB = 64, 128, 1000
LIMITS = StepLimits(
    max_num_seqs=16, max_num_batched_tokens=1024, max_model_len=4096, block_size=BLOCK_SIZE
)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rope_theta": 500_000.0,
}


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen3ForCausalLM"])
def config(request):
    return parse_model_config(SHAPE | {"architectures": [request.param]}, "small")


@pytest.fixture(scope="module")
def engine(config):
    torch.cuda.set_device(0)
    model = build_model(
        "small", config, load_format="dummy", seed=1, dtype=torch.bfloat16, device=CUDA
    )
    prepare_backend(model, config, LIMITS)
    layout = kv_layout(config, BLOCK_SIZE, NUM_BLOCKS, "bfloat16")
    pool = torch.zeros(layout.shape, dtype=torch.bfloat16, device=CUDA)
    built = build_engine(model, pool, LIMITS, StartupClock(monotonic_ns))
    scheduler = SchedulerConfig(16, 1024, BLOCK_SIZE)
    warm_up(
        built.runner,
        scheduler,
        num_blocks=NUM_BLOCKS,
        vocab_size=VOCAB,
        max_model_len=4096,
        on_gpu=True,
    )
    yield built
    built.accelerator.close()


def requests(count, seed=0, **params):
    rng = random.Random(seed)
    for i in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([3, 60, 200, 700, 1500]))]
        yield Request(
            EngineRequest(
                request_id=f"r{seed}-{i}",
                prompt_token_ids=pack_ids(prompt),
                params=SamplingParams(
                    **{
                        "max_tokens": 24,
                        "seed": i,
                        "temperature": 0.0,
                        "ignore_eos": True,
                        **params,
                    }
                ),
                arrived_ns=0,
            )
        )


def serve(runner, work, depth=1, seqs=16):
    scheduler = Scheduler(
        SchedulerConfig(seqs, 1024, BLOCK_SIZE),
        BlockManager(NUM_BLOCKS, enable_prefix_caching=False),
    )
    for request in work:
        scheduler.add(request)
    outputs, in_flight = {}, []
    while scheduler.has_work or in_flight:
        if len(in_flight) < depth and scheduler.has_work:
            plan = scheduler.schedule()
            if plan.chunks:
                in_flight.append((plan, runner.launch(plan, None, None)))
                continue
        plan, handle = in_flight.pop(0)
        for token in scheduler.update(plan, handle.result().token_ids):
            outputs.setdefault(token.request.request_id, []).append(token.token_id)
    return outputs


def test_graphs_give_what_eager_gives(engine, monkeypatch):
    graphs = serve(engine.runner, requests(5))
    monkeypatch.setattr(engine.executor, "replays", False)
    assert serve(engine.runner, requests(5)) == graphs


def prompt_step(length):
    scheduler = Scheduler(
        SchedulerConfig(16, 1024, BLOCK_SIZE),
        BlockManager(NUM_BLOCKS, enable_prefix_caching=False),
    )
    rng = random.Random(length)
    params = SamplingParams(max_tokens=2, seed=0, temperature=0.0, ignore_eos=True)
    prompt = [rng.randrange(VOCAB) for _ in range(length)]
    scheduler.add(
        Request(
            EngineRequest(
                request_id="p", prompt_token_ids=pack_ids(prompt), params=params, arrived_ns=0
            )
        )
    )
    return scheduler.schedule()


def pages_of(pool, plan):
    """[layers, 2, tokens, heads, dim] of the plan's one prompt."""
    (chunk,) = plan.chunks
    used = pool[:, chunk.request.block_table].transpose(1, 2).flatten(2, 3)
    return used[:, :, : chunk.length].clone()


LENGTHS = (1, 7, 32, 33, 100, 128, 150, 250, 256, 300, 511, 512, 640, 700, 900, 1023, 1024)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_graphs_equal_the_same_launches(engine, monkeypatch, length):
    """Bits of the token and of every page, against the bucket launched kernel by kernel; and
    nearly those of the exact length."""
    executor, plan = engine.executor, prompt_step(length)
    pool = executor._kv_pool
    assert executor.prefill_graphs.bucket_of(length, None) is not None

    def run():
        pool.zero_()
        tokens = engine.runner.launch(plan, None, None).result().token_ids
        return tokens, pages_of(pool, plan), int(pool.count_nonzero())

    tokens, pages, stored = run()
    assert stored <= pages.numel(), "padding rows were stored"
    again, pages_again, _ = run()
    assert again == tokens and torch.equal(pages, pages_again)
    monkeypatch.setattr(executor, "replays", False)
    launched, launched_pages, _ = run()
    assert launched == tokens and torch.equal(pages, launched_pages)
    monkeypatch.setattr(executor.prefill_graphs, "in_use", False)
    _, exact_pages, _ = run()
    difference = (pages.float() - exact_pages.float()).norm()
    assert difference < 2e-2 * exact_pages.float().norm()


def test_prefill_graphs_that_store_into_a_peers_pool(engine):
    executor, runner = engine.executor, engine.runner
    pool = executor._kv_pool
    peer = torch.zeros_like(pool[:, :40])
    runner.pool_opened(peer)
    try:
        while runner.has_idle_work:
            runner.do_idle_work()
        assert not peer.any(), "capturing stores nothing"
        for length in LENGTHS:
            plan = prompt_step(length)
            slots = torch.randperm(40 * BLOCK_SIZE)[:length].numpy()
            slots[: length // 3] = -1  # it has the first
            assert executor.prefill_graphs.bucket_of(length, peer) is not None
            peer.zero_()
            with_peer = runner.launch(plan, None, RemoteSlots(peer, slots)).result().token_ids
            pages = pages_of(pool, plan)
            alone = runner.launch(plan, None, None).result().token_ids
            assert with_peer == alone and torch.equal(pages, pages_of(pool, plan))
            lines = peer.transpose(1, 2).flatten(2, 3)
            there = torch.from_numpy(slots[length // 3 :]).to(CUDA)
            assert torch.equal(lines[:, :, there], pages[:, :, length // 3 :])
            assert int(peer.count_nonzero()) == int(pages[:, :, length // 3 :].count_nonzero())
    finally:
        runner.pool_closed(peer)
    assert executor.prefill_graphs.bucket_of(100, peer) is None
    runner.do_idle_work()  # what was dropped is destroyed now
    assert not runner.has_idle_work


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "top_p": 0.9, "top_k": 50}])
def test_overlap_gives_what_the_plain_loop_gives(engine, params):
    """One request at a time: batches are the same then, whatever the loop."""
    for seed in range(3):
        plain = serve(engine.runner, requests(3, seed, **params), depth=1, seqs=1)
        ahead = serve(engine.runner, requests(3, seed, **params), depth=2, seqs=1)
        assert ahead == plain


def test_all_at_once_answers_everyone(engine):
    outputs = serve(engine.runner, requests(14, 7), depth=2)
    assert {len(tokens) for tokens in outputs.values()} == {24}


def logits(model, config, token_ids, chunks, dtype):
    """Of the last token, the prompt prefilled in `chunks`."""
    layout = kv_layout(config, BLOCK_SIZE, 32, "bfloat16")
    pool = torch.zeros(layout.shape, dtype=dtype, device=CUDA)
    table = list(range(31, -1, -1))
    start = 0
    for length in chunks:
        positions = torch.arange(start, start + length, device=CUDA)
        blocks = torch.tensor(table, device=CUDA)[positions // BLOCK_SIZE]
        used = -(-(start + length) // BLOCK_SIZE)
        context = ForwardContext(
            pool,
            blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            [PrefillSegment(0, length, start, table[:used])],
            tables=[torch.tensor(table[:used], dtype=torch.int32, device=CUDA)],
        )
        hidden = model.forward(token_ids[start : start + length], positions, context)
        start += length
    return model.logits(hidden[-1:])[0]


@pytest.mark.parametrize("chunks", [[1000], [700, 300], [512, 100, 388], [130], [7]])
def test_logits_are_as_near_float32_as_torchs_bfloat16(engine, config, chunks):
    """Ours, torch's bfloat16 and torch's float32 on the same weights, which bfloat16 rounds."""
    token_ids = torch.randint(0, VOCAB, (sum(chunks),), device=CUDA)

    def built(dtype):
        return build_model(
            "small",
            config,
            load_format="dummy",
            seed=1,
            dtype=dtype,
            device=CUDA,
            use_kernels=False,
        )

    ours = logits(engine.executor._model, config, token_ids, chunks, torch.bfloat16)
    exact = logits(built(torch.float32), config, token_ids, chunks, torch.float32)
    rounded = logits(built(torch.bfloat16), config, token_ids, chunks, torch.bfloat16)
    assert (ours - exact).norm() < 1.3 * (rounded - exact).norm()


@pytest.mark.parametrize(("context_len", "length"), [(64, 1), (100, 37), (1000, 500)])
def test_chunks_over_gathered_pages(context_len, length):
    q = torch.randn(length, 8 * 128, device=CUDA, dtype=torch.bfloat16)
    pages = torch.randn(40, 2, BLOCK_SIZE, 2, 128, device=CUDA, dtype=torch.bfloat16)
    used = -(-(context_len + length) // BLOCK_SIZE)
    table = torch.randperm(40, device=CUDA)[:used].to(torch.int32)
    out, wanted = torch.empty_like(q), torch.empty_like(q)
    gathered_prefill(q, pages, table, context_len, 128**-0.5, out)
    TorchKernels().paged_prefill(q, pages, table, context_len, 128**-0.5, wanted)
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)


def test_cudnn_plans_cover_every_length(engine):
    """Padded lengths up to a full step are built; padding changes no row."""
    attention = engine.executor._model.backend.attention
    assert attention._plans == set(range(256, 1025, 128)), "cuDNN does not run here"
    buffer = engine.executor._model.backend.qkv_buffer
    buffer.rows(buffer.num_rows).normal_()
    for length in (200, 257, 300, 1000, 1024):
        padded = -(-length // 128) * 128
        out = attention._cudnn(0, length, padded)
        torch.testing.assert_close(out, attention._flash(0, length), atol=2e-2, rtol=2e-2)
    buffer.clear()


def test_the_loop_is_woken_when_a_step_is_done(engine):
    import select

    scheduler = Scheduler(SchedulerConfig(4, 1024, BLOCK_SIZE), BlockManager(NUM_BLOCKS))
    for request in requests(1):
        scheduler.add(request)
    engine.runner.drain_news()
    handle = engine.runner.launch(scheduler.schedule(), None, None)
    assert select.select([engine.runner.fileno()], [], [], 10)[0]
    assert handle.done()
    handle.result()


def test_nothing_is_compiled_in_service(engine):
    import triton

    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(str(what["repr"]))
    try:
        serve(engine.runner, requests(12, 3), depth=2)
        serve(engine.runner, requests(5, 4, temperature=1.0), depth=2)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert compiled == []
