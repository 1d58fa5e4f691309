"""Shapes of the decode kernels' grids: by arithmetic, without triton or torch."""

from __future__ import annotations

TILE = 64  # keys of one step of the kernel's loop
MAX_SPLITS = 32
_PROGRAMS_PER_SM = 2
_DEPTH, _LEAST_DEPTH = 3, 1
_CROWD = 3  # programs an SM
_SHARED_BYTES = 112 << 10  # a program's, of 228 KiB an SM has for _PROGRAMS_PER_SM
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


def pipeline_depth(crowded: bool, num_splits: int, tile_bytes: int, block_size: int) -> int:
    """Tiles of K and V that a program has on their way while it computes with another.

    Three where two programs an SM have room for them: of the 8B shape, 32 KiB each. (16 rows of
    900, a layer's attention and RoPE: 23.4 us with 3, 28.5 with 6 and one program an SM; H200,
    docs/LOG.md 2026-11-30.) One where programs crowd the SMs (64 rows of the 8B shape behind 640
    tokens: a step of 5.83 ms with 1, 5.95 with 3; 32 rows: 5.33 and 5.10; docs/LOG.md 2026-11-24;
    all of this with the loop before the one that reads tables ahead). One, too, where rows in many
    parts meet pages smaller than a tile: not measured.
    """
    if crowded:
        return _LEAST_DEPTH
    if block_size < TILE and num_splits > 2:
        return _LEAST_DEPTH
    return max(_LEAST_DEPTH, min(_DEPTH, _SHARED_BYTES // tile_bytes))


def fills_waves(num_programs: int, num_sms: int, least: float = 0.9) -> bool:
    """Whether programs, one an SM at a time, use at least that part of the SMs' time."""
    waves = -(-num_programs // num_sms)
    return num_programs >= least * waves * num_sms
