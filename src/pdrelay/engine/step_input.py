"""A step's inputs packed into one run of 64-bit words: one upload a step, views on both sides.

Words, in this order (`rows` is the number of token rows, padding included; T of them are real):

    token_ids   rows   the host's token ids
    sources     rows   where each row's token lies: `r` < max_num_seqs: row r of the last step's
                       sampled tokens, on the device; max_num_seqs + i: token_ids[i]
    positions   rows
    slots       rows   block * block_size + offset, -1 for padding
    seq_lens    rows/2 int32, of the decode rows; 0 for padding
    logits_rows num_logits   rows to project (eager steps)
    draws       5 * num_draws float64: temperature, top_k, top_p, min_p, point; a column each
    remote      rows   slots in the peer's pool, if the step stores there too
    tables      int32  [num_decodes, table_width], then each prefill segment's block table
"""

from __future__ import annotations

import msgspec

DRAW_COLUMNS = 5


class Prefill(msgspec.Struct, frozen=True, array_like=True):
    """Rows `start .. start + length`, behind `context_len` cached tokens."""

    start: int
    length: int
    context_len: int
    table_len: int  # blocks


class StepHeader(msgspec.Struct, frozen=True, array_like=True):
    """What the words mean. With them it is all that a rank needs to run the step."""

    rows: int  # token rows, padding included
    num_decodes: int  # the first rows, padding not included
    table_width: int
    prefills: tuple[Prefill, ...]
    num_logits: int  # 0 in a graph step: all its rows are projected
    is_graph: bool
    greedy: bool  # every sampled token is an argmax of raw logits
    num_draws: int  # rows of `draws`; as many as sampled rows, or none
    truncates: bool  # some draw has top_k or top_p
    has_min_p: bool
    has_remote: bool

    def words(self) -> Words:
        return Words(self)


class Words:
    """Offsets of a step's arrays, in words."""

    def __init__(self, header: StepHeader) -> None:
        rows = header.rows
        self.token_ids = 0
        self.sources = rows
        self.positions = 2 * rows
        self.slots = 3 * rows
        self.seq_lens = 4 * rows
        self.logits_rows = self.seq_lens + _halves(rows)
        self.draws = self.logits_rows + header.num_logits
        self.remote = self.draws + DRAW_COLUMNS * header.num_draws
        self.tables = self.remote + (rows if header.has_remote else 0)
        num_entries = header.num_decodes * header.table_width
        num_entries += sum(segment.table_len for segment in header.prefills)
        self.end = self.tables + _halves(num_entries)


def max_words(max_rows: int, max_num_seqs: int, table_width: int, max_prefill_blocks: int) -> int:
    """An upper bound of `Words.end`."""
    per_row = 6 * max_rows
    per_request = max_num_seqs * (1 + DRAW_COLUMNS)
    tables = _halves(max_num_seqs * table_width + max_prefill_blocks)
    return per_row + per_request + tables


def _halves(num_int32: int) -> int:
    return -(-num_int32 // 2)
