"""Every figure that the report of `pdrelay kv` shows, as `summary.json` holds it.

Milliseconds unless named. The page and the terminal tables are drawn from these structs alone.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdrelay.lab.kv.rundir import KvRunInfo
from pdrelay.lab.stats import Estimate

SCHEMA_VERSION = 1


class BytesFigures(msgspec.Struct, kw_only=True):
    """KV bytes of one token."""

    per_token: int
    per_token_rank: int
    arithmetic: str
    remark: str  # on the exercise's figures, for the model that it speaks of


class CopyRow(msgspec.Struct, kw_only=True):
    """A plain copy of as many bytes in one piece: what the link can do."""

    tokens: int
    num_bytes: int
    time: Estimate
    gb_per_s: Estimate


class TransferRow(msgspec.Struct, kw_only=True):
    """One transport, placement, page size and length.

    bulk: first piece begun to the consumer knowing that all is there, the whole prompt at once.
    copy_share: plain copy's time over bulk's, same bytes, paired by repeat. exposed: layer by
    layer, from the end of the last layer's computation to the consumer knowing. added: by which
    computation and sending in turn took longer than the median of the same computation alone.
    slowed: the same as a ratio, paired by repeat.
    """

    transport: str
    placement: str
    block_size: int
    tokens: int
    num_bytes: int
    num_pieces: float  # median
    bulk: Estimate
    busy: Estimate  # the producer inside copies or socket calls
    gb_per_s: Estimate  # bytes over bulk
    copy_share: Estimate
    exposed: Estimate
    added: Estimate
    slowed: Estimate


class LinkFigures(msgspec.Struct, kw_only=True):
    """One link under one model, predicted."""

    model: str
    tp: int
    compute: str
    compute_source: str
    link: str
    link_source: str
    link_gb_per_s: float  # one rank's, or the host's where ranks share it
    shared: bool
    points: list[PredictedPoint]
    bulk_above: float | None  # between these lengths moving takes longer than prefill
    bulk_below: float | None
    layerwise_above: float | None  # the same of what layer-wise hand-over exposes
    layerwise_below: float | None


class PredictedPoint(msgspec.Struct, kw_only=True):
    tokens: int
    num_bytes: int
    prefill: float
    bulk: float  # all of it exposed
    exposed: float  # layer-wise
    kv_gb_per_s: float  # at which prefill makes KV


class ServeRow(msgspec.Struct, kw_only=True):
    """One prompt length on real servers: P/D beside one replica."""

    tokens: int
    ttft: Estimate
    ttft_alone: Estimate  # one replica
    ttft_ratio: Estimate
    prefill: Estimate  # on P, with hand-over
    prefill_alone: Estimate
    prefill_ratio: Estimate
    hand_over: Estimate  # first gap less the request's median later gap: TTST - TTFT - ITL
    hand_over_alone: Estimate
    transfer_busy: Estimate
    transfer_tail: Estimate  # transfer's end after prefill's end
    num_bytes: float
    num_pieces: float


class SideBySideRow(msgspec.Struct, kw_only=True):
    """One prompt length on two servers at once. Ratios: medians over pairs of requests."""

    tokens: int
    prefill: Estimate  # on P, with hand-over
    prefill_alone: Estimate  # one replica
    prefill_ratio: Estimate
    ttft: Estimate
    ttft_alone: Estimate
    ttft_ratio: Estimate


class KvSummary(msgspec.Struct, kw_only=True):
    """`summary.json`."""

    schema_version: int = SCHEMA_VERSION
    run: KvRunInfo
    environment: dict[str, Any]
    kv: BytesFigures
    copies: list[CopyRow]
    peak_gb_per_s: float | None  # of the plain copies' medians, the highest
    transfers: list[TransferRow]
    side_by_side: list[SideBySideRow]
    predictions: list[LinkFigures]
    serve: list[ServeRow]
    serve_notes: list[str]
