"""The transfers of one producer link, from `begin` to their end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pdrelay.errors import TransportError
from pdrelay.transport.meter import Meter


@dataclass
class OpenTransfer:
    """What every link keeps of a transfer; links derive what else they need."""

    transfer_id: str
    meter: Meter = field(default_factory=Meter)
    finished: bool = False  # no further `send`


T = TypeVar("T", bound=OpenTransfer)


class OpenTransfers(Generic[T]):
    """Refuses what the seam's rules forbid. Not thread-safe: a link with threads locks around it.

    A transfer is open from `begin` on, takes sends until `finish`, and stays until `pop`.
    """

    def __init__(self) -> None:
        self._open: dict[str, T] = {}
        self._broken = ""

    def begin(self, transfer: T) -> None:
        """Raises TransportError when the link is broken or the id is open already."""
        self.check_alive()
        if transfer.transfer_id in self._open:
            raise TransportError(f"transfer {transfer.transfer_id} is open already")
        self._open[transfer.transfer_id] = transfer

    def sending(self, transfer_id: str) -> T:
        """The transfer, which takes sends. Raises TransportError for any other id."""
        transfer = self._open.get(transfer_id)
        if transfer is None or transfer.finished:
            raise TransportError(f"transfer {transfer_id} is not open")
        return transfer

    def get(self, transfer_id: str) -> T | None:
        return self._open.get(transfer_id)

    def finish(self, transfer_id: str) -> T:
        """As `sending`, and no further `send` is taken."""
        transfer = self.sending(transfer_id)
        transfer.finished = True
        return transfer

    def is_open(self, transfer: T) -> bool:
        """Whether this very transfer still is (an id may be used again after an abort)."""
        return self._open.get(transfer.transfer_id) is transfer

    def pop(self, transfer_id: str) -> T | None:
        """The transfer ended, in whatever way; unknown ids are ignored."""
        return self._open.pop(transfer_id, None)

    def all(self) -> list[T]:
        return list(self._open.values())

    def check_alive(self) -> None:
        """Raises TransportError once the link is broken."""
        if self._broken:
            raise TransportError(self._broken)

    @property
    def broken(self) -> bool:
        return bool(self._broken)

    def break_off(self, message: str) -> list[T]:
        """Take no further transfer or send: `message` says why, the first one counts. Returns
        what was open, in the order it began."""
        self._broken = self._broken or message
        transfers = self.all()
        self._open.clear()
        return transfers
