"""The seam between supervision and engines: what an instance's processes are and how to reach it.

    native    ranks of the embedded engine, reached over a control socket     (native_driver.py)
    vllm      one `vllm` server an instance, reached over HTTP                (vllm_driver.py)
    sglang    one `sglang` server an instance, reached over HTTP              (sglang_driver.py)

A driver only describes: spawning, watching, restarting and killing are the supervisor's.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.launch.topology import InstanceSpec

Control = socket.socket | HttpEndpoint  # how the front door talks to an instance


@dataclass(frozen=True)
class ProcessSpec:
    """One process of an instance."""

    label: str  # in reasons: "rank 0"
    prefix: str  # of each line of its output
    command: tuple[str, ...]
    env: Mapping[str, str]  # all of it: nothing is inherited
    stdin: bytes = b""
    pass_fds: tuple[int, ...] = ()
    guarded: bool = False  # it starts processes that could outlive it (guard.py)


@dataclass(frozen=True)
class Launch:
    """One incarnation, not started yet. `handed_over` is closed here once the processes run."""

    processes: tuple[ProcessSpec, ...]
    control: Control
    handed_over: tuple[socket.socket, ...] = ()


class Driver(Protocol):
    """Turns an InstanceSpec into processes."""

    @property
    def drain_signal(self) -> signal.Signals | None:
        """Asks a process to finish and exit; None where a `Drain` message does."""

    def launch(self, spec: InstanceSpec, incarnation: int) -> Launch:
        """Raises LaunchError when the incarnation cannot be described."""

    def explain(self, lines: Sequence[str]) -> str:
        """The cause of an end, from the last lines of output; "" when they name none."""


def last_line(lines: Sequence[str]) -> str:
    """A clause that quotes the last line that is not blank; "" when all are."""
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"its last line: {line}" if line else ""
