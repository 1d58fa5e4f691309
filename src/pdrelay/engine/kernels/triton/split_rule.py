"""Shapes of the decode kernels' grids: by arithmetic, without triton or torch."""

from __future__ import annotations

TILE = 64  # keys of one step of the kernel's loop
MAX_SPLITS = 32
_PROGRAMS_PER_SM = 2
_STAGES, _MOST_STAGES, _FEWEST_STAGES = 3, 7, 2
_CROWD = 3  # programs an SM that hide each other's waiting
_SHARED_BYTES = 224 << 10  # of 227 KiB an SM has for one program
SHARES_PER_SM = 2  # a part has at most a half of what an SM has to read in all
LEAST_PART = 16  # tiles of a part that is cut off for balance


def split_rule(batch: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """A power of two, at most MAX_SPLITS: enough programs for every SM, no part under one tile.

    It depends on the batch bucket and the longest sequence that the bucket may hold, never on the
    lengths at hand, so that a CUDA graph stays valid while they change.
    """
    wanted = max(1, _PROGRAMS_PER_SM * num_sms // max(1, batch * num_kv_heads))
    tiles = max(1, -(-max_seq_len // TILE))
    most = min(wanted, tiles, MAX_SPLITS)
    return 1 << (most.bit_length() - 1)


def most_extra_parts(num_kv_heads: int, num_sms: int) -> int:
    """Slots for parts beyond the grid's own (`decode_parts.py`): with no part longer than 1 /
    SHARES_PER_SM of what an SM has to read, there are never more."""
    return -(-SHARES_PER_SM * num_sms // num_kv_heads)


def pipeline_stages(
    num_programs: int, num_splits: int, head_dim: int, itemsize: int, num_sms: int
) -> int:
    """Depth of the K/V pipeline.

    Uncut rows make long programs. Few an SM: each keeps many tiles on their way. Many: short
    pipelines, so that several fit an SM (64 rows of the 8B shape behind 640 tokens: a step of
    5.83 ms with 2 stages, 5.95 with 7; 32 rows: 5.33 and 5.10; H200, docs/LOG.md 2026-11-24).
    """
    if num_splits > 1:
        return _STAGES
    if num_programs >= _CROWD * num_sms:
        return _FEWEST_STAGES
    tile_bytes = 2 * TILE * head_dim * itemsize
    return max(_STAGES, min(_MOST_STAGES, _SHARED_BYTES // tile_bytes))


def fills_waves(num_programs: int, num_sms: int, least: float = 0.9) -> bool:
    """Whether programs, one an SM at a time, use at least that part of the SMs' time."""
    waves = -(-num_programs // num_sms)
    return num_programs >= least * waves * num_sms
