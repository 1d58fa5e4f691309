"""Transports for loop tests, by name."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pdrelay.engine.fake_runner import fake_layout
from pdrelay.transport.registry import TransportOptions, create_transport

TRANSPORTS = ["mapped", "tcp", "pool"]


class TransportKit:
    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = str(directory)
        self.layer_wise = name in ("mapped", "tcp")
        self._stack = contextlib.ExitStack()
        self._indices: dict[str, int] = {}

    def factory(self, pages, instance):
        index = self._indices.setdefault(instance, len(self._indices))
        options = TransportOptions(timeout_s=5.0, instance_index=index)
        return create_transport(self.name, pages, instance, options)

    def reclaim(self, instance):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stack.close()
