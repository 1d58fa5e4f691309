"""Appends one JSON line a request to a file."""

from __future__ import annotations

import asyncio
import logging
import os

import msgspec

from pdrelay.core.events import RequestRecord
from pdrelay.errors import ConfigError

_FLUSH_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)


class EventLog:
    """Buffers, and writes at least each second while there is something to write.

    Without a path it takes records and drops them. A disk that fills up costs records, counted in
    `num_dropped`, and never a request.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Raises ConfigError when the file cannot be opened."""
        self.num_dropped = 0
        self._encoder = msgspec.json.Encoder()
        self._lines = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._file = None
        if path is not None:
            try:
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
            except OSError as error:
                raise ConfigError(
                    f"cannot write the event log {os.fspath(path)!r}: {error.strerror}; "
                    "choose another --event-log"
                ) from None

    def append(self, record: RequestRecord) -> None:
        """Take a finished record. Needs a running event loop."""
        if self._file is None:
            return
        self._lines += self._encoder.encode(record)
        self._lines += b"\n"
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_FLUSH_INTERVAL_S, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lines or self._file is None:
            return
        lines, self._lines = self._lines, bytearray()
        try:
            view = memoryview(lines)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            if not self.num_dropped:
                _log.error("the event log loses records: %s", error.strerror)
            self.num_dropped += lines.count(b"\n")

    def close(self) -> None:
        """Flush and close. Idempotent."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
