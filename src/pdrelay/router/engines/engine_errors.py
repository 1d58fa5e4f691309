"""What an engine's error response says."""

from __future__ import annotations

import msgspec


class EngineError(msgspec.Struct):
    message: str = ""


class _Answer(msgspec.Struct):
    error: EngineError | None = None
    message: str = ""  # of older versions


_DECODER = msgspec.json.Decoder(_Answer)


def error_text(data: bytes) -> str:
    """As one line, whatever came."""
    try:
        answer = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = data.decode("utf-8", "replace")
    else:
        text = answer.error.message if answer.error is not None else answer.message
    return " ".join(text.split())[:500] or "no reason given"
