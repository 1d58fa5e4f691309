"""TCP ports of engine instances: asked from the kernel, and kept from everyone else."""

from __future__ import annotations

import socket
from types import TracebackType


class Ports:
    """A loopback port for each name, the same for all incarnations, until `close`.

    Each is held by a socket that is bound with SO_REUSEADDR and never listens: the kernel gives
    its port to nobody, and lets a server that sets SO_REUSEADDR too bind and listen on it.
    """

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}

    def port(self, name: str) -> int:
        """Raises OSError when the kernel has no free port."""
        if name not in self._held:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._held[name] = sock
            sock.bind(("127.0.0.1", 0))
        return int(self._held[name].getsockname()[1])

    def close(self) -> None:
        for sock in self._held.values():
            sock.close()
        self._held.clear()

    def __enter__(self) -> Ports:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
