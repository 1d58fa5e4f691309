"""The private directory of one server: peer sockets and rendezvous files.

A server holds a lock on a file in its directory while it lives. A directory whose lock is free
belongs to one that was killed: the next server of the same user removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

from pdrelay.errors import ConfigError
from pdrelay.launch.topology import InstanceSpec

_MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less its terminating zero
_LONGEST_NAME_BYTES = 32  # "replica-1023.999999.sock" and the like
_PREFIX = "pdrelay-"
LOCK_NAME = "front-door.lock"
_ATTEMPTS = 100  # each is lost only to a sweep that came between two system calls


class RunDir:
    """A new 0700 directory, removed with its contents by `close` or at the end of `with`.

    Removes what killed servers left first. Raises ConfigError when the temporary directory cannot
    hold a new one.
    """

    def __init__(self) -> None:
        remove_stale(Path(tempfile.gettempdir()))
        try:
            self.path, self._lock = _new_locked()
        except OSError as error:
            raise ConfigError(
                f"cannot make a private directory ({error}): set TMPDIR to a writable one"
            ) from error
        if len(bytes(self.path)) + 1 + _LONGEST_NAME_BYTES > _MAX_SOCKET_PATH_BYTES:
            self.close()
            raise ConfigError(
                f"{self.path.parent} is too long a path for Unix sockets: "
                "set TMPDIR to a shorter one, such as /tmp"
            )

    def peer_address(self, spec: InstanceSpec, incarnation: int) -> str:
        """Where this incarnation of a consumer listens; a dead one's address is never reused."""
        return str(self.path / f"{spec.instance}.{incarnation}.sock")

    def close(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def remove_stale(parent: Path) -> None:
    """Remove the run directories in `parent` that are this user's and whose server is gone.

    Best effort: what cannot be read or removed stays.
    """
    for path in sorted(parent.glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):
            _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    """Raises OSError for what is no run directory, or one whose server lives."""
    seen = path.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
        return
    lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _locked(lock, path):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _new_locked() -> tuple[Path, int]:
    """A new directory and its lock, held. Raises OSError."""
    for _ in range(_ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # 0700 by its contract
        lock = -1
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            if _locked(lock, path):
                return path, lock
        if lock >= 0:  # a sweep took the new file for a stale one, and removes the directory
            os.close(lock)
    raise OSError("other servers removed it each time")


def _locked(lock: int, path: Path) -> bool:
    """Take the lock unless somebody has it; whether we have it, and the file is still there."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = (path / LOCK_NAME).lstat()
    except (BlockingIOError, FileNotFoundError):
        return False
    ours = os.fstat(lock)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
