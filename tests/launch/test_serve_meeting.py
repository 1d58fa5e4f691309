"""`pdrelay serve` is ready when its workers have met: the router over stub workers."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from pathlib import Path

from serve_rig import DEADLINE_S, ServeProcess, until

PROGRAM = str(Path(__file__).with_name("stub_router.py"))


class Serve(ServeProcess):
    """One prefill and one decode worker, on a port that is known before it is ready."""

    def __init__(self, tmp_path, *, mode="", meet_s=DEADLINE_S) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, PROGRAM, "tiny", "--allow-oversubscribe"]
        workers = ("--prefill", "1", "--decode", "1", "--port", str(port))
        super().__init__(tmp_path, command, *workers, STUB_MODE=mode, STUB_MEET_S=str(meet_s))
        self.info = {"url": f"http://127.0.0.1:{port}"}

    def introduced(self):
        """Wait until the prefill worker is told of the decode worker; its pid."""
        line = " "
        while (found := re.search(r"stub (\d+) is introduced to decode-0", line)) is None:
            assert line, "it ended"
            line = self.process.stdout.readline()
        return int(found[1])


def test_it_is_not_ready_before_the_workers_have_met(tmp_path):
    with Serve(tmp_path, mode="shy") as serve:
        prefill = serve.introduced()
        for _ in range(3):  # turns enough to say that it is ready
            status, body = serve.request("/health")
            assert status == 503 and "prepares hand-overs" in body
        assert not serve.ready_file.exists()
        os.kill(prefill, signal.SIGUSR1)
        serve.wait_ready()
        assert serve.request("/health") == (200, {"status": "ok"})
        status, output = serve.stop(signal.SIGTERM)
        assert status == 0 and "pdrelay is ready" in output and "goes on without" not in output


def test_it_is_ready_at_the_deadline_and_says_what_is_missing(tmp_path):
    with Serve(tmp_path, mode="shy", meet_s=0.2) as serve:
        serve.wait_ready()
        assert serve.request("/health") == (200, {"status": "ok"})
        status, output = serve.stop(signal.SIGTERM)
        assert status == 0
        (warning,) = [line for line in output.splitlines() if "goes on without" in line]
        assert "prefill-0 -> decode-0" in warning
        assert output.index(warning) < output.index("pdrelay is ready")


def test_a_signal_ends_the_wait(tmp_path):
    with Serve(tmp_path, mode="shy") as serve:
        serve.introduced()
        status, output = serve.stop(signal.SIGTERM)
        assert status == 0 and "is ready" not in output


def test_a_restarted_decode_worker_is_introduced_again(tmp_path):
    with Serve(tmp_path) as serve:
        prefill = serve.introduced()
        serve.wait_ready()
        workers = {worker["instance"]: worker["pid"] for worker in serve.info["workers"]}
        assert workers["prefill-0"] == prefill
        os.kill(workers["decode-0"], signal.SIGKILL)
        assert serve.introduced() == prefill
        until(lambda: serve.request("/health")[0] == 200, "/health recovers")
        assert serve.stop(signal.SIGTERM)[0] == 0
