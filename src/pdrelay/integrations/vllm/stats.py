"""Counters of one rank's hand-overs, and how they add up over steps and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from pdrelay.integrations.vllm.messages import Done


@dataclass
class HandOverStats:
    """Sums since the last `take`."""

    num_transfers: int = 0
    num_bytes: int = 0  # stored (producer) or received (consumer)
    num_pieces: int = 0
    num_failed: int = 0
    num_expired: int = 0  # of the failed: leases nobody renewed
    busy_ns: int = 0  # in copies
    span_ns: int = 0  # first to last store

    def __bool__(self) -> bool:
        """Whether anything happened."""
        return any(vars(self).values())

    def observe(self, done: Done) -> None:
        """Count a transfer; a consumer adds its bytes itself."""
        self.num_transfers += 1
        self.num_pieces += done.num_pieces
        self.busy_ns += done.busy_ns
        self.span_ns += done.end_ns - done.start_ns

    def take(self) -> dict[str, int]:
        """The sums, and begin anew; empty if nothing happened."""
        if not self:
            return {}
        taken = dict(vars(self))
        vars(self).update(dict.fromkeys(taken, 0))
        return taken


def add_stats(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Sums of two takes."""
    return {key: a.get(key, 0) + b.get(key, 0) for key in [*a, *(k for k in b if k not in a)]}
