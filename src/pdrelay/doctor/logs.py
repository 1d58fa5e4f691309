"""Log files to read: those named, and those under a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdrelay.errors import ConfigError

_SUFFIXES = (".log", ".txt", ".out", ".err")
_HALF_BYTES = 8 << 20  # of a larger file, the first and the last so many are read
_MAX_FILES = 256


@dataclass(frozen=True)
class Log:
    path: str
    text: str


def read_logs(paths: Sequence[str]) -> list[Log]:
    """The files, and the logs under directories in the order of their paths.

    Raises ConfigError for what cannot be read, and for a directory without any log.
    """
    return [_read(path) for named in paths for path in _expand(named)]


def _expand(named: str) -> list[Path]:
    path = Path(named)
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.rglob("*") if each.suffix in _SUFFIXES and each.is_file())
    if not found:
        raise ConfigError(
            f"--log {named}: no {', '.join('*' + suffix for suffix in _SUFFIXES)} in this "
            "directory: name the files"
        )
    return found[:_MAX_FILES]


def _read(path: Path) -> Log:
    try:
        with path.open("rb") as file:
            data = file.read(_HALF_BYTES)
            size = path.stat().st_size
            if size > 2 * _HALF_BYTES:
                file.seek(size - _HALF_BYTES)
            data += file.read(_HALF_BYTES)
    except OSError as error:
        raise ConfigError(f"--log {path}: {error.strerror}: name a readable file") from None
    return Log(str(path), data.decode("utf-8", "replace"))
