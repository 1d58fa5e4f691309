"""A `pdrelay serve` as a child process: what it says, answers, and leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

DEADLINE_S = 40.0


def until(condition, what):
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)
    return value


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class ServeProcess:
    """`with ServeProcess(tmp_path, [python, program, "tiny"], *more) as serve: ...`

    Listens on a free port; its output is read by `stop`. `env` adds to this process's own.
    """

    def __init__(self, tmp_path, command, *args, **env) -> None:
        self.ready_file = tmp_path / "ready.json"
        self.temporary = Path(tempfile.mkdtemp(prefix="t"))  # short: it holds Unix sockets
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--ready-file", str(self.ready_file), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary), **env},
        )
        self.info = {}

    def wait_ready(self):
        until(lambda: self.ready_file.exists() or self.process.poll() is not None, "ready")
        assert self.process.poll() is None, self.process.stdout.read()
        self.info = json.loads(self.ready_file.read_text())
        return self

    def failed(self):
        """What it printed until it ended by itself, unable to start."""
        status, output = self.stop()
        assert status == 2, output
        return output

    @property
    def pids(self):
        """Of its engines' processes."""
        return [pid for worker in self.info["workers"] for pid in worker["pids"]]

    def request(self, path, body=None):
        """Status, and the answer's JSON or an error's text. `body`: what becomes JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.info["url"] + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self, *signals):
        """Send `signals`, wait for its end; exit status and all that it printed."""
        for number in signals:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, output

    def nothing_left(self):
        assert not any(alive(pid) for pid in self.pids)
        assert list(self.temporary.iterdir()) == []
        assert not self.ready_file.exists()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
        self.process.stdout.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
