"""Two real processes that hand KV over, as the parent sees them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.lab.kv.endpoint import HANDSHAKE_S
from pdrelay.lab.kv.wire import Peer, Sample, Setup, Transfer, Up
from pdrelay.transport.pool import PoolHandle, create_pool

_EXIT_S = 10.0  # for a process whose sockets are closed
_MARGIN_S = 10.0  # the processes' own deadlines come first
POOL_REQUESTS = 2  # how many of the longest prompts the shared pool holds


class Pair:
    """A producer and a consumer over every transport asked for. A context manager."""

    def __init__(
        self,
        layout: KVLayout,
        transports: Sequence[str],
        devices: tuple[str, str],
        *,
        timeout_s: float,
        log: Path,
    ) -> None:
        """Raises TransportError, in the words of the process that could not start."""
        self._timeout_s = timeout_s
        self._pool: PoolHandle | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        with contextlib.ExitStack() as stack:
            self._stack = stack
            stack.callback(self._reap)
            if "pool" in transports:
                self._pool = create_pool(layout, POOL_REQUESTS * layout.num_blocks)
                stack.callback(self._pool.close)
            p_peer, c_peer = socket.socketpair()
            self._producer = self._spawn(p_peer, log)
            consumer = self._spawn(c_peer, log)
            for role, control, device in (
                ("consumer", consumer, devices[1]),
                ("producer", self._producer, devices[0]),
            ):
                self._set_up(control, role, device, layout, tuple(transports))
            consumer.receive(Up)
            self.up, _ = self._producer.receive(Up)
            self._producer.set_timeout(timeout_s + _MARGIN_S)
            self._stack = stack.pop_all()

    def _spawn(self, peer: socket.socket, log: Path) -> Peer:
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        with theirs, peer, log.open("ab") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "pdrelay.lab.kv.endpoint"),
                    *(str(theirs.fileno()), str(peer.fileno())),
                ],
                pass_fds=[theirs.fileno(), peer.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._processes.append(process)
        return Peer(ours, HANDSHAKE_S)

    def _set_up(
        self, control: Peer, role: str, device: str, layout: KVLayout, names: tuple[str, ...]
    ) -> None:
        pool = self._pool
        setup = Setup(
            role="producer" if role == "producer" else "consumer",
            device=device,
            layout=layout,
            transports=names,
            timeout_s=self._timeout_s,
            pool=pool.description if pool else b"",
        )
        control.send(setup, (pool.fd,) if pool else ())

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def run(self, transfer: Transfer) -> Sample:
        """Raises TransportError when the transfer failed; the pair is of no use then."""
        self._producer.send(transfer)
        sample, _ = self._producer.receive(Sample)
        if sample.damaged:
            raise TransportError(f"{transfer.transport}: the pages that arrived are damaged")
        return sample

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _reap(self) -> None:
        """Our sockets are closed: both processes end by themselves, or are ended."""
        for process in self._processes:
            try:
                process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
