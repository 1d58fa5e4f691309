"""A step's inputs packed into one run of 64-bit words: one upload a step, views on both sides.

Words, in this order (`rows` is the number of token rows, padding included; T of them are real):

    token_ids   rows   the host's token ids
    sources     rows   where each row's token lies: `r` < first_host_token: row r of the last
                       step's sampled tokens, on the device; first_host_token + i: token_ids[i]
    positions   rows
    slots       rows   block * block_size + offset, -1 for padding
    seq_lens    rows/2 int32, of the decode rows; 0 for padding
    logits_rows num_logits   rows to project (not of decode graphs, which project all)
    remote      rows   slots in the peer's pool, if the step stores there too
    draws       5 * num_draws float64: temperature, top_k, top_p, min_p, point; a column each
    tables      int32  [num_decodes, table_width], then each prefill segment's block table

Every array, and every segment's table, begins at a multiple of 16 bytes: Triton compiles a kernel
again for a pointer that is aligned less. What graphs read lies before `draws`: its place depends on
the bucket alone.
"""

from __future__ import annotations

import msgspec

DRAW_COLUMNS = 5
_ALIGNMENT = 2  # words: 16 bytes


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
    num_logits: int  # 0 in a decode graph: all its rows are projected
    is_graph: bool  # `rows` is the bucket of a decode graph, or of a prefill graph (one segment)
    greedy: bool  # every sampled token is an argmax of raw logits
    num_draws: int  # rows of `draws`; as many as sampled rows, or none
    truncates: bool  # some draw has top_k or top_p
    has_min_p: bool
    has_remote: bool

    def words(self) -> Words:
        return Words(self)


class StepMessage(msgspec.Struct, frozen=True, array_like=True, tag="device_step"):
    """A step as rank 0 sends it to the other ranks of an instance: little-endian words."""

    header: StepHeader
    words: bytes


class Words:
    """Offsets of a step's arrays, in words. `tables` and `table_at` for the int32 ones."""

    def __init__(self, header: StepHeader) -> None:
        rows = header.rows
        self.token_ids = 0
        self.sources = _aligned(rows)
        self.positions = 2 * self.sources
        self.slots = 3 * self.sources
        self.seq_lens = 4 * self.sources
        self.logits_rows = self.seq_lens + _aligned(-(-rows // 2))
        self.remote = self.logits_rows + _aligned(header.num_logits)
        self.draws = self.remote + _aligned(rows if header.has_remote else 0)
        self.tables = self.draws + _aligned(DRAW_COLUMNS * header.num_draws)
        # int32 entries behind `tables`: where each prefill segment's table begins.
        entry = _aligned32(header.num_decodes * header.table_width)
        self.table_at: list[int] = []
        for segment in header.prefills:
            self.table_at.append(entry)
            entry += _aligned32(segment.table_len)
        self.end = self.tables + entry // 2


def max_words(max_rows: int, max_num_seqs: int, table_width: int) -> int:
    """An upper bound of `Words.end`: each request is one decode or one segment of a step."""
    # token_ids, sources, positions, slots, half of seq_lens, logits_rows (a row a token where
    # prompts' log-probabilities are asked for), remote
    rows = 7 * _aligned(max_rows)
    per_request = _aligned(DRAW_COLUMNS * max_num_seqs)
    tables = max_num_seqs * _aligned32(table_width) // 2
    return rows + per_request + tables


def _aligned(num_words: int) -> int:
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT


def _aligned32(num_int32: int) -> int:
    return 2 * _aligned(-(-num_int32 // 2))
