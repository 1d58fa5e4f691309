"""Every Triton kernel: checked against torch, timed over its variants, beside the memory's limit.

    python benchmarks/gpu_kernels.py [--only linear,decode] [--seconds 110] [--out kernels.json]
    python benchmarks/gpu_kernels.py --interpret-smoke  # the same code on a CPU, tiny, untimed

Shapes of Llama-3.1-8B. Times are medians of CUDA graph replays over weights, or pages, that take
turns and together exceed the L2; the gap to the next dependent kernel is in them. A variant that
fails to compile or is wrong prints a line and the rest goes on.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SMOKE = "--interpret-smoke" in sys.argv
COMPILING = "--compile-shard" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import torch
import triton
import triton.language as tl

from pdrelay.engine.attention import AttentionShape
from pdrelay.engine.attention.fa3 import Fa3Paged, load_fa3
from pdrelay.engine.kernels.decode_cut import DecodeCut
from pdrelay.engine.kernels.gpu import gathered_prefill
from pdrelay.engine.kernels.triton.activation import silu_mul
from pdrelay.engine.kernels.triton.attention_decode import (
    DecodeWorkspace,
    paged_decode,
    split_rule,
)
from pdrelay.engine.kernels.triton.attention_prefill import paged_prefill
from pdrelay.engine.kernels.triton.decode_parts import HEADER, extra_parts
from pdrelay.engine.kernels.triton.launch import num_sms
from pdrelay.engine.kernels.triton.linear_small import (
    LinearTuning,
    default_tuning,
    gate_up_silu,
    linear_small,
    norm_gate_up_silu,
    norm_linear,
)
from pdrelay.engine.kernels.triton.norm import add_rms_norm
from pdrelay.engine.kernels.triton.rope import rope_write_kv
from pdrelay.engine.kernels.triton.sample import ArgmaxWorkspace, argmax_rows
from pdrelay.engine.kernels.triton.split_rule import (
    SHARES_PER_SM,
    least_part,
    most_extra_parts,
)
from pdrelay.engine.sampler import draw
from pdrelay.errors import LaunchError

DEVICE = torch.device("cpu" if SMOKE or COMPILING else "cuda")
BF16 = torch.bfloat16
EPS = 1e-5
HEADS, KV_HEADS, DIM, BLOCK = (2, 1, 16, 16) if SMOKE else (32, 8, 128, 64)
HIDDEN, FFN, VOCAB, LAYERS = (32, 48, 72, 2) if SMOKE else (4096, 14336, 128256, 32)
QKV = (HEADS + 2 * KV_HEADS) * DIM
SHAPES = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HEADS * DIM),
    "gate_up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
    "lm_head": (VOCAB, HIDDEN),
}
ROTATED_BYTES = 1 << 14 if SMOKE else 600 << 20
WRONG = 2e-2  # relative error beyond which a bfloat16 result is called wrong
Call = Callable[[], object]


@dataclass
class Result:
    section: str
    case: str
    variant: str
    us: float
    bytes: float = 0.0
    flop: float = 0.0
    error: float = 0.0


@dataclass
class Bench:
    """What was measured, and how much time is left."""

    seconds: float
    shard: int = 0
    shards: int = 1
    limit: float = 0.0  # bytes/s of a read-only stream here
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    count: int = 0

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def try_variant(
        self,
        section: str,
        case: str,
        variant: str,
        calls: list[Call],
        *,
        bytes: float = 0.0,
        flop: float = 0.0,
        error: Callable[[], float] | None = None,
    ) -> None:
        """Time `calls` (one replay makes them all), unless it fails, is wrong or time is up."""
        self.count += 1
        if COMPILING:
            if self.count % self.shards == self.shard and variant[0] != "*":
                with contextlib.suppress(Exception):  # the timing process will meet it again
                    calls[0]()
            return
        if self.left() < 0 and not SMOKE:
            return
        try:
            wrong = error() if error is not None else 0.0
            if not wrong < WRONG:
                raise ValueError(f"relative error {wrong:.1e}")
            us = replay_us(calls)
        except Exception as problem:
            text = f"{section} {case} {variant}: {type(problem).__name__} {problem}"
            self.failures.append(" ".join(text.split())[:200])
            if not SMOKE:
                torch.cuda.synchronize()
            return
        self.results.append(Result(section, case, variant, us, bytes, flop, wrong))

    def table(self, section: str, most: int = 4) -> None:
        """The fastest variants of each case, and those of others (cuBLAS, torch) always."""
        mine = [r for r in self.results if r.section == section]
        for case in dict.fromkeys(r.case for r in mine):
            ranked = sorted((r for r in mine if r.case == case), key=lambda r: r.us)
            shown = ranked[:most] + [r for r in ranked[most:] if r.variant[0] == "*"]
            print(f"{section} {case}: " + " | ".join(self._cell(r) for r in shown), flush=True)

    def _cell(self, r: Result) -> str:
        if SMOKE:
            return f"{r.variant} ok"
        text = f"{r.variant} {r.us:.1f}us"
        if r.bytes:
            rate = r.bytes / r.us * 1e6
            text += f" {rate / 1e9:.0f}GB/s"
            text += f" {rate / self.limit:.0%}" if self.limit else ""
        if r.flop:
            text += f" {r.flop / r.us / 1e6:.0f}TF/s"
        return text

    def best(self, section: str, case: str) -> Result | None:
        mine = [r for r in self.results if (r.section, r.case) == (section, case)]
        return min((r for r in mine if r.variant[0] != "*"), key=lambda r: r.us, default=None)


def replay_us(calls: list[Call], replays: int = 5) -> float:
    """Median microseconds of one of `calls` inside a CUDA graph that makes them all, in order."""
    calls[0]()
    if SMOKE:
        return 0.0  # nothing was timed
    calls[-1]()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        graph.replay()  # keeps the device busy while the host records
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def randn(*shape: int, std: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    values = torch.empty(shape, dtype=dtype, device=DEVICE)
    return values if COMPILING else values.normal_(0, std)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    a, w = actual.float(), wanted.float()
    return float((a - w).norm() / w.norm())


def copies(numel: int) -> int:
    return max(1, min(256, -(-ROTATED_BYTES // (2 * numel))))


class Pool:
    """One buffer of random weights that every shape is cut from, so that memory stays small."""

    def __init__(self) -> None:
        most = max(n * k for n, k in SHAPES.values())
        self._flat = randn(max(most, ROTATED_BYTES // 2 + most), std=HIDDEN**-0.5)

    def weights(self, n: int, k: int) -> list[torch.Tensor]:
        fit = min(copies(n * k), self._flat.numel() // (n * k))
        return [self._flat[i * n * k : (i + 1) * n * k].view(n, k) for i in range(fit)]


@triton.jit
def _read(x_ptr: tl.tensor, out_ptr: tl.tensor, LENGTH: tl.constexpr, STEPS: tl.constexpr) -> None:
    first = tl.program_id(0).to(tl.int64) * (LENGTH * STEPS)
    offsets = first + tl.arange(0, LENGTH)
    total = tl.zeros([LENGTH], tl.float32)
    for i in tl.static_range(STEPS):
        total += tl.load(x_ptr + offsets + i * LENGTH)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def bench_read(bench: Bench) -> None:
    """The limit that other figures are shares of."""
    numel = 1 << 14 if SMOKE else 1 << 29
    x = randn(numel, dtype=torch.float32)
    for block, steps, warps in ((2048, 8, 8), (1024, 16, 4), (4096, 4, 8)):
        out = torch.empty(numel // (block * steps), dtype=torch.float32, device=DEVICE)
        launch = _read[(out.numel(),)]
        call = functools.partial(launch, x, out, LENGTH=block, STEPS=steps, num_warps=warps)
        bench.try_variant("read", "stream", f"{block}x{steps}", [call], bytes=numel * 4.0)
    best = bench.best("read", "stream")
    bench.limit = best.bytes / best.us * 1e6 if best is not None and not SMOKE else 0.0


def vector_variants(out_features: int, in_features: int) -> Iterator[LinearTuning]:
    if SMOKE:
        yield LinearTuning("vector", 16, 32, 1)
        return
    grid = [
        (8, 4096, 8),
        (4, 4096, 8),
        (16, 2048, 8),
        (8, 2048, 8),
        (4, 2048, 8),
        (16, 1024, 4),
        (8, 1024, 4),
        (4, 1024, 4),
        (8, 512, 2),
        (16, 512, 4),
    ]
    for features, columns, warps in grid:
        if columns > in_features or in_features % columns:
            continue
        yield LinearTuning("vector", features, columns, warps)
    yield LinearTuning("vector", 8, 2048, 8, prefetch=True)
    yield LinearTuning("vector", 4, 1024, 4, prefetch=True)


def dot_variants(rows: int) -> Iterator[LinearTuning]:
    if SMOKE:
        yield LinearTuning("dot", 16, 32, 4, 2)
        return
    grid = [(32, 256, 4, 4), (32, 256, 4, 6), (16, 512, 4, 4), (16, 256, 2, 6), (64, 256, 4, 4)]
    grid += [(32, 512, 4, 4), (64, 128, 4, 6)]
    if rows > 16:
        grid = [(32, 256, 4, 4), (32, 128, 4, 6), (64, 128, 4, 6), (64, 128, 8, 6), (64, 256, 8, 3)]
        grid += [(128, 128, 8, 4), (32, 256, 8, 4)]
    for features, columns, warps, stages in grid if rows > 1 else grid[:3]:
        yield LinearTuning("dot", features, columns, warps, stages)


def label(tuning: LinearTuning) -> str:
    stages = f"s{tuning.stages}" if tuning.kernel == "dot" else ""
    prefetch = "+l2" if tuning.prefetch else ""
    return f"{tuning.kernel[0]}{tuning.features}x{tuning.columns}w{tuning.warps}{stages}{prefetch}"


def bench_linear(bench: Bench) -> None:
    """Plain layers by M; every variant with PDL, the default also without."""
    pool = Pool()
    for rows, (name, (n, k)) in itertools.product((1, 8, 32, 64), SHAPES.items()):
        x, out = randn(rows, k), torch.empty(rows, n, dtype=BF16, device=DEVICE)
        weights = pool.weights(n, k)
        variants = [*dot_variants(rows)]
        if rows == 1:
            variants += vector_variants(n, k)
        case, size = f"M{rows} {name}", 2.0 * n * k
        cublas = [functools.partial(torch.mm, x, w.T, out=out) for w in weights]
        bench.try_variant("linear", case, "*cublas", cublas, bytes=size)
        wanted = functools.cache(functools.partial(torch.mm, x, weights[0].T))
        default = default_tuning(rows, n, k)
        for tuning in dict.fromkeys([default, *variants]):
            for pdl in (True, False) if tuning == default else (True,):
                calls: list[Call] = [
                    functools.partial(linear_small, x, w, out=out, tuning=tuning, pdl=pdl)
                    for w in weights
                ]
                variant = ("=" if tuning == default else "") + label(tuning)
                bench.try_variant(
                    "linear",
                    case,
                    variant + ("" if pdl else "-nopdl"),
                    calls,
                    bytes=size,
                    error=checked(calls[0], out, wanted),
                )


def checked(
    call: Call, out: torch.Tensor, wanted: Callable[[], torch.Tensor]
) -> Callable[[], float]:
    """Runs `call` into a poisoned `out`."""

    def error() -> float:
        out.fill_(torch.nan)
        call()
        return relative_error(out, wanted())

    return error


def bench_gate_up(bench: Bench) -> None:
    """The gate_up layer with SiLU in it, several rows, beside cuBLAS and an activation kernel."""
    pool = Pool()
    n, k = SHAPES["gate_up"]
    weights = pool.weights(n, k)
    for rows in (2, 8, 16, 32, 64):
        x, out = randn(rows, k), torch.empty(rows, n // 2, dtype=BF16, device=DEVICE)
        case, size = f"M{rows} gate_up+silu", 2.0 * n * k

        def separate(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            return silu_mul(torch.mm(x, w.T), out, pdl=True)

        apart: list[Call] = [functools.partial(separate, x, w, out) for w in weights]
        bench.try_variant("gate_up", case, "*cublas, silu", apart, bytes=size)
        wanted = functools.cache(functools.partial(separate, x, weights[0], torch.empty_like(out)))
        default = default_tuning(rows, n // 2, k, paired=True)
        for tuning in dict.fromkeys([default, *paired_variants()]):
            calls: list[Call] = [
                functools.partial(gate_up_silu, x, w, out, tuning=tuning, pdl=True) for w in weights
            ]
            variant = ("=" if tuning == default else "") + label(tuning)
            error = checked(calls[0], out, wanted)
            bench.try_variant("gate_up", case, variant, calls, bytes=size, error=error)


def paired_variants() -> Iterator[LinearTuning]:
    if SMOKE:
        yield LinearTuning("dot", 16, 32, 4, 2)
        return
    grid = [(64, 256, 8, 3), (64, 128, 4, 4), (64, 128, 8, 4), (32, 256, 4, 4), (32, 128, 4, 6)]
    for features, columns, warps, stages in grid:
        yield LinearTuning("dot", features, columns, warps, stages)


def bench_fused(bench: Bench) -> None:
    """RMSNorm in front (and SiLU behind) of one row's layers."""
    pool = Pool()
    x, residual, gain = randn(1, HIDDEN), randn(1, HIDDEN), randn(HIDDEN)
    residual_out = torch.empty_like(residual)
    for name, silu in (("qkv", False), ("gate_up", True)):
        n, k = SHAPES[name]
        weights = pool.weights(n, k)
        out = torch.empty(1, n // 2 if silu else n, dtype=BF16, device=DEVICE)
        wanted = functools.cache(
            functools.partial(fused_reference, x + residual, gain, weights[0], silu)
        )
        for tuning in vector_variants(n, k):
            if silu:
                tuning = halved(tuning)
            if silu:
                fused = functools.partial(norm_gate_up_silu, residual_out=residual_out)
            else:
                fused = functools.partial(norm_linear, bias=None, residual_out=residual_out)
            calls: list[Call] = [
                functools.partial(
                    fused, x, residual, gain, EPS, w, out=out, tuning=tuning, pdl=True
                )
                for w in weights
            ]
            bench.try_variant(
                "fused",
                f"M1 norm+{name}" + ("+silu" if silu else ""),
                label(tuning),
                calls,
                bytes=2.0 * n * k,
                error=checked(calls[0], out, wanted),
            )


def halved(tuning: LinearTuning) -> LinearTuning:
    """Where a program holds two tiles of weights, gate's and up's: half the features each."""
    return dataclasses.replace(tuning, features=max(1, tuning.features // 2))


def fused_reference(
    total: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, silu: bool
) -> torch.Tensor:
    wide = total.float()
    h = (wide * torch.rsqrt(wide.square().mean() + EPS) * gain.float()).to(BF16)
    product = (h @ weight.T).float()
    if not silu:
        return product
    gate, up = product.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def pages(num_tokens: int) -> torch.Tensor:
    return randn(num_tokens // BLOCK, 2, BLOCK, KV_HEADS, DIM)


def attention_reference(
    q: torch.Tensor, kv_layer: torch.Tensor, table: torch.Tensor, length: int
) -> torch.Tensor:
    """One row of decode attention in float32."""
    kv = kv_layer[table.long()].float().transpose(0, 1).reshape(2, -1, KV_HEADS, DIM)[:, :length]
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in kv)
    scores = torch.einsum("hd,khd->hk", q.float().view(HEADS, DIM), k) * DIM**-0.5
    return torch.einsum("hk,khd->hd", scores.softmax(dim=-1), v).flatten()


def decode_variants(batch: int, context: int) -> Iterator[tuple[int, int, bool, bool]]:
    """(splits, tiles on their way, fused, pdl)."""
    rule = split_rule(batch, KV_HEADS, max(context, 32 * 1024), num_sms(DEVICE))
    if SMOKE:
        yield from ((rule, 2, True, False), (2, 2, False, False))
        return
    for splits in sorted({rule, *(s for s in (rule // 2, rule // 4, rule * 2) if 1 <= s <= 32)}):
        for depth in (1, 3):
            yield splits, depth, True, True
    yield rule, 3, True, False
    if rule > 1:
        yield rule, 3, False, True
        yield rule, 3, False, False
    else:
        for depth in (2, 4, 6):
            yield rule, depth, True, True
        yield rule, 1, True, False


def bench_decode(bench: Bench) -> None:
    batches, contexts = ((1, 2), (64,)) if SMOKE else ((1, 8, 32, 64), (512, 2048, 8192))
    kv = pages(64 * BLOCK if SMOKE else 64 * 8192)
    workspace = DecodeWorkspace(max(batches), HEADS, DIM, DEVICE)
    for batch, context in itertools.product(batches, contexts):
        width = context // BLOCK
        size = batch * context * KV_HEADS * DIM * 4.0
        sets = max(1, min(64, int(ROTATED_BYTES // size) + 1, kv.shape[0] // (batch * width)))
        order = torch.randperm(kv.shape[0])[: sets * batch * width].to(DEVICE, torch.int32)
        tables = list(order.view(sets, batch, width))
        lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        q = randn(batch, HEADS * DIM)
        out = torch.empty_like(q)
        wanted = functools.cache(functools.partial(decode_reference, q, kv, tables[0], context))
        for splits, depth, fused, pdl in decode_variants(batch, context):
            name = f"S{splits}d{depth}" + ("" if fused else "-2k") + ("" if pdl else "-nopdl")
            cut = DecodeCut(splits)
            options = {"fused": fused, "depth": depth, "pdl": pdl}
            calls: list[Call] = [
                functools.partial(
                    paged_decode, q, kv, t, lens, DIM**-0.5, out, workspace, cut, **options
                )
                for t in tables * (1 if sets > 4 else 4)
            ]
            bench.try_variant(
                "decode",
                f"B{batch} ctx{context}",
                name,
                calls,
                bytes=size,
                error=checked(calls[0], out, wanted),
            )


def decode_reference(
    q: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, length: int
) -> torch.Tensor:
    rows = zip(q, tables, strict=True)
    return torch.stack([attention_reference(row, kv, table, length) for row, table in rows])


def bench_pointwise(bench: Bench) -> None:
    """Norm, SiLU, and RoPE + KV write, the latter also to a second pool."""
    gain, table = randn(HIDDEN), randn(8192, DIM, dtype=torch.float32)
    kv = pages(64 if SMOKE else 4096)
    far = torch.empty_like(kv)
    for rows, pdl in itertools.product((1, 4) if SMOKE else (1, 32, 2048), (True, False)):
        case, flag = f"T{rows}", "pdl" if pdl else "nopdl"
        x, residual, out = (randn(rows, HIDDEN) for _ in range(3))
        norm = functools.partial(add_rms_norm, x, residual, gain, EPS, out, pdl=pdl)
        bench.try_variant("norm", case, flag, [norm] * 16, bytes=8.0 * x.numel())
        gate_up, product = randn(rows, 2 * FFN), randn(rows, FFN)
        silu = functools.partial(silu_mul, gate_up, product, pdl=pdl)
        bench.try_variant("silu", case, flag, [silu] * 16, bytes=6.0 * product.numel())
        qkv, slots = randn(rows, QKV), torch.arange(rows, device=DEVICE)
        for name, second in ((flag, (None, None)), (flag + "+2nd pool", (far, slots))):
            rope = functools.partial(
                rope_write_kv, qkv, slots, slots, table, None, None, EPS, kv, *second, pdl=pdl
            )
            bench.try_variant("rope", case, name, [rope] * 16, bytes=4.0 * qkv.numel())


def bench_prefill(bench: Bench) -> None:
    """A chunk behind a prefix; torch's varlen flash attention on gathered keys beside."""
    rows, context = (32, 64) if SMOKE else (2048, 6144)
    kv, q = pages(2 * (rows + context)), randn(rows, HEADS * DIM)
    width = (rows + context) // BLOCK
    table = torch.randperm(kv.shape[0])[:width].to(DEVICE, torch.int32)
    out = torch.empty_like(q)
    wanted = functools.cache(
        functools.partial(attention_reference, q[-1], kv, table, rows + context)
    )
    flop = 4.0 * HEADS * DIM * rows * (context + (rows + 1) / 2)
    variants = [(128, 3, 8), (128, 2, 8), (64, 3, 4), (64, 2, 4)]
    for tile, stages, warps in variants[:1] if SMOKE else variants:
        options = {"rows": tile, "stages": stages, "warps": warps}
        call = functools.partial(paged_prefill, q, kv, table, context, DIM**-0.5, out, **options)
        bench.try_variant(
            "prefill",
            f"{rows} on {rows + context}",
            f"r{tile}s{stages}w{warps}",
            [call] * 4,
            flop=flop,
            error=checked(call, out[-1], wanted),
        )


def installed_fa3(bench: Bench) -> Fa3Paged | None:
    """FlashAttention-3 of an installed vLLM; without it a failure is noted."""
    if SMOKE or COMPILING:
        return None
    try:
        return load_fa3(AttentionShape(HEADS, KV_HEADS, DIM), BF16, DEVICE)
    except LaunchError as error:
        bench.failures.append(f"paged: {error}")
        return None


# Lengths of running requests, as decode buckets of 16 to 64 rows meet them.
UNEVEN: dict[str, list[int]] = {
    "16x900": [900] * 16,
    "17x900": [900] * 17,
    "16x900+8192": [8192, *[900] * 16],
    "7x900+8192": [8192, *[900] * 7],
    "32x640": [640] * 32,
    "31x640+8192": [8192, *[640] * 31],
    "64x640": [640] * 64,
    "64x64..4032": list(range(64, 64 * 64, 63)),
    "24x2048": [2048] * 24,
    "32x8192": [8192] * 32,
}


def uneven_variants(splits: int) -> Iterator[tuple[str, int, int | None, int, int]]:
    """(name, splits, tiles on their way, least tiles of a part, shares an SM); 0 tiles: no extra
    parts."""
    yield "*rule", splits, None, 0, 2
    yield "*rule+", splits, None, least_part(splits), SHARES_PER_SM
    if SMOKE:
        return
    for depth in (1, 2, 3, 6):
        for count in sorted({1, splits}):
            yield f"S{count}d{depth}", count, depth, 0, 2
            for least, shares in ((8, 2), (16, 2)):
                yield f"S{count}d{depth}l{least}/{shares}", count, depth, least, shares


def bench_uneven(bench: Bench) -> None:
    """A whole decode bucket of rows of different lengths; `rule+` is what the engine takes."""
    kv = pages(64 * BLOCK if SMOKE else 64 * 8192)
    cases = {"2+1": [128, 64, 64]} if SMOKE else UNEVEN
    workspace = DecodeWorkspace(64, HEADS, DIM, DEVICE)
    for case, lengths in cases.items():
        rows = next(b for b in (4, 8, 16, 24, 32, 48, 64, 96) if b >= len(lengths))
        blocks = [-(-n // BLOCK) for n in lengths]
        sets = max(1, min(16, kv.shape[0] // sum(blocks)))
        tables = torch.zeros((sets, rows, max(blocks)), dtype=torch.int32, device=DEVICE)
        order = iter(torch.randperm(kv.shape[0]).to(DEVICE, torch.int32).split(1))
        for one in tables:
            for row, count in enumerate(blocks):
                one[row, :count] = torch.cat([next(order) for _ in range(count)])
        padded = [*lengths, *[0] * (rows - len(lengths))]
        lens = torch.tensor(padded, dtype=torch.int32, device=DEVICE)
        q = randn(rows, HEADS * DIM)
        out = torch.empty_like(q)
        wanted = functools.cache(
            functools.partial(attention_reference, q[0], kv, tables[0][0], lengths[0])
        )
        rule = split_rule(rows, KV_HEADS, 16384, num_sms(DEVICE))
        size = sum(lengths) * KV_HEADS * DIM * 4.0
        for name, splits, depth, least, shares in uneven_variants(rule):
            extras = None
            if COMPILING and least:
                extras = torch.zeros(HEADER + most_extra_parts(KV_HEADS, num_sms(DEVICE))).int()
            elif least:
                extras = extra_parts(
                    lens, splits, KV_HEADS, num_sms(DEVICE), least=least, shares=shares
                )
            cut = DecodeCut(splits, extras)
            options = {"depth": depth, "pdl": not SMOKE}
            calls: list[Call] = [
                functools.partial(
                    paged_decode, q, kv, t, lens, DIM**-0.5, out, workspace, cut, **options
                )
                for t in tables
            ]
            error = checked(calls[0], out[0], wanted)
            bench.try_variant("uneven", case, name, calls, bytes=size, error=error)


def bench_paged(bench: Bench) -> None:
    """Attention over pages as the engine calls it, beside FlashAttention-3 on the same pages."""
    fa3 = installed_fa3(bench)
    paged_decode_rows(bench, fa3)
    paged_chunk_rows(bench, fa3)
    fresh_rows(bench, fa3)


def paged_decode_rows(bench: Bench, fa3: Fa3Paged | None) -> None:
    batches, contexts = ((2,), (64,)) if SMOKE else ((1, 32, 64), (512, 2048, 8192))
    kv = pages(64 * BLOCK if SMOKE else 64 * 8192)
    workspace = DecodeWorkspace(max(batches), HEADS, DIM, DEVICE)
    for batch, context in itertools.product(batches, contexts):
        width, size = context // BLOCK, batch * context * KV_HEADS * DIM * 4.0
        sets = max(1, min(32, int(ROTATED_BYTES // size) + 1, kv.shape[0] // (batch * width)))
        order = torch.randperm(kv.shape[0])[: sets * batch * width].to(DEVICE, torch.int32)
        # As wide as in a decode graph: of the longest request there may be.
        tables = torch.zeros(
            (sets, batch, 8 * width if SMOKE else 8192 // BLOCK), dtype=torch.int32, device=DEVICE
        )
        tables[:, :, :width] = order.view(sets, batch, width)
        lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        q = randn(batch, HEADS * DIM)
        out = torch.empty_like(q)
        wanted = functools.cache(
            functools.partial(decode_reference, q, kv, tables[0, :, :width], context)
        )
        cut = DecodeCut(split_rule(batch, KV_HEADS, tables.shape[2] * BLOCK, num_sms(DEVICE)))
        for name in ("triton", "*fa3"):
            calls: list[Call] = []
            if name == "triton":
                calls = [
                    functools.partial(
                        paged_decode,
                        *(q, kv, t, lens, DIM**-0.5, out, workspace, cut),
                        pdl=not SMOKE,
                    )
                    for t in tables
                ]
            elif fa3 is not None:
                calls = [
                    functools.partial(fa3.paged_decode, q, kv, t, lens, DIM**-0.5, out, cut)
                    for t in tables
                ]
            if calls:
                case, error = f"B{batch} ctx{context}", checked(calls[0], out, wanted)
                bench.try_variant("paged", case, name, calls, bytes=size, error=error)


def paged_chunk_rows(bench: Bench, fa3: Fa3Paged | None) -> None:
    """Chunks behind cached tokens. `gathered` is what the engine takes."""
    cases = ((32, 64),) if SMOKE else ((512, 512), (2048, 2048), (512, 7680), (2048, 6144))
    for rows, context in cases:
        kv, q = pages(2 * (rows + context)), randn(rows, HEADS * DIM)
        width = (rows + context) // BLOCK
        table = torch.randperm(kv.shape[0])[:width].to(DEVICE, torch.int32)
        out = torch.empty_like(q)
        wanted = functools.cache(
            functools.partial(attention_reference, q[-1], kv, table, rows + context)
        )
        arguments = (q, kv, table, context, DIM**-0.5, out)
        ways: dict[str, Call] = {"triton": functools.partial(paged_prefill, *arguments)}
        if not SMOKE:
            ways["*gathered"] = functools.partial(gathered_prefill, *arguments)
        if fa3 is not None:
            ways["*fa3"] = functools.partial(fa3.paged_prefill, *arguments)
        flop = 4.0 * HEADS * DIM * rows * (context + (rows + 1) / 2)
        for name, call in ways.items():
            error = checked(call, out[-1], wanted)
            case = f"{rows} on {rows + context}"
            bench.try_variant("paged", case, name, [call] * 4, flop=flop, error=error)


def fresh_rows(bench: Bench, fa3: Fa3Paged | None) -> None:
    """Whole prompts: cuDNN and FlashAttention-2 on the projection, FA3 on the pages."""
    for rows in () if SMOKE or COMPILING else (512, 2048, 8192):
        kv, q = pages(2 * rows), randn(rows, HEADS * DIM)
        table = torch.randperm(kv.shape[0])[: rows // BLOCK].to(DEVICE, torch.int32)
        keys, values = kv[table.long()].transpose(0, 1).flatten(1, 2).transpose(1, 2).contiguous()
        heads = q.view(1, rows, HEADS, DIM).transpose(1, 2)
        out = torch.empty_like(q)
        wanted = functools.cache(functools.partial(attention_reference, q[-1], kv, table, rows))

        def of_torch(op: Any, *more: Any, to: torch.Tensor = out, **args: Any) -> torch.Tensor:
            result = op(*more, scale=DIM**-0.5, **args)[0]
            return to.copy_(result[0].transpose(0, 1).flatten(1))

        aten, both = torch.ops.aten, (heads, keys[None], values[None])
        cudnn = aten._scaled_dot_product_cudnn_attention
        flash = aten._scaled_dot_product_flash_attention
        ways: dict[str, Call] = {
            "*cudnn": functools.partial(of_torch, cudnn, *both, None, False, 0.0, True, False),
            "*fa2": functools.partial(of_torch, flash, *both, 0.0, True, False),
        }
        if fa3 is not None:
            ways["*fa3"] = functools.partial(fa3.paged_prefill, q, kv, table, 0, DIM**-0.5, out)
        flop = 2.0 * HEADS * DIM * rows * (rows + 1)
        for name, call in ways.items():
            error = checked(call, out[-1], wanted)
            bench.try_variant("paged", f"{rows} fresh", name, [call] * 4, flop=flop, error=error)


def bench_sample(bench: Bench) -> None:
    for batch in (1, 2) if SMOKE else (1, 32):
        case, logits = f"B{batch}", randn(batch, VOCAB)
        out = torch.empty(batch, dtype=torch.int64, device=DEVICE)
        workspace, size = ArgmaxWorkspace(batch, VOCAB, DEVICE), 2.0 * logits.numel()
        call = functools.partial(argmax_rows, logits, out, workspace, pdl=True)
        bench.try_variant(
            "argmax",
            case,
            "two kernels",
            [call] * 8,
            bytes=size,
            error=functools.partial(argmax_error, call, logits),
        )
        torch_call = functools.partial(logits.argmax, dim=-1)
        bench.try_variant("argmax", case, "*torch", [torch_call] * 8, bytes=size)
        row = torch.tensor([1.0, 0.0, 0.9, 0.0, 0.5], dtype=torch.float64, device=DEVICE)
        columns = row[:, None].repeat(1, batch)
        for truncates in (True, False):
            name = "*top_k/top_p" if truncates else "*temperature"
            draws = functools.partial(drawn, logits, columns, truncates)
            bench.try_variant("draw", case, name, [draws])


def drawn(logits: torch.Tensor, columns: torch.Tensor, truncates: bool) -> torch.Tensor:
    """As a step draws."""
    return draw(logits.float(), columns, truncates=truncates, has_min_p=False)


def argmax_error(call: Callable[[], torch.Tensor], logits: torch.Tensor) -> float:
    """0 if each row's choice is one of its greatest logits, else 1."""
    chosen = logits.gather(1, call()[:, None])[:, 0]
    return float((chosen != logits.amax(dim=-1)).any())


@dataclass(frozen=True)
class ChainTunings:
    qkv: LinearTuning | None = None
    o: LinearTuning | None = None
    gate_up: LinearTuning | None = None
    down: LinearTuning | None = None
    lm_head: LinearTuning | None = None


def bench_chain(bench: Bench) -> None:
    """One decode step of one stream: all layers and the lm_head, from these kernels and from
    cuBLAS with separate pointwise kernels. Weights of four layers take turns.
    """
    layers = min(LAYERS, 4)
    weights = {
        name: [randn(n, k, std=k**-0.5) for _ in range(1 if name == "lm_head" else layers)]
        for name, (n, k) in SHAPES.items()
    }
    read = sum(
        2.0 * n * k * (1 if name == "lm_head" else LAYERS) for name, (n, k) in SHAPES.items()
    )
    for context in (64,) if SMOKE else (512, 2048):
        step = ChainStep(weights, context)
        for variant, tunings in (("default", ChainTunings()), ("tuned", tuned(bench))):
            for pdl in (True, False):
                call = functools.partial(step.run, tunings, pdl)
                name = variant + ("" if pdl else "-nopdl")
                bench.try_variant("chain", f"B1 ctx{context}", name, [call], bytes=read)
        bench.try_variant("chain", f"B1 ctx{context}", "*cublas", [step.run_cublas], bytes=read)


def tuned(bench: Bench) -> ChainTunings:
    """The fastest vector variant of each layer in this run."""
    found: dict[str, LinearTuning] = {}
    for name, (n, k) in SHAPES.items():
        fused = {"qkv": "M1 norm+qkv", "gate_up": "M1 norm+gate_up+silu"}.get(name)
        best = bench.best("fused", fused) if fused else bench.best("linear", f"M1 {name}")
        for tuning in [*vector_variants(n, k), default_tuning(1, n, k), *dot_variants(1)]:
            # The benchmark of gate_up halves what it is given.
            used = halved(tuning) if name == "gate_up" else tuning
            if best is not None and label(used) == best.variant.strip("="):
                found[name] = used
    return ChainTunings(**found)


class ChainStep:
    def __init__(self, weights: dict[str, list[torch.Tensor]], context: int) -> None:
        self._weights = weights
        self._gain = randn(HIDDEN)
        self._kv = [pages(context + BLOCK) for _ in range(len(weights["o"]))]
        self._table = torch.arange(context // BLOCK + 1, device=DEVICE, dtype=torch.int32)[None]
        self._lens = torch.tensor([context], dtype=torch.int32, device=DEVICE)
        self._slot = torch.tensor([context - 1], device=DEVICE)
        self._rope = randn(context, DIM, dtype=torch.float32)
        self._workspace = DecodeWorkspace(1, HEADS, DIM, DEVICE)
        self._cut = DecodeCut(split_rule(1, KV_HEADS, 8192, num_sms(DEVICE)))
        self._start = randn(1, HIDDEN)
        self._residuals = [torch.empty_like(self._start) for _ in range(2)]
        self._token = torch.empty(1, dtype=torch.int64, device=DEVICE)
        self._argmax = ArgmaxWorkspace(1, VOCAB, DEVICE)

    def _attend(self, qkv: torch.Tensor, layer: int, pdl: bool) -> torch.Tensor:
        kv = self._kv[layer]
        q = rope_write_kv(qkv, self._slot, self._slot, self._rope, None, None, EPS, kv, pdl=pdl)
        return paged_decode(
            q, kv, self._table, self._lens, DIM**-0.5, None, self._workspace, self._cut, pdl=pdl
        )

    def run(self, tunings: ChainTunings, pdl: bool) -> None:
        w, gain = self._weights, self._gain
        here, there = self._residuals
        here.copy_(self._start)
        x = None
        for i in range(LAYERS):
            layer = i % len(w["o"])
            qkv = norm_linear(
                x, here, gain, EPS, w["qkv"][layer], None, there, tuning=tunings.qkv, pdl=pdl
            )
            attended = self._attend(qkv, layer, pdl)
            x = linear_small(attended, w["o"][layer], tuning=tunings.o, pdl=pdl)
            h = norm_gate_up_silu(
                x, there, gain, EPS, w["gate_up"][layer], here, tuning=tunings.gate_up, pdl=pdl
            )
            x = linear_small(h, w["down"][layer], tuning=tunings.down, pdl=pdl)
        logits = norm_linear(
            x, here, gain, EPS, w["lm_head"][0], None, there, tuning=tunings.lm_head, pdl=pdl
        )
        argmax_rows(logits, self._token, self._argmax, pdl=pdl)

    def run_cublas(self) -> None:
        w, gain = self._weights, self._gain
        residual = self._residuals[0]
        residual.copy_(self._start)
        x = None
        for i in range(LAYERS):
            layer = i % len(w["o"])
            qkv = add_rms_norm(x, residual, gain, EPS) @ w["qkv"][layer].T
            x = self._attend(qkv, layer, False) @ w["o"][layer].T
            h = add_rms_norm(x, residual, gain, EPS) @ w["gate_up"][layer].T
            x = silu_mul(h) @ w["down"][layer].T
        argmax_rows(add_rms_norm(x, residual, gain, EPS) @ w["lm_head"][0].T, self._token)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "read": bench_read,
    "linear": bench_linear,
    "gate_up": bench_gate_up,
    "fused": bench_fused,
    "decode": bench_decode,
    "uneven": bench_uneven,
    "chain": bench_chain,
    "pointwise": bench_pointwise,
    "prefill": bench_prefill,
    "sample": bench_sample,
    "paged": bench_paged,
}
TABLES = {"pointwise": ("norm", "silu", "rope"), "sample": ("argmax", "draw")}


def compile_ahead(names: list[str], shards: int, seconds: float) -> None:
    """Fill Triton's cache with every variant, in parallel processes, before anything is timed."""
    command = [sys.executable, __file__, "--only", ",".join(names), "--shards", str(shards)]
    children = [
        subprocess.Popen([*command, "--compile-shard", str(i)], stdout=subprocess.DEVNULL)
        for i in range(shards)
    ]
    end = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def never_launch() -> None:
    """Make every Triton call of this process compile only."""
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.jit.JITFunction.run = compile_only


def run_section(name: str, bench: Bench) -> None:
    started = time.monotonic()
    try:
        SECTIONS[name](bench)
    except Exception as problem:
        bench.failures.append(f"{name}: {type(problem).__name__} {problem}"[:300])
    if COMPILING:
        return
    for table in TABLES.get(name, (name,)):
        bench.table(table)
    print(f"-- {name}: {time.monotonic() - started:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--seconds", type=float, default=110.0, help="start no variant after this")
    parser.add_argument("--out", type=Path, help="JSON of all results")
    parser.add_argument("--shards", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--compile-shard", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--interpret-smoke", action="store_true", help="tiny, on a CPU, untimed")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: there are {', '.join(SECTIONS)}")
    if not (SMOKE or COMPILING) and not torch.cuda.is_available():
        parser.error("no CUDA device; --interpret-smoke runs the same code on a CPU")
    bench = Bench(args.seconds)
    if args.compile_shard is not None:
        bench = Bench(args.seconds, args.compile_shard, args.shards)
        never_launch()
    elif not SMOKE:
        name = torch.cuda.get_device_name()
        print(f"{name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
        compile_ahead(names, args.shards, args.seconds / 2)
        print(f"-- compiled ahead: {time.monotonic() - bench.started:.1f} s", flush=True)
    with torch.inference_mode():
        for name in names:
            run_section(name, bench)
    if COMPILING:
        return
    for line in bench.failures:
        print("FAILED " + line)
    print(f"{len(bench.results)} variants, {len(bench.failures)} failures, = is the default")
    if args.out is not None:
        rows = [asdict(r) for r in bench.results]
        document = {"limit": bench.limit, "results": rows, "failures": bench.failures}
        args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
