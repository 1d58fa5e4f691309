"""The shared CPU pool of transport `pool`, made by the launcher, inherited by every rank."""

from __future__ import annotations

from typing import Protocol

from pdrelay.core.kv_layout import KVLayout


class SharedPool(Protocol):
    """What the launcher needs of it."""

    @property
    def description(self) -> bytes:
        """msgpack, for the ranks."""

    @property
    def fd(self) -> int: ...

    def reclaim(self, instance_index: int) -> None:
        """Take back the pins and half-written slots of a dead instance."""

    def close(self) -> None: ...


class NoPool:
    """What every other transport shares."""

    description = b""
    fd = -1

    def reclaim(self, instance_index: int) -> None:
        pass

    def close(self) -> None:
        pass


def open_shared_pool(transport: str, layout: KVLayout) -> SharedPool:
    """A pool of as many blocks as one rank's KV cache, or NoPool. Raises TransportError."""
    if transport != "pool":
        return NoPool()
    from pdrelay.transport.pool import create_pool  # numpy, only where it is needed

    return create_pool(layout, layout.num_blocks)
