"""How many parts a decode row's keys are cut into. No triton, no torch."""

from __future__ import annotations

TILE = 64  # keys of one step of the kernel's loop
MAX_SPLITS = 32
_PROGRAMS_PER_SM = 2


def split_rule(batch: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """A power of two, at most MAX_SPLITS: enough programs for every SM, no part under one tile.

    It depends on the batch bucket and the longest sequence that the bucket may hold, never on the
    lengths at hand, so that a CUDA graph stays valid while they change.
    """
    wanted = max(1, _PROGRAMS_PER_SM * num_sms // max(1, batch * num_kv_heads))
    tiles = max(1, -(-max_seq_len // TILE))
    most = min(wanted, tiles, MAX_SPLITS)
    return 1 << (most.bit_length() - 1)
