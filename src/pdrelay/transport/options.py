"""What a transport may be told, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdrelay.transport.fake import FakeFabric
    from pdrelay.transport.nccl_library import NcclLibrary


@dataclass(frozen=True)
class TransportOptions:
    """Options of `create_transport`; each transport reads those that concern it."""

    timeout_s: float = 30.0  # a stalled peer is given up after this
    tcp_host: str = "127.0.0.1"  # tcp: the address to listen on, and that producers connect to
    pool: bytes = b""  # pool: PoolHandle.description
    pool_fd: int = -1  # pool: PoolHandle.fd, inherited from the launcher
    instance_index: int = 0  # pool: unique among live instances, stable over restarts
    nccl: NcclLibrary | None = None  # nccl: instead of the installed one
    fabric: FakeFabric | None = None  # fake: what connects the instances of one test
