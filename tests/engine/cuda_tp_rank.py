"""One rank of a tensor-parallel test on GPUs: python cuda_tp_rank.py TASK RANK DIRECTORY

Two ranks; rank r on GPU r where there are two, else both on one. A failed assertion is the exit
status. Ranks leave what they computed in DIRECTORY, for the test to compare.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
from model_harness import tiny_config
from triton_harness import ulp_apart

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.clock import monotonic_ns
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.attention import ForwardContext, PrefillSegment
from pdrelay.engine.communicator import connect_ranks
from pdrelay.engine.cuda_engine import build_engine, open_device, prepare_backend
from pdrelay.engine.kernels.triton.norm import add_rms_norm
from pdrelay.engine.models import build_model
from pdrelay.engine.rendezvous import exchange
from pdrelay.engine.startup_clock import StartupClock
from pdrelay.engine.step_executor import StepLimits
from pdrelay.engine.step_input import StepMessage
from pdrelay.engine.tp_link import Follower, Leader
from pdrelay.errors import WorkerLostError
from pdrelay.model.config import kv_layout, parse_model_config

WORLD = 2
BF16 = torch.bfloat16
SIZES = [8 << 10, 64 << 10, 1 << 20, 2 << 20, (2 << 20) + 4096, 32 << 20]  # bytes
BLOCK_SIZE, NUM_BLOCKS = 64, 32
LIMITS = StepLimits(
    max_num_seqs=4, max_num_batched_tokens=512, max_model_len=1024, block_size=BLOCK_SIZE
)
SMALL_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1001,  # ranks get unequal parts
    "max_position_embeddings": 4096,
    "rope_theta": 500_000.0,
}


def connect(rank, directory, device, timeout_s=60.0):
    return connect_ranks(
        rank=rank,
        world_size=WORLD,
        path=f"{directory}/tp",
        timeout_s=timeout_s,
        dtype=BF16,
        device=device,
    )


def meet(rank, directory, name):
    """Wait for the other process, on the host."""
    exchange(f"{directory}/{name}", rank=rank, world_size=WORLD, payload=b"", timeout_s=120)


def part(rank, numel, device, dtype=BF16):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(numel, generator=generator).to(dtype).to(device)


def collectives(rank, directory, device):
    communicator = connect(rank, directory, device)
    for dtype in (BF16, torch.float32):
        for num_bytes in (*SIZES, 6, 8, 1032):
            numel = max(1, num_bytes // dtype.itemsize)
            parts = [part(r, numel, device, dtype) for r in range(WORLD)]
            x = parts[rank].clone()
            assert communicator.all_reduce_(x) is x
            wanted = (parts[0].float() + parts[1].float()).to(dtype)
            assert torch.equal(x, wanted), (dtype, num_bytes)  # two parts: any order is exact
    for rows, width in ((1, 64_128), (3, 501), (5, 8), (300, 64_128)):
        parts = [part(r, rows * width, device).view(rows, width) for r in range(WORLD)]
        gathered = communicator.all_gather_last_dim(parts[rank])
        assert torch.equal(gathered, torch.cat(parts, dim=1)), (rows, width)
    fused_norms(communicator, device)
    counts = communicator.all_gather_last_dim(torch.tensor([[7 + rank]], device=device))
    assert counts.tolist() == [[7, 8]]
    communicator.barrier()
    communicator.close()


def fused_norms(communicator, device):
    """In one kernel as one after the other, but for roundings that another order of the norm's
    sum tips: two bfloat16 steps."""
    for rows, width in ((2, 4096), (64, 4096), (7, 4096), (64, 4096)):
        weight = part(5, width, device)
        x = part(communicator.rank, rows * width, device).view(rows, width)
        residuals = [part(7, rows * width, device).view(rows, width) for _ in range(2)]
        got = communicator.all_reduce_add_rms_norm(x.clone(), residuals[0], weight, 1e-5)
        total = communicator.all_reduce_(x.clone())
        wanted = add_rms_norm(total, residuals[1], weight, 1e-5)
        assert torch.equal(*residuals), (rows, width)
        assert ulp_apart(got, wanted) <= 2, (rows, width)
    assert communicator.all_reduce_add_rms_norm(x[:1], residuals[0][:1], weight, 1e-5) is None
    assert communicator.all_reduce_add_rms_norm(x[:, :64], residuals[0], weight, 1e-5) is None


def graphs(rank, directory, device):
    """What a decode step does: reductions of several sizes one behind the other, and a gather."""
    communicator = connect(rank, directory, device)
    sizes = (4096, 1024, 32 * 4096, 4096, 300 * 4096)  # the last takes NCCL where there is one
    inputs = [torch.zeros(n, dtype=BF16, device=device) for n in sizes]
    outputs = []

    def step():
        outputs[:] = [communicator.all_reduce_(x * 2) for x in inputs]
        outputs.append(communicator.all_gather_last_dim(inputs[0].view(1, -1)))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    for i in range(40):
        for x in inputs:
            x.fill_(i + 3 * rank)
        graph.replay()
        if i % 10 == 3:  # other collectives in between change the parity
            extra = communicator.all_reduce_(torch.full((1024,), 1.0 + rank, device=device))
            assert extra.eq(3.0).all()
        for n, out in zip(sizes, outputs, strict=False):
            assert out.eq(2 * i + 2 * (i + 3)).all(), (i, n)
        row = outputs[-1][0]
        assert row[:4096].eq(i).all() and row[4096:].eq(i + 3).all()
        communicator.check()
    communicator.barrier()
    graph.reset()  # it holds on to NCCL's communicator
    communicator.close()


def lost(rank, directory, device):
    """Rank 1 stays away: rank 0's device goes on after the deadline, and its host learns why."""
    meet(rank, directory, "ready")
    communicator = connect(rank, directory, device, timeout_s=10.0)
    if rank == 0:
        x = torch.ones(4096, dtype=BF16, device=device)
        for _ in range(50):  # waits once, not fifty times
            communicator.all_reduce_(x)
        torch.cuda.synchronize()
        try:
            communicator.check()
        except WorkerLostError:
            meet(rank, directory, "over")
            return
        raise AssertionError("nobody noticed")
    meet(rank, directory, "over")


# ---- tokens


def build(config, communicator, device):
    world_size = communicator.world_size if communicator is not None else 1
    model = build_model(
        "small",
        config,
        load_format="dummy",
        seed=1,
        dtype=BF16,
        device=device,
        communicator=communicator,
    )
    prepare_backend(model, config, LIMITS, world_size)
    layout = kv_layout(config, BLOCK_SIZE, NUM_BLOCKS, "bfloat16", world_size)
    return model, torch.zeros(layout.shape, dtype=BF16, device=device)


def prompts(vocab_size):
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in (3, 70, 300, 601)]


def serve(runner, vocab_size):
    scheduler = Scheduler(
        SchedulerConfig(LIMITS.max_num_seqs, LIMITS.max_num_batched_tokens, BLOCK_SIZE),
        BlockManager(NUM_BLOCKS, enable_prefix_caching=False),
    )
    for i, prompt in enumerate(prompts(vocab_size)):
        params = SamplingParams(max_tokens=16, seed=i, temperature=0.0, ignore_eos=True)
        scheduler.add(
            Request(
                EngineRequest(
                    request_id=str(i),
                    prompt_token_ids=pack_ids(prompt),
                    params=params,
                    arrived_ns=0,
                )
            )
        )
    outputs, in_flight = {}, []
    while scheduler.has_work or in_flight:
        if len(in_flight) < 2 and scheduler.has_work:
            plan = scheduler.schedule()
            if plan.chunks:
                in_flight.append((plan, runner.launch(plan, None, None)))
                continue
        plan, handle = in_flight.pop(0)
        for token in scheduler.update(plan, handle.result().token_ids):
            outputs.setdefault(token.request.request_id, []).append(token.token_id)
    return [outputs[str(i)] for i in range(len(outputs))]


def one_gpu_logits(model, pool, token_ids, device):
    """float32 [T, vocab] of every position."""
    length = len(token_ids)
    table = list(range(-(-length // BLOCK_SIZE)))
    positions = torch.arange(length, device=device)
    context = ForwardContext(
        pool,
        positions,
        [PrefillSegment(0, length, 0, table)],
        tables=[torch.tensor(table, dtype=torch.int32, device=device)],
    )
    hidden = model.forward(torch.tensor(token_ids, device=device), positions, context)
    return model.logits(hidden)


def check_tokens(config, outputs, device):
    """Every token that two ranks chose is, on one GPU, the best one or within bfloat16's noise of
    it: 2^-5 of the row's greatest magnitude, a few roundings of a sum over layers."""
    model, pool = build(config, None, device)
    model.backend.qkv_buffer.reserve(1024)
    same = total = 0
    for prompt, tokens in zip(prompts(config.vocab_size), outputs, strict=True):
        logits = one_gpu_logits(model, pool, prompt + tokens[:-1], device)[len(prompt) - 1 :]
        chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        short = (logits.amax(dim=1) - chosen) / logits.abs().amax(dim=1)
        assert short.max() < 2**-5, short.tolist()
        same += int((short == 0).sum())
        total += len(tokens)
    assert same >= 0.8 * total, (same, total)


def tokens(rank, directory, device, config):
    path = f"{directory}/steps"
    leader = Leader(path, WORLD - 1, 60.0, StepMessage) if rank == 0 else None
    communicator = connect(rank, directory, device)
    model, pool = build(config, communicator, device)
    engine = build_engine(model, pool, LIMITS, StartupClock(monotonic_ns))
    communicator.barrier()
    if leader is None:
        engine.follower.check = communicator.check
        follower = Follower(path, StepMessage)
        while (step := follower.next_batch()) is not None:
            engine.follower.run(step)
    else:
        leader.accept()
        engine.runner.broadcast = leader.broadcast
        engine.runner.check = communicator.check
        outputs = serve(engine.runner, config.vocab_size)
        leader.close()
    communicator.barrier()
    torch.cuda.synchronize()
    np.save(f"{directory}/sampled.{rank}.npy", engine.executor.sampled.cpu().numpy())
    np.save(f"{directory}/pool.{rank}.npy", pool.float().sum(dim=(2, 3, 4, 5)).cpu().numpy())
    communicator.close()
    engine.accelerator.close()
    if rank == 0:
        check_tokens(config, outputs, device)


def main():
    task, rank, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    device = open_device(f"cuda:{rank % torch.cuda.device_count()}")
    if task in ("tiny", "small"):
        shape = tiny_config() if task == "tiny" else parse_model_config(SMALL_LLAMA, "small")
        tokens(rank, directory, device, shape)
    else:
        {"collectives": collectives, "graphs": graphs, "lost": lost}[task](rank, directory, device)


if __name__ == "__main__":
    main()
