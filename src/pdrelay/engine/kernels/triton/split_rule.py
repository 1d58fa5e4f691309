"""Shapes of the decode kernels' grids: by arithmetic, without triton or torch."""

from __future__ import annotations

TILE = 64  # keys of one step of the kernel's loop
MAX_SPLITS = 32
_PROGRAMS_PER_SM = 2
_STAGES, _MOST_STAGES, _FEWEST_STAGES = 3, 7, 2
_CROWD = 3  # programs an SM that hide each other's waiting
_SHARED_BYTES = 224 << 10  # of 227 KiB an SM has for one program
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


def pipeline_stages(
    num_programs: int, num_splits: int, head_dim: int, itemsize: int, num_sms: int
) -> int:
    """Depth of the K/V pipeline.

    Rows in one or two parts make long programs. Few an SM: each keeps many tiles on their way.
    Many: short pipelines, so that several fit an SM (64 rows of the 8B shape behind 640 tokens: a
    step of 5.83 ms with 2 stages, 5.95 with 7; 32 rows: 5.33 and 5.10; 16 rows of 900 in two parts,
    attention of a layer: 25.2 us with 3, 22.0 with 7; H200, docs/LOG.md 2026-11-24).
    """
    if num_splits > 2:
        return _STAGES
    if num_programs >= _CROWD * num_sms:
        return _FEWEST_STAGES
    tile_bytes = 2 * TILE * head_dim * itemsize
    return max(_STAGES, min(_MOST_STAGES, _SHARED_BYTES // tile_bytes))


def fills_waves(num_programs: int, num_sms: int, least: float = 0.9) -> bool:
    """Whether programs, one an SM at a time, use at least that part of the SMs' time."""
    waves = -(-num_programs // num_sms)
    return num_programs >= least * waves * num_sms
