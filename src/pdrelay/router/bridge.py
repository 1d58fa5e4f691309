"""Joins supervision to routing: tells each EngineClient how to reach its new incarnation."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.router.engine_client import Observer, StreamEngineClient
from pdrelay.router.engines.http_client import HttpEngineClient


class SupervisedInstance(Observer, Protocol):
    """What is used of `launch.Instance`."""

    @property
    def instance(self) -> str: ...


class Bridge:
    """The supervisor's listener (`launch.instance.Listener`)."""

    def __init__(
        self,
        clients: Iterable[StreamEngineClient | HttpEngineClient],
        on_exit: Callable[[str, str], None] | None = None,
    ) -> None:
        """`on_exit(instance, reason)` follows when every rank of an incarnation is reaped."""
        self._clients = {client.instance: client for client in clients}
        self._on_exit = on_exit

    def on_started(
        self, instance: SupervisedInstance, control: socket.socket | HttpEndpoint
    ) -> None:
        match self._clients[instance.instance], control:
            case StreamEngineClient() as streaming, socket.socket():
                streaming.connect(control, instance)
            case HttpEngineClient() as http, HttpEndpoint():
                http.connect(control, instance)
            case client, _:
                raise AssertionError(f"{type(client).__name__} cannot use {control!r}")

    def on_exited(self, instance: SupervisedInstance, reason: str) -> None:
        client = self._clients[instance.instance]
        if isinstance(client, HttpEngineClient):  # no socket of its own tells it
            client.close(reason)
        if self._on_exit is not None:
            self._on_exit(instance.instance, reason)
