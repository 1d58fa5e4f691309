"""Transports for loop tests, by name."""

from __future__ import annotations

from pathlib import Path

from pdrelay.engine.fake_runner import fake_layout
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.nccl_fake import FakeNccl
from pdrelay.transport.pool import create_pool
from pdrelay.transport.registry import TransportOptions, create_transport

# `@host`: over a fake device, whose work is done when it is launched.
TRANSPORTS = ["mapped", "tcp", "pool", "mapped@host", "nccl@host", "tcp@host", "pool@host"]


class TransportKit:
    """Makes the transport of each instance, and plays the launcher's part for `pool`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, _, self.where = name.partition("@")
        self._fabric = HostFabric()
        self._nccl = FakeNccl()
        self.directory = str(directory)
        self._pool = create_pool(fake_layout(), 128) if self.name == "pool" else None
        self._indices: dict[str, int] = {}

    def factory(self, pages, instance):
        options = TransportOptions(
            timeout_s=5.0,
            nccl=self._nccl,
            instance_index=self._indices.setdefault(instance, len(self._indices)),
            pool=self._pool.description if self._pool else b"",
            pool_fd=self._pool.fd if self._pool else -1,
        )
        if self.where == "host":
            pages = HostPages(pages, HostDevice(self._fabric, instance))
        return create_transport(self.name, pages, instance, options)

    def reclaim(self, instance):
        """What the launcher does after an instance died."""
        if self._pool is not None:
            self._pool.reclaim(self._indices[instance.name])

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._pool is not None:
            self._pool.close()
