"""KV hand-overs: bytes, pieces, speed, overlap with prefill, and whether the bytes are right."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pdrelay.core.events import Event, EventKind
from pdrelay.core.kv_layout import KVLayout
from pdrelay.lab.report.figures import TransferRow
from pdrelay.lab.report.joined import Joined, joined
from pdrelay.lab.rundir import EXPERIMENTS, Run
from pdrelay.lab.topology import is_pd

Check = Literal["matched", "wrong", "unverified"]
# 1 TB/s, which no link between workers has: what seems faster was not copied, but stored by the
# kernels that computed it, and has no busy time of its own.
MOST_BYTES_PER_NS = 1000
CACHED_BLOCKS_DETAIL = "first_block="  # in a RESERVED event: blocks the consumer had already


@dataclass(frozen=True)
class Transfer:
    """One request's hand-over, summed over its pieces. Times are CLOCK_MONOTONIC ns."""

    request: Joined
    transport: str
    num_bytes: int
    num_pieces: int
    busy_ns: int
    start_ns: int
    end_ns: int
    expected_bytes: int | None  # None: no layout in workers.json
    check: Check

    @property
    def was_copied(self) -> bool:
        return self.busy_ns * MOST_BYTES_PER_NS >= self.num_bytes

    @property
    def wall_ns(self) -> int:
        return max(0, self.end_ns - self.start_ns)


def transfer_of(run: Run, request: Joined) -> Transfer | None:
    """The hand-over of one request, or None when it had none."""
    ends = [event for event in request.server.events if event.kind is EventKind.TRANSFER_END]
    if not ends:
        return None
    start = request.first(EventKind.TRANSFER_START)
    layout = run.topologies[request.case.info.topology].layout_of(ends[-1].instance)
    num_bytes = sum(event.num_bytes for event in ends)
    cached = consumer_cached_blocks(request.first(EventKind.RESERVED))
    expected, check = check_bytes(request, layout, num_bytes, cached)
    return Transfer(
        request=request,
        transport=ends[-1].transport,
        num_bytes=num_bytes,
        num_pieces=sum(event.num_pieces for event in ends),
        busy_ns=sum(event.busy_ns for event in ends),
        start_ns=start.t_ns if start else ends[0].t_ns,
        end_ns=ends[-1].t_ns,
        expected_bytes=expected,
        check=check,
    )


def consumer_cached_blocks(reserved: Event | None) -> int | None:
    """Prompt blocks that were in the consumer's prefix cache, when the record says so."""
    if reserved is None:
        return None
    for word in reserved.detail.split():
        text = word.removeprefix(CACHED_BLOCKS_DETAIL)
        if text != word and text.isdecimal():
            return int(text)
    return None


def check_bytes(
    request: Joined, layout: KVLayout | None, num_bytes: int, cached: int | None
) -> tuple[int | None, Check]:
    """(expected bytes, verdict): whole blocks of the prompt less those that the consumer had.

    When the record does not say what the consumer had, prompts known to be distinct must move in
    full; others cannot be verified beyond being whole blocks, no more than the prompt's.
    """
    if layout is None:
        return None, "unverified"
    blocks = -(-request.server.num_prompt_tokens // layout.block_size)
    if cached is None and not request.case.info.distinct_prompts:
        most = blocks * layout.block_bytes
        fits = num_bytes <= most and num_bytes % layout.block_bytes == 0
        return most, "matched" if num_bytes == most else "unverified" if fits else "wrong"
    expected = (blocks - (cached or 0)) * layout.block_bytes
    return expected, "matched" if num_bytes == expected else "wrong"


def prefill_overlap(transfer: Transfer) -> float | None:
    """Share of the transfer's wall time that lies between prefill start and end."""
    start = transfer.request.first(EventKind.PREFILL_START)
    end = transfer.request.first(EventKind.PREFILL_END)
    if start is None or end is None or transfer.wall_ns == 0:
        return None
    shared = min(end.t_ns, transfer.end_ns) - max(start.t_ns, transfer.start_ns)
    return max(0, shared) / transfer.wall_ns


def transfer_rows(run: Run) -> list[TransferRow]:
    """By topology; experiments 1, 3 and 4 by input length, experiment 2 as one row."""
    rows = []
    for name in filter(is_pd, run.topologies):
        for experiment in EXPERIMENTS:
            groups: dict[str, list[Transfer]] = {}
            for case in run.select(experiment, name):
                for request in joined(run, case):
                    transfer = transfer_of(run, request)
                    if transfer is not None:
                        groups.setdefault(_group(experiment, request), []).append(transfer)
            keys = sorted(groups, key=lambda key: (len(key), key))
            rows += [_row(name, experiment, key, groups[key]) for key in keys]
    return rows


def _group(experiment: str, request: Joined) -> str:
    return "mixed" if experiment == "traffic" else str(request.server.num_prompt_tokens)


def _row(name: str, experiment: str, length: str, transfers: Sequence[Transfer]) -> TransferRow:
    overlaps = [o for o in map(prefill_overlap, transfers) if o is not None]
    copied = [t for t in transfers if t.was_copied]
    busy_ns = sum(t.busy_ns for t in copied)
    wrong = [t for t in transfers if t.check == "wrong"]
    if length == "mixed":
        lengths = [t.request.server.num_prompt_tokens for t in transfers]
        length = f"{min(lengths)}–{max(lengths)}"
    return TransferRow(
        topology=name,
        experiment=experiment,
        input_len=length,
        transport=transfers[0].transport,
        n=len(transfers),
        num_bytes=statistics.median(t.num_bytes for t in transfers),
        num_pieces=statistics.median(t.num_pieces for t in transfers),
        busy_ms=statistics.median(t.busy_ns for t in transfers) / 1e6,
        gb_per_s=sum(t.num_bytes for t in copied) / busy_ns if busy_ns else None,
        wall_ms=statistics.median(t.wall_ns for t in transfers) / 1e6,
        overlap=statistics.fmean(overlaps) if overlaps else None,
        tail_ms=statistics.median(map(tail_ns, transfers)) / 1e6,
        bytes_matched=sum(t.check == "matched" for t in transfers),
        bytes_wrong=len(wrong),
        bytes_unverified=sum(t.check == "unverified" for t in transfers),
        first_wrong=_describe(wrong[0]) if wrong else "",
    )


def tail_ns(transfer: Transfer) -> int:
    """From the end of prefill to the end of the transfer."""
    end = transfer.request.first(EventKind.PREFILL_END)
    return max(0, transfer.end_ns - end.t_ns) if end else 0


def _describe(transfer: Transfer) -> str:
    return (
        f"request {transfer.request.client.request_id} moved {transfer.num_bytes:,} bytes, "
        f"expected {transfer.expected_bytes:,}"
    )
