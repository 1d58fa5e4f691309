"""The front door's listening socket, taken before any worker starts."""

from __future__ import annotations

import errno
import socket

from pdrelay.errors import ConfigError

BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any free one.

    Raises ConfigError that names the port and the flag.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host} is no address of this machine: try 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(_explain(error, host, port)) from None
    return sock


def _explain(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is in use: choose another with --port (0 takes any free)"
        case errno.EACCES:
            return f"port {port} needs privileges: choose one from 1024 up with --port"
        case errno.EADDRNOTAVAIL:
            return f"--host {host} is no address of this machine: try 127.0.0.1"
        case _:
            return (
                f"cannot listen on {host} port {port} ({error.strerror}): change --host or --port"
            )


def url_of(sock: socket.socket) -> str:
    """Where a client on this machine reaches a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"
