"""The token ids of a prompt: an array of uint32, a tenth of a list's bytes.

On a socket they are raw little-endian bytes, so a message with 8,192 ids decodes in microseconds.
Everything that makes JSON needs a list: `ids.tolist()`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    TokenIds: TypeAlias = array[int]
else:
    TokenIds = array  # what message types are checked against; typecode "I"

ID_BYTES = 4
assert array("I").itemsize == ID_BYTES


def pack_ids(ids: Iterable[int]) -> TokenIds:
    """Raises OverflowError for ids below 0 or from 2**32 on: the front door refuses them before."""
    return array("I", ids)


def ids_to_bytes(ids: TokenIds) -> bytes:
    assert ids.typecode == "I"
    return _little_endian(ids).tobytes()


def ids_from_bytes(data: bytes) -> TokenIds:
    """Raises ValueError where `data` is no whole number of ids."""
    ids = array("I")
    ids.frombytes(data)
    return _little_endian(ids)


def _little_endian(ids: TokenIds) -> TokenIds:
    if sys.byteorder == "little":
        return ids
    swapped = ids[:]
    swapped.byteswap()
    return swapped
