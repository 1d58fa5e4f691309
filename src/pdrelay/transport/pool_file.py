"""What lies where in the shared pool's file.

In this order: a header, the index (one array a field), and the slots in the layout of a KV pool.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Sequence

import msgspec
import numpy as np

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.pages import anonymous_file

KEY_BYTES = 32
MAGIC = 0x70647265706F6F31  # "pdrepoo1"
_ALIGN = 4096


class State(enum.IntEnum):
    """Of a slot."""

    FREE = 0
    WRITING = 1  # owned by the producer that writes it
    READY = 2


class LeaseState(enum.IntEnum):
    FREE = 0
    OPEN = 1  # the producer still sends
    FINISHED = 2  # the consumer may take


class Head(enum.IntEnum):
    """Words of the header."""

    MAGIC = 0
    DIRTY = 1
    VERSION = 2  # of the index; one more at each change of a slot's key
    TICK = 3  # of the LRU clock


class PoolDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a process needs beside the fd. `layout.num_blocks` is the number of slots."""

    layout: KVLayout
    num_leases: int


def fields_of(description: PoolDescription) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the header's and the index's arrays, in the file's order."""
    num_slots, num_leases = description.layout.num_blocks, description.num_leases
    return [
        ("head", "u8", (8,)),
        ("state", "u1", (num_slots,)),
        ("private", "u1", (num_slots,)),  # nobody else will ask for it: free it when unpinned
        ("writer", "i2", (num_slots,)),
        ("pins", "i4", (num_slots,)),
        ("used", "u8", (num_slots,)),
        ("changed", "u8", (num_slots,)),
        ("key", "u1", (num_slots, KEY_BYTES)),
        ("lease_state", "u1", (num_leases,)),
        ("lease_producer", "i2", (num_leases,)),
        ("lease_consumer", "i2", (num_leases,)),
        ("lease_length", "i4", (num_leases,)),  # blocks, up to the last one placed
        ("lease_name", "u8", (num_leases, 2)),
        # slot + 1, or 0; rows untouched cost nothing
        ("lease_slots", "i4", (num_leases, num_slots)),
    ]


def plan_of(description: PoolDescription) -> tuple[dict[str, int], int, int]:
    """Offsets of the fields, offset of the slots, size of the file."""
    offsets: dict[str, int] = {}
    position = 0
    for name, dtype, shape in fields_of(description):
        offsets[name] = position
        size = math.prod(shape) * np.dtype(dtype).itemsize
        position = -(-(position + size) // 64) * 64
    slots = -(-position // _ALIGN) * _ALIGN
    return offsets, slots, slots + description.layout.total_bytes


def create_pool_file(description: PoolDescription) -> int:
    """A new pool: an fd without a name. Raises TransportError when there is no memory for it."""
    size = plan_of(description)[2]
    try:
        fd = anonymous_file(size, "pdrelay-pool")
    except (OSError, OverflowError) as error:
        raise TransportError(
            f"cannot make a shared pool of {size} bytes ({error}): use fewer slots"
        ) from error
    os.pwrite(fd, np.array([MAGIC], "u8").tobytes(), 0)
    return fd


def check_keys(keys: Sequence[bytes]) -> None:
    if any(len(key) != KEY_BYTES for key in keys):
        raise TransportError(f"keys of the shared pool are {KEY_BYTES} bytes long")
