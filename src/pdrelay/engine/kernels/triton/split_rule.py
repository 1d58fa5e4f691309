"""Shapes of the decode kernels' grids: by arithmetic, without triton or torch."""

from __future__ import annotations

TILE = 64  # keys of one step of the kernel's loop
MAX_SPLITS = 32
_PROGRAMS_PER_SM = 2
_DEPTH, _LEAST_DEPTH = 3, 1
_CROWD = 3  # programs an SM
_SHARED_BYTES = 112 << 10  # a program's, of what an SM has for _PROGRAMS_PER_SM
_SM_BYTES = 227 << 10
_MOST_PER_SM = 4  # programs, by their registers
SHARES_PER_SM = 2  # a part has at most a half of what an SM has to read in all
# Tiles that a part of a row has at least if it is cut off for balance. Shorter ones spoil the waves
# of large batches (17 rows of 900: 24.7 us with 16, 29.5 with 8), longer ones let small batches
# wait (7 rows of 900 and one of 8,192: 37 and 25 us; H200, docs/LOG.md 2026-11-24).
LEAST_PART, LEAST_PART_OF_FEW = 16, 8


def split_rule(batch: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """A power of two, at most MAX_SPLITS: enough programs for every SM, no part under one tile.

    It depends on the batch bucket and the longest sequence that the bucket may hold, never on the
    lengths at hand, so that a CUDA graph stays valid while they change.
    """
    wanted = max(1, _PROGRAMS_PER_SM * num_sms // max(1, batch * num_kv_heads))
    tiles = max(1, -(-max_seq_len // TILE))
    most = min(wanted, tiles, MAX_SPLITS)
    return 1 << (most.bit_length() - 1)


def least_part(num_splits: int) -> int:
    """Rows that are cut anyhow belong to small batches."""
    return LEAST_PART if num_splits == 1 else LEAST_PART_OF_FEW


def most_extra_parts(num_kv_heads: int, num_sms: int) -> int:
    """Slots for parts beyond the grid's own (`decode_parts.py`): with no part longer than 1 /
    SHARES_PER_SM of what an SM has to read, there are never more."""
    return -(-SHARES_PER_SM * num_sms // num_kv_heads)


def crowds(num_programs: int, num_sms: int) -> bool:
    """Whether programs are so many that several an SM hide each other's waiting."""
    return num_programs >= _CROWD * num_sms


def pipeline_depth(
    batch: int, num_kv_heads: int, num_splits: int, num_sms: int, tile_bytes: int, block_size: int
) -> int:
    """Tiles of K and V that a program has on their way while it computes with another.

    More hide more of the memory's latency, and leave room for fewer programs an SM: the least with
    which programs come in full waves; where none does, two; where fewer leave no more room, the
    most. Steps of the 8B shape (ms, depth 1 / 2 / 3, H200, docs/LOG.md 2026-12-01): 16 rows of 900
    4.96 / 4.83 / 4.78, 24 of 4,096 7.56 / 7.58 / 7.92, 48 of 2,048 7.63 / 7.59 / 7.96, 64 of 640
    5.92 / 6.07 / 6.00, 96 of 2,048 12.1 / 10.9 / 11.0. Uneven rows would rather have two: 31 of 640
    and one of 8,192 5.70 / 5.62 / 5.85, 64 of 64 to 4,032 9.34 / 8.98 / 9.09; the rule looks at
    none. A single row: one where more would fill half an SM, as the kernels that follow read their
    weights meanwhile if they find room (640 tokens: 3.81 / 4.24 / 4.26). Rows in many parts, or in
    a crowd, that meet pages smaller than a tile: one, not measured.
    """
    deepest = max(_LEAST_DEPTH, min(_DEPTH, _SHARED_BYTES // tile_bytes))
    programs = batch * num_kv_heads * num_splits
    if block_size < TILE:
        return _LEAST_DEPTH if num_splits > 2 or crowds(programs, num_sms) else deepest
    if batch == 1:
        crowded = 2 * _PROGRAMS_PER_SM * deepest * tile_bytes > _SM_BYTES
        return _LEAST_DEPTH if crowded else deepest
    at_once = {depth: _at_once(depth, tile_bytes) for depth in range(_LEAST_DEPTH, deepest + 1)}
    full = [n for n in at_once.values() if fills_waves(programs, num_sms * n)]
    wanted = max(full) if full else at_once[min(2, deepest)]
    return max(depth for depth, n in at_once.items() if n == wanted)


def _at_once(depth: int, tile_bytes: int) -> int:
    """Programs of an SM."""
    return max(1, min(_MOST_PER_SM, _SM_BYTES // (depth * tile_bytes)))


def fills_waves(num_programs: int, num_sms: int, least: float = 0.9) -> bool:
    """Whether programs, one an SM at a time, use at least that part of the SMs' time."""
    waves = -(-num_programs // num_sms)
    return num_programs >= least * waves * num_sms
