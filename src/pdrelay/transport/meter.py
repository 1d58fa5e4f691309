"""Bytes, pieces and times of one transfer, as one side sees it."""

from __future__ import annotations

from dataclasses import dataclass

from pdrelay.transport.base import TransferReport


@dataclass
class Meter:
    """Counts up to a TransferReport. Times are CLOCK_MONOTONIC ns."""

    num_bytes: int = 0
    num_pieces: int = 0
    start_ns: int = 0
    end_ns: int = 0
    busy_ns: int = 0

    def add(self, start_ns: int, end_ns: int, num_bytes: int, num_pieces: int) -> None:
        """One stretch of moving: `num_bytes` and `num_pieces` completed within it."""
        if self.start_ns == 0:
            self.start_ns = start_ns
        self.end_ns = end_ns
        self.busy_ns += end_ns - start_ns
        self.num_bytes += num_bytes
        self.num_pieces += num_pieces

    def report(self, transfer_id: str, transport: str) -> TransferReport:
        return TransferReport(
            transfer_id=transfer_id,
            transport=transport,
            num_bytes=self.num_bytes,
            num_pieces=self.num_pieces,
            start_ns=self.start_ns,
            end_ns=self.end_ns,
            busy_ns=self.busy_ns,
        )
