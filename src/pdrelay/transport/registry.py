"""Transports by name. A module is imported when its transport is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from pdrelay.errors import ConfigError
from pdrelay.transport.base import Transport
from pdrelay.transport.device import DevicePages
from pdrelay.transport.options import TransportOptions
from pdrelay.transport.pages import SharedPages

__all__ = ["TRANSPORTS", "TransportOptions", "create_transport"]

TRANSPORTS = ("mapped", "nccl", "tcp", "pool", "fake")  # each a module with `create`

_Create = Callable[[SharedPages | DevicePages, str, TransportOptions], Transport]


def create_transport(
    name: str, pages: SharedPages | DevicePages, instance: str, options: TransportOptions
) -> Transport:
    """Build one rank's transport over `pages`.

    Raises ConfigError for an unknown name or missing options, TransportError when what it needs
    (a port, the shared pool) cannot be had.
    """
    if name not in TRANSPORTS:
        raise ConfigError(f"unknown transport {name!r}: choose one of {', '.join(TRANSPORTS)}")
    create = cast(_Create, import_module(f"pdrelay.transport.{name}").create)
    return create(pages, instance, options)
