"""From a plan to packed words (`step_input.py`). Host work of every step: lean on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.engine.batch import wants_prompt_logprobs
from pdrelay.engine.block_table_rows import BlockTableRows
from pdrelay.engine.sampler import SamplingRow, draw_columns
from pdrelay.engine.step import RemoteSlots
from pdrelay.engine.step_input import DRAW_COLUMNS, Prefill, StepHeader

BucketOf = Callable[[int], int | None]
PrefillBucketOf = Callable[[int, Any], int | None]


class Sampling:
    """How the step's tokens are chosen: on the host, drawn on the device, or all by argmax."""

    def __init__(self, rows: Sequence[SamplingRow], *, on_host: bool) -> None:
        """`rows`: one a sampling chunk if any of them is drawn, else none."""
        self.on_host = on_host
        self.draws = None
        if rows:
            self.draws = np.asarray(draw_columns(rows), dtype=np.float64)  # [5, S]
        self.truncates = any(row.params.top_k or row.params.top_p < 1.0 for row in rows)
        self.has_min_p = any(row.params.min_p for row in rows)


class StepPacker:
    """Packs plans of one engine; keeps the block tables of running requests between steps."""

    def __init__(
        self,
        *,
        block_size: int,
        max_num_seqs: int,
        first_host_token: int,
        table_width: int,
        bucket_of: BucketOf,
        prefill_bucket_of: PrefillBucketOf,
    ) -> None:
        """`bucket_of(num_decodes)`: rows of the graph that runs so many, None without one.
        `prefill_bucket_of(num_tokens, pool)`: of the graph that runs one prompt of so many, storing
        into a peer's pool too unless that is None."""
        self._block_size = block_size
        self._first_host_token = first_host_token
        self._bucket_of = bucket_of
        self._prefill_bucket_of = prefill_bucket_of
        self._tables = BlockTableRows(2 * max_num_seqs, table_width)

    def pack(
        self,
        plan: StepPlan,
        sampling: Sampling,
        sampled_rows: Mapping[str, int],
        known_tokens: Mapping[str, int],
        remote: RemoteSlots | None,
        words: np.ndarray,
    ) -> StepHeader:
        """Write the plan into `words`, int64.

        A pending token is row `sampled_rows[request_id]` of the last step's sampled tokens, or
        `known_tokens[request_id]` where the host chose it.
        """
        self._tables.begin_step()
        decodes = [chunk for chunk in plan.chunks if chunk.is_decode]
        others = plan.chunks[len(decodes) :]
        bucket = self._graph_of(decodes, others, remote)
        num_rows = len(decodes) + sum(chunk.length for chunk in others)
        rows = num_rows if bucket is None else bucket
        logits_rows = _logits_rows(plan.chunks) if others or bucket is None else []
        longest = max((chunk.start + 1 for chunk in decodes), default=0)
        header = StepHeader(
            rows=rows,
            num_decodes=len(decodes),
            table_width=-(-longest // self._block_size),
            prefills=self._segments(others, len(decodes)),
            num_logits=len(logits_rows),
            is_graph=bucket is not None,
            greedy=not sampling.on_host and sampling.draws is None,
            num_draws=0 if sampling.draws is None else sampling.draws.shape[1],
            truncates=sampling.truncates,
            has_min_p=sampling.has_min_p,
            has_remote=remote is not None,
        )
        at = header.words()
        assert at.end <= len(words)
        words[: at.sources] = 0
        words[at.sources : at.sources + rows] = np.arange(rows) + self._first_host_token
        words[at.positions : at.slots] = 0
        words[at.slots : at.seq_lens] = -1
        words[at.seq_lens : at.logits_rows] = 0
        entries = words[at.tables : at.end].view(np.int32)
        if decodes:
            self._pack_decodes(decodes, header, sampled_rows, known_tokens, words, entries)
        self._pack_prefills(others, header, words, entries)
        words[at.logits_rows : at.logits_rows + len(logits_rows)] = logits_rows
        if remote is not None:
            words[at.remote : at.draws] = -1
            words[at.remote : at.remote + num_rows] = remote.slots
        if sampling.draws is not None:
            draws = words[at.draws : at.draws + sampling.draws.size].view(np.float64)
            draws.reshape(DRAW_COLUMNS, -1)[:] = sampling.draws
        return header

    def _graph_of(
        self, decodes: Sequence[Chunk], others: Sequence[Chunk], remote: RemoteSlots | None
    ) -> int | None:
        """Rows of the graph that runs the plan: decodes alone, or one prompt from end to end."""
        if not others:
            sampled = remote is None and all(chunk.samples for chunk in decodes)
            return self._bucket_of(len(decodes)) if sampled else None
        chunk = others[0]
        if decodes or len(others) > 1 or chunk.start > 0 or not chunk.samples:
            return None
        if wants_prompt_logprobs(chunk):
            return None
        return self._prefill_bucket_of(chunk.length, None if remote is None else remote.tensor)

    def _segments(self, chunks: Sequence[Chunk], first_row: int) -> tuple[Prefill, ...]:
        segments = []
        for chunk in chunks:
            used = -(-(chunk.start + chunk.length) // self._block_size)
            segments.append(
                Prefill(first_row, chunk.length, chunk.start, used if chunk.start else 0)
            )
            first_row += chunk.length
        return tuple(segments)

    def _pack_decodes(
        self,
        decodes: Sequence[Chunk],
        header: StepHeader,
        sampled_rows: Mapping[str, int],
        known_tokens: Mapping[str, int],
        words: np.ndarray,
        entries: np.ndarray,
    ) -> None:
        at, table_rows, starts = header.words(), [], []
        row_of = self._tables.row
        for i, chunk in enumerate(decodes):
            request, start = chunk.request, chunk.start
            table_rows.append(row_of(request))
            starts.append(start)
            if not chunk.token_pending:
                words[at.token_ids + i] = request.token_ids[start]
            elif request.request_id in known_tokens:
                words[at.token_ids + i] = known_tokens[request.request_id]
            else:
                words[at.sources + i] = sampled_rows[request.request_id]
        count, width = len(decodes), header.table_width
        tables = self._tables.table[table_rows, :width]
        positions = np.asarray(starts, dtype=np.int64)
        blocks = tables[np.arange(count), positions // self._block_size].astype(np.int64)
        words[at.positions : at.positions + count] = positions
        words[at.slots : at.slots + count] = (
            blocks * self._block_size + positions % self._block_size
        )
        words[at.seq_lens : at.logits_rows].view(np.int32)[:count] = positions + 1
        entries[: count * width].reshape(count, width)[:] = tables

    def _pack_prefills(
        self,
        chunks: Sequence[Chunk],
        header: StepHeader,
        words: np.ndarray,
        entries: np.ndarray,
    ) -> None:
        at, size = header.words(), self._block_size
        for chunk, segment, entry in zip(chunks, header.prefills, at.table_at, strict=True):
            assert not chunk.token_pending
            request, start, length = chunk.request, chunk.start, chunk.length
            table = np.asarray(request.block_table, dtype=np.int64)
            position = np.arange(start, start + length, dtype=np.int64)
            slots = table[position // size] * size + position % size
            first, last = segment.start, segment.start + length
            token_ids = np.frombuffer(request.token_ids[start : start + length], dtype=np.uint32)
            words[at.token_ids + first : at.token_ids + last] = token_ids
            words[at.positions + first : at.positions + last] = position
            words[at.slots + first : at.slots + last] = slots
            entries[entry : entry + segment.table_len] = table[: segment.table_len]


def _logits_rows(chunks: Sequence[Chunk]) -> list[int]:
    """Rows to project: a chunk's last if it samples, all of it for prompt log-probabilities."""
    rows: list[int] = []
    offset = 0
    for chunk in chunks:
        if wants_prompt_logprobs(chunk):
            rows.extend(range(offset, offset + chunk.length))
        elif chunk.samples:
            rows.append(offset + chunk.length - 1)
        offset += chunk.length
    return rows
