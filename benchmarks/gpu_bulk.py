"""Bulk hand-overs of whole prompts over `mapped` between GPUs, beside one driver copy.

Three figures a size. *One*: from the first send until the host sees the end, beside a driver copy
timed the same way. *Device*: between events, which is the copies and what the host does between
them. *Train*: hand-overs behind one another, as a loaded server has them, bytes by wall time,
beside a driver copy between events. Percentages are of that copy ("size") and of the peak ("all").
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gpu_transport_rig import Bench, Cell, DriverCopy, block_ids

from pdrelay.core.kv_layout import KVLayout

CELL_S = 0.5  # a cell is not repeated any further, once it has been twice
SIZES_MIB = (8, 64, 1024)
CTAS = (16, 32, 132)
TRAIN_REPEATS = 3
TRAIN_BYTES = 1 << 30  # and at least 4 hand-overs, at most 64


def best(run: Callable[[], Cell], repeats: int) -> tuple[Cell, float]:
    """The best cell and the median of its seconds, after one warm-up."""
    run()
    cells: list[Cell] = []
    while len(cells) < repeats:
        cells.append(run())
        if len(cells) >= 2 and sum(cell.seconds for cell in cells) > CELL_S:
            break
    return min(cells, key=lambda c: c.seconds), statistics.median(c.seconds for c in cells)


def rate(num_bytes: int, seconds: float, peak: float, here: float = 0.0) -> str:
    """GB/s; of the peak of one copy of that size (`here`) and of the peak, both bytes/s."""
    text = f"{num_bytes / seconds / 1e9:.1f}"
    for bound in (here, peak):
        text += f" {num_bytes / seconds / bound:>4.0%}" if bound else ""
    return text


class Peaks:
    """One driver copy of each size; `peak`, bytes/s, is the best between events."""

    def __init__(self, bench: Bench, repeats: int) -> None:
        self.layout = bench.layout
        self.copies: dict[int, DriverCopy] = {}  # by MiB
        for mebibytes in SIZES_MIB:
            num_bytes = len(one_of(self.layout, mebibytes, "run")[0]) * self.layout.block_bytes
            self.copies[mebibytes] = bench.driver_copy(num_bytes, repeats)
        self.peak = max(copy.num_bytes / copy.device_s for copy in self.copies.values())

    def wall(self, mebibytes: int) -> float:
        copy = self.copies[mebibytes]
        return copy.num_bytes / copy.wall_s

    def device(self, mebibytes: int) -> float:
        copy = self.copies[mebibytes]
        return copy.num_bytes / copy.device_s

    def show(self, where: str) -> None:
        print(f"\ncopy peak {where} (one driver copy): {self.peak / 1e9:.1f} GB/s")
        print(f"{'MiB':>7}{'device ms':>11}{'GB/s':>12}{'until seen, ms':>16}{'GB/s':>12}")
        for copy in self.copies.values():
            row = f"{copy.num_bytes / 2**20:>7g}{copy.device_s * 1e3:>11.3f}"
            row += f"{rate(copy.num_bytes, copy.device_s, self.peak):>12}"
            row += f"{copy.wall_s * 1e3:>16.3f}{rate(copy.num_bytes, copy.wall_s, self.peak):>12}"
            print(row, flush=True)


def one_of(layout: KVLayout, mebibytes: int, order: str) -> tuple[list[int], list[int]]:
    """Blocks of about that size, at most half the pool."""
    count = max(1, min((mebibytes << 20) // layout.block_bytes, layout.num_blocks // 2))
    return block_ids(layout, count, order)


def train_of(layout: KVLayout, mebibytes: int, order: str) -> list[tuple[list[int], list[int]]]:
    """Hand-overs of that size, of different blocks while there are any."""
    count = len(one_of(layout, mebibytes, order)[0])
    src, dst = block_ids(layout, layout.num_blocks, order)
    length = max(4, min(64, TRAIN_BYTES // (count * layout.block_bytes)))
    starts = [i * count % (layout.num_blocks // count * count) for i in range(length)]
    return [(src[a : a + count], dst[a : a + count]) for a in starts]


def best_train(bench: Bench, mebibytes: int, order: str) -> float:
    """Seconds of a train, per hand-over."""
    hand_overs = train_of(bench.layout, mebibytes, order)
    bench.train(hand_overs)
    return min(bench.train(hand_overs) for _ in range(TRAIN_REPEATS)) / len(hand_overs)


def show_bulk(bench: Bench, repeats: int, peaks: Peaks) -> None:
    """As the transport chooses, and by each way that it has."""
    layout, device = bench.layout, bench.pages.device
    page_kib = layout.layer_block_bytes / 1024
    print(f"bulk over mapped, blocks of {layout.block_size}: {page_kib:g} KiB a (layer, block)")
    print(
        f"{'MiB':>7} {'ids':<9}{'by':<25}{'pieces':>7}{'host ms':>9}{'one, ms (median)':>18}",
        end="",
    )
    print(f"{'GB/s size all':>17}{'device all':>11}{'train size all':>17}")
    for mebibytes in SIZES_MIB:
        for order in ("run", "shuffled"):
            src, dst = one_of(layout, mebibytes, order)
            for words, way, options in ways(device):
                with copying(device, way, **options):
                    bench.check(src, dst)
                    cell, median = best(lambda s=src, d=dst: bench.move(s, d), repeats)
                    each_s = best_train(bench, mebibytes, order)
                num_bytes = len(src) * layout.block_bytes
                one = f"{cell.seconds * 1e3:.3f} ({median * 1e3:.3f})"
                row = f"{num_bytes / 2**20:>7g} {order:<9}{words:<25}{cell.num_pieces:>7}"
                row += f"{cell.host_s * 1e3:>9.3f}{one:>18}"
                row += f"{rate(num_bytes, cell.seconds, peaks.peak, peaks.wall(mebibytes)):>17}"
                row += f"{rate(num_bytes, cell.busy_ns / 1e9, peaks.peak):>11}"
                row += f"{rate(num_bytes, each_s, peaks.peak, peaks.device(mebibytes)):>17}"
                print(row, flush=True)


def ways(device: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """In words, as `page_copies` names it, and with what options of `copying`."""
    if getattr(device, "_copier", None) is None:  # a rehearsal, or no Triton
        return [("as chosen", "", {})]
    found: list[tuple[str, str, dict[str, Any]]] = [("as chosen", "auto", {})]
    if device.batched:
        found.append(("driver, one call", "driver", {"batch": True}))
    found.append(("driver, a call a run", "driver", {"batch": False}))
    found += [(f"kernel, {n} CTAs", "kernel", {"ctas": n}) for n in CTAS]
    return found


@contextmanager
def copying(device: Any, way: str, **options: Any) -> Iterator[None]:
    """`device.copy_pages` in one way: `batch` (driver), `ctas` (kernel)."""
    if not way:
        yield
        return
    before = device.page_copies, device.page_copy_ctas, device._batch
    device.page_copies = way
    device.page_copy_ctas = options.get("ctas", device.page_copy_ctas)
    device._batch = options.get("batch", device._batch)
    try:
        yield
    finally:
        device.page_copies, device.page_copy_ctas, device._batch = before
