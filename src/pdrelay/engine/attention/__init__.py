"""Attention over paged KV: one interface, several backends."""

from __future__ import annotations

from pdrelay.engine.attention.base import AttentionBackend, AttentionShape
from pdrelay.engine.attention.context import DecodeSegment, ForwardContext, PrefillSegment

__all__ = [
    "AttentionBackend",
    "AttentionShape",
    "DecodeSegment",
    "ForwardContext",
    "PrefillSegment",
]
