"""Joins supervision to routing: hands each incarnation's control socket to its EngineClient."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from pdrelay.router.engine_client import Observer, StreamEngineClient


class SupervisedInstance(Observer, Protocol):
    """What is used of `launch.Instance`."""

    @property
    def instance(self) -> str: ...


class Bridge:
    """The supervisor's listener (`launch.instance.Listener`)."""

    def __init__(
        self,
        clients: Iterable[StreamEngineClient],
        on_exit: Callable[[str, str], None] | None = None,
    ) -> None:
        """`on_exit(instance, reason)` follows when every rank of an incarnation is reaped."""
        self._clients = {client.instance: client for client in clients}
        self._on_exit = on_exit

    def on_started(self, instance: SupervisedInstance, sock: socket.socket) -> None:
        self._clients[instance.instance].connect(sock, instance)

    def on_exited(self, instance: SupervisedInstance, reason: str) -> None:
        if self._on_exit is not None:
            self._on_exit(instance.instance, reason)
