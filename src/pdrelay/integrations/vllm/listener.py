"""A producer's Unix socket: private to its user, and free of what a killed process left behind."""

from __future__ import annotations

import os
import socket
import stat

from pdrelay.errors import ConfigError

_BACKLOG = 64


def listen(address: str) -> socket.socket:
    """A non-blocking listener at `address`, mode 0600.

    A socket file that nobody listens at is replaced. Raises ConfigError where another process
    listens, something else lies there, or the directory does not admit it.
    """
    _remove_stale(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(address)
        os.chmod(address, 0o600)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen at {address} ({error}): choose another address"
        ) from error
    return sock


def _remove_stale(address: str) -> None:
    try:
        mode = os.lstat(address).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{address} exists and is no socket: choose another address")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            pass
        except OSError as error:
            raise ConfigError(f"cannot take over {address} ({error}): remove it") from error
        else:
            raise ConfigError(
                f"another process listens at {address}: give each instance its own address"
            )
    os.unlink(address)
