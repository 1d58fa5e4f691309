"""Compile the C kernels once per source, compiler, flags and CPU, into the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_BASE_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math")
_LINK_FLAGS = ("-shared", "-fPIC", "-fvisibility=hidden")
# Tried in order: a compiler may not know this CPU.
_CPU_FLAGS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_S = 120.0


class BuildError(Exception):
    """No compiler, or it failed; the message says which, in one line."""


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/pdrelay/kernels`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "pdrelay" / "kernels"


def find_compiler() -> str:
    """`$CC`, else cc, gcc or clang. Raises BuildError."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise BuildError("no C compiler (cc, gcc or clang) on PATH")


def build(source: Path, directory: Path | None = None) -> Path:
    """The shared library of `source`, compiled unless the cache has it. Raises BuildError.

    Ranks that build at the same time do not disturb each other: each compiles to a file of its
    own and renames it into place.
    """
    compiler = find_compiler()
    directory = cache_dir() if directory is None else directory
    target = directory / f"{source.stem}-{_key(source, compiler)}.so"
    if target.exists():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(suffix=".so", dir=directory)
    except OSError as error:
        raise BuildError(f"cannot write {directory}: {error.strerror}") from error
    os.close(fd)
    try:
        _compile(compiler, source, Path(name))
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _key(source: Path, compiler: str) -> str:
    parts = (source.read_bytes(), _version(compiler), _cpu(), repr(_BASE_FLAGS).encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _version(compiler: str) -> bytes:
    return compiler.encode() + _run([compiler, "--version"]).stdout


def _cpu() -> bytes:
    """What decides -march=native: machine, model and feature flags."""
    lines = [platform.machine(), platform.processor()]
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line:
                break
            if line.split(":")[0].strip() in ("model name", "model", "flags", "Features"):
                lines.append(line)
    except OSError:
        pass
    return "\n".join(lines).encode()


def _compile(compiler: str, source: Path, target: Path) -> None:
    message = ""
    for cpu_flags in _CPU_FLAGS:
        command = [compiler, *_BASE_FLAGS, *cpu_flags, *_LINK_FLAGS, str(source)]
        result = _run([*command, "-o", str(target), "-lm"])
        if result.returncode == 0:
            return
        message = message or result.stderr.decode(errors="replace").strip()
    raise BuildError(f"{compiler} failed: {message.splitlines()[0] if message else 'no message'}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
