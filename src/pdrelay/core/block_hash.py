"""Chained content hashes of blocks: equal keys mean equal token prefixes.

Key i is SHA-256 over key i-1 and the token ids of block i, so a key names the whole prefix up to
and including its block. 256 bits make an accidental or crafted collision infeasible (a 64-bit
Python hash is neither; see CVE-2025-25183 on vLLM's).
"""

from __future__ import annotations

import hashlib

from pdrelay.core.token_ids import ID_BYTES, TokenIds


def root_key(cache_salt: str = "") -> bytes:
    """The parent of block 0. Requests with different salts share nothing."""
    return hashlib.sha256(b"pdrelay-block-v1:" + cache_salt.encode()).digest()


def extend_keys(
    keys: list[bytes],
    token_ids: TokenIds,
    block_size: int,
    cache_salt: str = "",
    num_blocks: int | None = None,
) -> None:
    """Append to `keys` the keys that it does not hold yet of the full blocks of `token_ids`, of the
    first `num_blocks` of them, or of all."""
    first, stop = len(keys), len(token_ids) // block_size
    if num_blocks is not None:
        stop = min(stop, num_blocks)
    if first >= stop:
        return
    parent = keys[-1] if keys else root_key(cache_salt)
    raw = token_ids[first * block_size : stop * block_size].tobytes()
    step = block_size * ID_BYTES
    for start in range(0, len(raw), step):
        parent = hashlib.sha256(parent + raw[start : start + step]).digest()
        keys.append(parent)


def tail_key(request_id: str) -> bytes:
    """A key for a partial last block: unique to one request, shared by nobody."""
    return hashlib.sha256(b"pdrelay-tail-v1:" + request_id.encode()).digest()
