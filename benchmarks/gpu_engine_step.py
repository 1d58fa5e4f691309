"""Time of one step of the CUDA engine beside its floor: decode by batch and context, prefill by
length, and start-up by phase.

    python benchmarks/gpu_engine_step.py [--model llama-3.1-8b] [--only decode uneven] [--profile]
    python benchmarks/gpu_engine_step.py --model tiny --device cpu      (a rehearsal, no GPU)

Decode: `graph` is the device's time of a step (CUDA events around many), `step` the wall time of
a step in a pipeline of two, packing and reading included, as the loop runs it. Its floor is
weights and KV at the read rate measured here. Prefill: `device` and `wall` of one prompt from plan
to token, `launch` until the host had queued it. Its floor is FLOP at the GEMM rate measured here.
`graph`: as served, by a CUDA graph; `store`: the same, into a second pool too, as for a decode
worker; `eager`: launched kernel by kernel.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import EngineRequest
from pdrelay.core.rank_config import RankConfig, Role
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Chunk, SchedulerConfig, StepPlan
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.accelerator import Accelerator, HostAccelerator
from pdrelay.engine.attention import AttentionShape
from pdrelay.engine.backend import cuda_backend
from pdrelay.engine.communicator import SingleCommunicator
from pdrelay.engine.cuda_engine import build_engine, prepare_backend, size_pool
from pdrelay.engine.cuda_runner import CudaRunner
from pdrelay.engine.kernels.gpu import TorchKernels
from pdrelay.engine.models import build_model
from pdrelay.engine.startup_clock import StartupClock
from pdrelay.engine.step import RemoteSlots
from pdrelay.engine.step_executor import StepExecutor, StepLimits
from pdrelay.engine.warmup import warm_up
from pdrelay.model.config import ModelConfig, kv_layout, load_model_config

GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0, ignore_eos=True)
BATCHES = (1, 8, 32, 64, 128)
SECTIONS = ("check", "decode", "uneven", "prefill", "variants")
CONTEXTS = (512, 2048, 8192)
CHUNKS = ((2048, 6144), (256, 2048))  # (length, context)
UNEVEN: dict[str, Sequence[int]] = {
    "16x900": [900] * 16,
    "16x900+64": [*[900] * 16, 64],  # the next bucket alone
    "16x900+8192": [*[900] * 16, 8192],
    "16x900+2x8192": [*[900] * 16, 8192, 8192],
    "7x900+8192": [*[900] * 7, 8192],
    "31x640+8192": [*[640] * 31, 8192],
}
LENGTHS = (32, 128, 200, 256, 512, 700, 1024, 2048, 4096, 8192)


class Bench:
    """An engine of one shape, and what its steps cost."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.on_gpu = options.device != "cpu"
        self.device = torch.device(options.device)
        self.config = load_model_config(options.model)
        self.limits = StepLimits(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=min(options.max_model_len, self.config.max_position_embeddings),
            block_size=64,
        )
        self.startup = StartupClock(monotonic_ns)
        self.layout: KVLayout
        self.runner, self.executor, self.accelerator = self._build(options)
        self.compiled: list[str] = []

    def _build(self, options: argparse.Namespace) -> tuple[CudaRunner, StepExecutor, Accelerator]:
        config, limits = self.config, self.limits
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        backend = None
        if self.on_gpu:
            with self.startup.phase("CUDA context"):
                torch.cuda.set_device(self.device)
                torch.zeros(1, device=self.device)
        else:
            shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)
            backend = cuda_backend(shape, dtype, self.device, TorchKernels())
        with self.startup.phase("weights"):
            model = build_model(
                options.model,
                config,
                load_format="dummy",
                dtype=dtype,
                device=self.device,
                backend=backend,
            )
            self.synchronize()
        self.model = model
        with self.startup.phase("memory profile"):
            prepare_backend(model, config, limits)
            num_blocks = self._num_blocks(options)
        name = str(dtype).removeprefix("torch.")
        self.layout = kv_layout(config, 64, num_blocks, name)
        pool = torch.zeros(self.layout.shape, dtype=dtype, device=self.device)
        if self.on_gpu:
            engine = build_engine(model, pool, limits, self.startup)
            runner, executor, accelerator = engine.runner, engine.executor, engine.accelerator
        else:
            accelerator = HostAccelerator()
            executor = StepExecutor(model, pool, accelerator, limits)
            executor.capture_prefill_graphs()
            executor.capture_graphs()
            runner = CudaRunner(executor, accelerator, limits)
        with self.startup.phase("warm-up"):
            warm_up(
                runner,
                SchedulerConfig(limits.max_num_seqs, limits.max_num_batched_tokens, 64),
                num_blocks=num_blocks,
                vocab_size=config.vocab_size,
                max_model_len=limits.max_model_len,
                on_gpu=self.on_gpu,
            )
            self.synchronize()
        return runner, executor, accelerator

    def _num_blocks(self, options: argparse.Namespace) -> int:
        if not self.on_gpu:
            return 64
        rank = RankConfig(
            instance="bench",
            instance_index=0,
            incarnation=0,
            role=Role.BOTH,
            rank=0,
            world_size=1,
            run_dir="",
            model=options.model,
            load_format="dummy",
            device=options.device,
            dtype="bfloat16",
            seed=0,
            max_model_len=self.limits.max_model_len,
            block_size=64,
            num_blocks=0,
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            enable_prefix_caching=False,
        )
        one_block = kv_layout(self.config, 64, 1, "bfloat16")
        return size_pool(rank, self.config, self.model, SingleCommunicator(), one_block)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def device_ms(self, work: Callable[[], object], repeats: int) -> float:
        """Mean device time of `work`, queued `repeats` times."""
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            return 1e3 * (time.perf_counter() - start) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    # ---- plans

    def decode_plan(self, batch: int, context: int) -> StepPlan | None:
        """One token for each of `batch` requests; None when the pool has not so many blocks."""
        return self.uneven_plan([context] * batch)

    def uneven_plan(self, contexts: Sequence[int]) -> StepPlan | None:
        """One token for a request behind each of `contexts` less one; None as above."""
        widths = [-(-context // 64) for context in contexts]
        if sum(widths) > self.layout.num_blocks:
            return None
        blocks = torch.randperm(self.layout.num_blocks)[: sum(widths)].split(widths)
        chunks = []
        for i, context in enumerate(contexts):
            request = _request(f"d{len(contexts)}-{context}-{i}", context - 1)
            request.token_ids.append(i)
            request.block_table = blocks[i].tolist()
            chunks.append(Chunk(request, context - 1, 1, True, False))
        return StepPlan(chunks=chunks)

    def prefill_plan(self, length: int, context: int = 0) -> StepPlan:
        """A prompt's `length` tokens behind `context` cached ones."""
        request = _request(f"p{length}-{context}", context + length)
        width = -(-(context + length) // 64)
        request.block_table = torch.randperm(self.layout.num_blocks)[:width].tolist()
        return StepPlan(chunks=[Chunk(request, context, length, True, False)])

    # ---- floors

    def read_rate(self) -> float:
        """Bytes/s of a read-only stream."""
        data = torch.ones(1 << (31 if self.on_gpu else 20), dtype=torch.int32, device=self.device)
        out = torch.zeros(1, device=self.device)
        if self.on_gpu:
            from read_stream import read_stream
        else:

            def read_stream(data: torch.Tensor, out: torch.Tensor) -> None:
                out.copy_(data.amax())

        best = min(self.device_ms(lambda: read_stream(data, out), 3) for _ in range(3))
        return data.numel() * data.itemsize / (best / 1e3)

    def gemm_rate(self) -> float:
        """FLOP/s of a square GEMM of random numbers."""
        size = 8192 if self.on_gpu else 256
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        best = min(self.device_ms(lambda: torch.mm(a, b), 5) for _ in range(3))
        return 2 * size**3 / (best / 1e3)

    # ---- measurements

    def decode(self, plan: StepPlan, repeats: int) -> tuple[float, float]:
        """(device, pipeline) ms a step."""
        self.runner.launch(plan, None, None).result()
        graph = self.executor._graphs[self.executor.bucket_of(len(plan.chunks))]
        device = self.device_ms(graph.replay, repeats)
        self.synchronize()
        start = time.perf_counter()
        waiting = self.runner.launch(plan, None, None)
        for _ in range(repeats):
            following = self.runner.launch(plan, None, None)
            waiting.result()
            waiting = following
        waiting.result()
        return device, 1e3 * (time.perf_counter() - start) / (repeats + 1)

    def open_second_pool(self) -> float:
        """Make `second_pool` and its graphs. Returns the ms that each graph took."""
        num_blocks = min(64, self.layout.num_blocks)
        shape = (self.layout.shape[0], num_blocks, *self.layout.shape[2:])
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.second_pool = torch.zeros(shape, dtype=dtype, device=self.device)
        self.runner.pool_opened(self.second_pool)
        start = time.perf_counter()
        while self.runner.has_idle_work:
            self.runner.do_idle_work()
        self.synchronize()
        graphs = len(self.executor.prefill_graphs.buckets)
        return 1e3 * (time.perf_counter() - start) / graphs

    def remote(self, plan: StepPlan) -> RemoteSlots:
        """Every row into the second pool, as far as it reaches."""
        num_rows = sum(chunk.length for chunk in plan.chunks)
        return RemoteSlots(self.second_pool, np.arange(num_rows) % (self.second_pool.shape[1] * 64))

    def prefill(
        self, plan: StepPlan, repeats: int, remote: RemoteSlots | None = None
    ) -> tuple[float, float, float]:
        """Medians (device, wall, launch) ms of one prompt alone."""
        device, wall, launch = [], [], []
        for _ in range(repeats + 1):
            self.synchronize()
            start = time.perf_counter()
            with self.timed() as elapsed:
                handle = self.runner.launch(plan, None, remote)
                launch.append(1e3 * (time.perf_counter() - start))
            handle.result()
            wall.append(1e3 * (time.perf_counter() - start))
            device.append(elapsed())
        return tuple(statistics.median(values[1:]) for values in (device, wall, launch))

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Yields what tells the device's ms of the block, once it is done."""
        if not self.on_gpu:
            start = time.perf_counter()
            yield lambda: 1e3 * (time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def elapsed() -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        begin.record()
        yield elapsed
        end.record()

    # ---- checks

    def check_graphs(self) -> None:
        """Graphs choose what the same step chooses eagerly."""
        context = 100 if self.on_gpu else 60
        for batch in (1, 3, 8):
            plan = self.decode_plan(batch, context)
            assert plan is not None
            graph = self.runner.launch(plan, None, None).result().token_ids
            self.executor.replays = False
            eager = self.runner.launch(plan, None, None).result().token_ids
            self.executor.replays = True
            print(f"  batch {batch}: {'equal' if graph == eager else f'{graph} != {eager}'}")
        for bucket in self.executor.prefill_graphs.buckets:
            plan = self.prefill_plan(bucket - 1)
            graph = self.runner.launch(plan, None, None).result().token_ids
            self.executor.replays = False
            eager = self.runner.launch(plan, None, None).result().token_ids
            self.executor.replays = True
            if graph != eager:
                print(f"  prompt of {bucket - 1}: {graph} != {eager}")
        print(f"  prompts to {self.executor.prefill_graphs.buckets[-1]} compared")

    def watch_compiler(self) -> None:
        if self.on_gpu:
            import triton

            triton.knobs.runtime.jit_post_compile_hook = lambda **what: self.compiled.append(
                str(what.get("repr"))
            )


def _request(name: str, num_tokens: int) -> Request:
    tokens = torch.randint(0, 250, (num_tokens,)).tolist()
    return Request(
        EngineRequest(
            request_id=name, prompt_token_ids=pack_ids(tokens), params=GREEDY, arrived_ns=0
        )
    )


def matmul_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the layers' projections, and of the lm_head."""
    width = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = config.hidden_size * (width + 3 * config.intermediate_size)
    return config.num_layers * layer, config.hidden_size * config.vocab_size


def decode_floor_ms(bench: Bench, num_keys: int, read_rate: float) -> float:
    """Of a step that attends to so many keys in all: its weights and its KV are read once."""
    itemsize = 2 if bench.on_gpu else 4
    num_bytes = sum(matmul_parameters(bench.config)) * itemsize
    return 1e3 * (num_bytes + num_keys * bench.layout.bytes_per_token) / read_rate


def print_decode(bench: Bench, read_rate: float, repeats: int) -> None:
    print("\ndecode         ctx   graph ms    step ms   floor ms   graph/floor")
    batches = [b for b in BATCHES if b <= bench.limits.max_num_seqs]
    contexts = [c for c in CONTEXTS if c <= bench.limits.max_model_len]
    for context in contexts:
        for batch in batches:
            plan = bench.decode_plan(batch, context)
            if plan is None:
                print(f"B={batch:<4} {context:>9}   (the pool holds fewer blocks)")
                continue
            floor = decode_floor_ms(bench, batch * context, read_rate)
            graph, step = bench.decode(plan, repeats)
            print(
                f"B={batch:<4} {context:>9} {graph:>10.3f} {step:>10.3f} {floor:>10.3f}"
                f" {graph / floor:>10.2f}"
            )


def print_uneven(bench: Bench, read_rate: float, repeats: int) -> None:
    """What one long row costs its batch: the steps of the interference experiment."""
    print("\nuneven rows           graph ms    step ms   floor ms   graph/floor")
    for name, contexts in UNEVEN.items():
        if len(contexts) > bench.limits.max_num_seqs:
            continue
        plan = bench.uneven_plan([min(n, bench.limits.max_model_len) for n in contexts])
        if plan is None:
            print(f"{name:<20} (the pool holds fewer blocks)")
            continue
        floor = decode_floor_ms(bench, sum(contexts), read_rate)
        graph, step = bench.decode(plan, repeats)
        print(f"{name:<18} {graph:>10.3f} {step:>10.3f} {floor:>10.3f} {graph / floor:>10.2f}")


def print_prefill(bench: Bench, gemm_rate: float, repeats: int) -> None:
    layers, head = matmul_parameters(bench.config)
    config = bench.config
    graphs = bench.executor.prefill_graphs
    print(f"\ngraphs of a peer's pool: {bench.open_second_pool():.0f} ms each")
    print("prefill           device ms    wall ms  launch ms   floor ms   wall/floor")
    most = min(bench.limits.max_num_batched_tokens, bench.layout.num_blocks * 64)
    cases = [(length, 0) for length in LENGTHS if length <= most]
    cases += [(length, context) for length, context in CHUNKS if length + context <= most]
    for length, context in cases:
        # Causal: a chunk of T behind C tokens multiplies T * C + T * T / 2 pairs, twice (QK, PV).
        pairs = length * context + length * length / 2
        attention = config.num_layers * 4 * config.num_heads * config.head_dim * pairs
        floor = 1e3 * (2 * layers * length + 2 * head + attention) / gemm_rate
        plan = bench.prefill_plan(length, context)
        has_graph = context == 0 and graphs.bucket_of(length, None) is not None
        for kind in ("graph", "store", "eager") if has_graph else ("eager",):
            graphs.in_use = kind != "eager"
            remote = bench.remote(plan) if kind == "store" else None
            device, wall, launch = bench.prefill(plan, repeats, remote)
            label = f"T={length}" + (f"+{context}" if context else "")
            print(
                f"{label:<11} {kind:<5} {device:>9.3f} {wall:>10.3f} {launch:>10.3f} {floor:>10.3f}"
                f" {wall / floor:>10.2f}"
            )
        graphs.in_use = True


def print_variants(bench: Bench, repeats: int) -> None:
    """Small batches with and without own linear kernels and programmatic dependent launch."""
    backend = bench.model.backend
    ops, kernels = backend.ops, backend.kernels
    kept = ops.small_rows, kernels.pdl
    batches = [b for b in (1, 4, 8, 16, 32, 64) if b <= bench.limits.max_num_seqs]
    print("\nvariants (context 512)   " + "".join(f"  B={b:<2} ms" for b in batches))
    for small_rows in (0, 1, 8, 64):
        for pdl in (False, True):
            ops.small_rows, kernels.pdl = small_rows, pdl
            bench.executor.capture_graphs(batches)
            times = []
            for batch in batches:
                plan = bench.decode_plan(batch, 512)
                times.append(bench.decode(plan, repeats)[0] if plan else float("nan"))
            label = f"linear_small <= {small_rows}, pdl {'on' if pdl else 'off'}"
            print(f"{label:<25}" + "".join(f"{ms:>9.3f}" for ms in times))
    ops.small_rows, kernels.pdl = kept
    bench.executor.capture_graphs(batches)
    print_decode_variants(bench, repeats)
    print("\nchunks behind a prefix   2,048+6,144   256+2,048   (wall ms)")
    if bench.limits.max_num_batched_tokens < 8192:
        return
    kept_gathers = kernels.gathers_chunks
    for gathers in (True, False):
        kernels.gathers_chunks = gathers
        walls = [bench.prefill(bench.prefill_plan(*case), 3)[1] for case in CHUNKS]
        label = "FlashAttention, gathered" if gathers else "own kernel, in place"
        print(f"{label:<24}", *(f"{ms:>10.3f}" for ms in walls))
    kernels.gathers_chunks = kept_gathers


def print_decode_variants(bench: Bench, repeats: int) -> None:
    """The decode kernel's pipeline depth and launch, in the whole step."""
    kernels, batches = bench.model.backend.kernels, (1, 8, 32, 64)
    if bench.limits.max_num_seqs < batches[-1]:
        return
    print("\ndecode kernel (context 640)  " + "  ".join(f"B={b} ms" for b in batches))
    for depth in (None, 1, 2, 3, 4):
        for pdl in (True, False):
            kernels.decode_depth, kernels.decode_pdl = depth, pdl
            bench.executor.capture_graphs(batches)
            plans = [bench.decode_plan(batch, 640) for batch in batches]
            times = [bench.decode(plan, repeats)[0] if plan else float("nan") for plan in plans]
            label = f"depth {depth or 'by rule'}, pdl {'on' if pdl else 'off'}"
            print(f"{label:<26}", *(f"{ms:>8.3f}" for ms in times))
    kernels.decode_depth = kernels.decode_pdl = None
    bench.executor.capture_graphs(batches)


def print_profile(bench: Bench) -> None:
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    by = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    decode = bench.decode_plan(1, min(512, bench.limits.max_model_len))
    prefill = bench.prefill_plan(min(512, bench.limits.max_num_batched_tokens))
    for name, plan in (("decode, batch 1", decode), ("prefill, 512", prefill)):
        assert plan is not None
        bench.runner.launch(plan, None, None).result()
        with profile(activities=kinds) as profiled:
            bench.runner.launch(plan, None, None).result()
            bench.synchronize()
        print(f"\nprofile: {name}")
        table = profiled.key_averages().table(
            sort_by=by, row_limit=24, max_name_column_width=60, max_src_column_width=1
        )
        print(table)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--profile", action="store_true", help="the kernels of two steps, too")
    options = parser.parse_args()
    begun = time.perf_counter()
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.on_gpu else "CPU"
    print(f"{options.model} on {name}, torch {torch.__version__}; {bench.layout.num_blocks} blocks")
    print(f"start-up: {bench.startup}")
    bench.watch_compiler()
    if "check" in options.only:
        print("graph against eager:")
        bench.check_graphs()
    read_rate, gemm_rate = bench.read_rate(), bench.gemm_rate()
    print(f"read {read_rate / 1e12:.2f} TB/s, GEMM {gemm_rate / 1e12:.0f} TFLOP/s")
    if "decode" in options.only:
        print_decode(bench, read_rate, options.repeats)
    if "uneven" in options.only:
        print_uneven(bench, read_rate, options.repeats)
    if "prefill" in options.only:
        print_prefill(bench, gemm_rate, max(3, options.repeats // 4))
    print(f"\ncompiled after warm-up: {bench.compiled or 'nothing'}")
    if "variants" in options.only and bench.on_gpu:
        print_variants(bench, options.repeats)
    if options.profile:
        print_profile(bench)
    bench.accelerator.close()
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
