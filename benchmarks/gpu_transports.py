"""The GPU half of `transports.py`: what each transport moves between two processes' GPU pages.

The processes are gpu_transport_rig.py's; bulk hand-overs over `mapped` are shown by gpu_bulk.py.
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack
from typing import Any

from gpu_bulk import Peaks, best, rate, show_bulk
from gpu_transport_rig import Bench, LocalConsumer, RemoteConsumer, Shape, block_ids

from pdrelay.errors import PdrelayError
from pdrelay.transport.checksum import checksum
from pdrelay.transport.host_device import HostFabric

STAGED_TOKENS = 2048  # tcp and pool: 0.3 GB of the 8B shape
LLAMA_8B = Shape(32, 8, 128, "bfloat16")
REHEARSAL = Shape(4, 2, 32, "float32")


def devices(device: str) -> tuple[str, str, str]:
    """Producer's, consumer's, and what is between them, in words."""
    if device in ("host", "process"):
        return device, device, "a rehearsal without GPUs: its figures say nothing about them"
    import torch

    name = torch.cuda.get_device_name(0)
    if torch.cuda.device_count() > 1:
        return "cuda:0", "cuda:1", f"{name}, cuda:0 to cuda:1, torch {torch.__version__}"
    return "cuda:0", "cuda:0", f"{name}, both processes on cuda:0, torch {torch.__version__}"


def run_gpu(device: str, names: list[str], repeats: int, seconds: float) -> None:
    began = time.monotonic()
    here, there, words = devices(device)
    on_gpu = here.startswith("cuda")
    shape = LLAMA_8B if on_gpu else REHEARSAL
    lengths = [128, 512, 2048, 8192] if on_gpu else [64, 256]
    print(words)
    print(
        f"{shape}; best (median) of up to {repeats}, first send to all stored (tcp, pool: Arrived)"
    )
    fabric = HostFabric()
    consumer: Any = LocalConsumer(fabric) if device == "host" else RemoteConsumer(there)
    try:
        for name in names:
            mapped = name == "mapped"
            for block_size in (16, 64) if mapped else (64,):
                if time.monotonic() - began > seconds:
                    print(f"stopped after {seconds:g} s")
                    return
                limit = lengths[-1] if mapped else min(lengths[-1], STAGED_TOKENS)
                layout = shape.layout(block_size, limit)
                with ExitStack() as stack:
                    bench = Bench(stack, consumer, name, layout, here, fabric)
                    peak = 0.0
                    if mapped:
                        peaks = Peaks(bench, repeats)
                        peaks.show("from GPU to GPU" if here != there else "within one device")
                        show_bulk(bench, repeats, peaks)
                        peak = peaks.peak
                    shown = lengths[1::2] if mapped else [n for n in lengths[1:] if n <= limit]
                    table(bench, shown, repeats, peak)
                    if mapped and block_size == 64:
                        print_checksums(bench, repeats)
        print(f"\n{time.monotonic() - began:.0f} s in all")
    except PdrelayError as error:
        print(f"failed: {error}")
    finally:
        consumer.close()


def table(bench: Bench, lengths: list[int], repeats: int, peak: float) -> None:
    layout = bench.layout
    page_kib = layout.layer_block_bytes / 1024
    print(f"{bench.name}, blocks of {layout.block_size}: {page_kib:g} KiB a (layer, block)")
    print(f"{'tokens':>7}{'MB':>8} {'ids':<9}{'pieces':>7}{'bulk ms':>19}{'GB/s':>13}", end="")
    print(f"{'device GB/s':>13}{'layer by layer ms':>19}{'GB/s':>13}" if peak else "")
    for order in ("run", "shuffled"):
        for tokens in lengths:
            count = -(-tokens // layout.block_size)
            src, dst = block_ids(layout, count, order)
            num_bytes = count * layout.block_bytes
            bulk, median = best(lambda s=src, d=dst: bench.move(s, d), repeats)
            cells = f"{bulk.seconds * 1e3:.3f} ({median * 1e3:.3f})"
            row = f"{tokens:>7}{num_bytes / 1e6:>8.1f} {order:<9}{bulk.num_pieces:>7}"
            row += f"{cells:>19}{rate(num_bytes, bulk.seconds, peak):>13}"
            if peak:
                row += f"{rate(num_bytes, bulk.busy_ns / 1e9, peak):>13}"
                each, median = best(lambda s=src, d=dst: bench.move(s, d, layer_wise=True), repeats)
                cells = f"{each.seconds * 1e3:.3f} ({median * 1e3:.3f})"
                row += f"{cells:>19}{rate(num_bytes, each.seconds, peak):>13}"
            print(row, flush=True)


def print_checksums(bench: Bench, repeats: int) -> None:
    print("\nchecksum on the device, µs, best (median)")
    for tokens in (512, 4096):
        count = min(tokens // bench.layout.block_size, bench.layout.num_blocks)
        blocks = random.Random(1).sample(range(bench.layout.num_blocks), count)
        for mode in ("sample", "full"):
            times = []
            for _ in range(max(repeats, 10)):
                start = time.perf_counter()
                checksum(bench.pages, blocks, mode)  # type: ignore[arg-type]
                times.append(time.perf_counter() - start)
            cell = f"{min(times) * 1e6:.0f} ({statistics.median(times) * 1e6:.0f})"
            print(f"  {tokens} tokens, {mode:<7}{cell:>14}")
