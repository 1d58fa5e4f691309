"""What a message costs that meets a sleeping process: round trips over a Unix socket pair.

    python benchmarks/wake_delay.py

Both ends wait in the way named: `sleep` until the other's message comes, `spin` by asking over and
over, or with so many microseconds of sleep between two askings. Between rounds is a pause, as
between the tokens of a step. Prints microseconds of a round trip. Where both share a core, an end
that asks all the time keeps it for a slice: needs a core each.
"""

from __future__ import annotations

import os
import select
import socket
import statistics
import time

from pdrelay.core.time_slice import RELAY_SLICE_NS, request_short_slices

PAUSE_S = 0.005
ROUNDS = 200
WAYS = (("sleep", "sleep"), ("spin", "sleep"), ("spin", "50"), ("spin", "20"), ("spin", "spin"))


def receive(sock: socket.socket, way: str) -> bytes:
    timeout_s = None if way == "sleep" else 0.0 if way == "spin" else float(way) * 1e-6
    while not select.select([sock], [], [], timeout_s)[0]:
        pass
    return sock.recv(64)


def answer(sock: socket.socket, way: str) -> None:
    """Until the other end is gone."""
    while message := receive(sock, way):
        sock.sendall(message)


def round_trips(asking: str, answering: str) -> list[float]:
    """Microseconds."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        answer(theirs, answering)
        os._exit(0)
    theirs.close()
    taken = []
    for _ in range(ROUNDS):
        time.sleep(PAUSE_S)
        begun = time.perf_counter()
        ours.sendall(b"?")
        receive(ours, asking)
        taken.append((time.perf_counter() - begun) * 1e6)
    ours.close()
    os.waitpid(child, 0)
    return taken


def main() -> None:
    request_short_slices(RELAY_SLICE_NS)  # as front door and client do
    print(f"{len(os.sched_getaffinity(0))} cores")
    print(f"{'asks':>6} {'answers':>8} {'p50':>6} {'p90':>6} {'most':>6}")
    for asking, answering in WAYS:
        taken = sorted(round_trips(asking, answering))
        p50, p90 = statistics.median(taken), taken[int(0.9 * ROUNDS)]
        print(f"{asking:>6} {answering:>8} {p50:6.0f} {p90:6.0f} {taken[-1]:6.0f}")


if __name__ == "__main__":
    main()
