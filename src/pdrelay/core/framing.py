"""Length-prefixed msgpack frames: one codec for asyncio and for blocking or polled sockets.

A frame is a little-endian uint32 length and that many bytes of msgpack. Token ids are a byte string
in it (`core/token_ids.py`).
"""

from __future__ import annotations

import struct
from array import array
from typing import Any, Generic, TypeVar

import msgspec

from pdrelay.core.token_ids import TokenIds, ids_from_bytes, ids_to_bytes
from pdrelay.errors import ProtocolError

MAX_FRAME_BYTES = 256 << 20
_HEADER = struct.Struct("<I")

T = TypeVar("T")


class FrameCodec(Generic[T]):
    """Encode messages to frames and cut a byte stream back into messages of one union type."""

    def __init__(self, message_type: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_ids)
        self._decoder = msgspec.msgpack.Decoder(message_type, dec_hook=_decode_ids)
        self._buffer = bytearray()

    def encode(self, message: Any) -> bytearray:
        frame = bytearray(_HEADER.size)
        self._encoder.encode_into(message, frame, _HEADER.size)
        _HEADER.pack_into(frame, 0, len(frame) - _HEADER.size)
        return frame

    def feed(self, data: bytes | bytearray | memoryview) -> list[T]:
        """Take received bytes, return the messages they complete.

        Raises ProtocolError for an oversized frame or a message that does not decode.
        """
        self._buffer += data
        messages: list[T] = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
            end = start + _HEADER.size + length
            if len(self._buffer) < end:
                break
            body = bytes(memoryview(self._buffer)[start + _HEADER.size : end])
            try:
                messages.append(self._decoder.decode(body))
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise ProtocolError(f"undecodable message: {error}") from error
            start = end
        if start:
            del self._buffer[:start]
        return messages


def _encode_ids(value: Any) -> bytes:
    if not isinstance(value, array):
        raise NotImplementedError(f"{type(value).__name__} cannot be sent")
    return ids_to_bytes(value)


def _decode_ids(kind: type, value: Any) -> TokenIds:
    """Raises ValueError, which the decoder reports with the place in the message."""
    assert kind is array
    if not isinstance(value, bytes):
        raise ValueError(f"token ids are bytes, not {type(value).__name__}")
    return ids_from_bytes(value)
