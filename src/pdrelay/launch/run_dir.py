"""The private directory of one server: peer sockets and rendezvous files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from pdrelay.errors import ConfigError
from pdrelay.launch.topology import InstanceSpec

_MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less its terminating zero
_LONGEST_NAME_BYTES = 32  # "replica-1023.999999.sock" and the like


class RunDir:
    """A new 0700 directory, removed with its contents by `close` or at the end of `with`.

    Raises ConfigError when the temporary directory cannot hold it.
    """

    def __init__(self) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="pdrelay-"))  # 0700 by its contract
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
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
