"""What transport `tcp` puts on the wire.

A connection starts with a greeting, MAGIC and the consumer's 32-byte token. Frames follow: a
header, then the pages of `num_blocks` request blocks of one layer. The consumer answers nothing.
No block id travels: the consumer places request blocks itself, so a header can name no memory.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import Annotated

import msgspec

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ProtocolError

MAGIC = b"pdrelay\x01"
TOKEN_BYTES = 32
GREETING_BYTES = len(MAGIC) + TOKEN_BYTES
DIGEST_BYTES = 16

_HEADER = struct.Struct("<4s16sIII")
_FRAME_MARK = b"KVpg"
HEADER_BYTES = _HEADER.size
# Buffers of one sendmsg or recvmsg; the kernel refuses more (1,024 on Linux).
MAX_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 512)


class TcpDescriptor(msgspec.Struct, frozen=True, tag="tcp"):
    """Where a consumer listens, and the secret that its producers show."""

    instance: str
    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]


@dataclass(frozen=True)
class Header:
    digest: bytes
    layer: int
    first_block: int
    num_blocks: int


def digest_of(transfer_id: str) -> bytes:
    """A transfer's name on the wire."""
    return hashlib.blake2b(transfer_id.encode(), digest_size=DIGEST_BYTES).digest()


def encode_header(header: Header) -> bytes:
    return _HEADER.pack(
        _FRAME_MARK, header.digest, header.layer, header.first_block, header.num_blocks
    )


def decode_header(data: bytes | bytearray | memoryview, layout: KVLayout) -> Header:
    """Raises ProtocolError unless it is a header of pages that `layout` could hold."""
    mark, digest, layer, first_block, num_blocks = _HEADER.unpack(data)
    if mark != _FRAME_MARK:
        raise ProtocolError("not a frame header")
    if layer >= layout.num_layers or not 1 <= num_blocks <= layout.num_blocks:
        raise ProtocolError(f"layer {layer} of {num_blocks} blocks does not fit this KV pool")
    return Header(digest, layer, first_block, num_blocks)


class Vector:
    """Buffers that socket calls work off in order."""

    def __init__(self, buffers: list[memoryview]) -> None:
        self._buffers = buffers
        self._next = 0

    @property
    def done(self) -> bool:
        return self._next == len(self._buffers)

    def head(self) -> list[memoryview]:
        """What the next call takes."""
        return self._buffers[self._next : self._next + MAX_BUFFERS]

    def advance(self, count: int) -> None:
        """`count` bytes of `head` are done."""
        while count:
            view = self._buffers[self._next]
            if count < len(view):
                self._buffers[self._next] = view[count:]
                return
            count -= len(view)
            self._next += 1
