from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from pdrelay.errors import LaunchError
from pdrelay.lab import server as server_module
from pdrelay.lab.server import ChildLauncher, last_words, peak_rss_bytes, wait_gone
from pdrelay.lab.topology import parse_topology

STUB = str(Path(__file__).with_name("stub_serve.py"))


def start(tmp_path, behaviour, timeout_s=20.0):
    launcher = ChildLauncher(timeout_s, (sys.executable, STUB))
    return launcher.start(
        parse_topology("pd:1:2"),
        model=behaviour,
        event_log_path=tmp_path / "events.jsonl",
        log_path=tmp_path / "server.log",
        extra_args=["--seed", "3"],
    )


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_starts_tells_and_stops(tmp_path):
    server = await start(tmp_path, "works")
    assert server.url == "http://127.0.0.1:1"
    assert server.argv == [
        "pdrelay", "serve", "works", "--prefill", "1", "--decode", "2", "--seed", "3"
    ]  # fmt: skip
    (worker,) = server.workers()
    assert worker.instance == "replica-0"
    assert worker.resolved == {"dtype": "float32"}
    assert worker.peak_rss_bytes > 1 << 20
    await server.stop()
    await server.stop()
    assert is_gone(worker.pid)
    assert (tmp_path / "server.log").read_text() == "started\ndrained\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.log"]


async def test_a_server_that_ends_is_explained_by_its_last_words(tmp_path):
    with pytest.raises(LaunchError, match=r"P/D 1:2 ended with status 2: .*'dies' is unknown"):
        await start(tmp_path, "dies")


async def test_a_silent_server_is_ended_at_the_deadline(tmp_path):
    with pytest.raises(LaunchError, match=r"not ready after 0\.5 s: "):
        await start(tmp_path, "silent", timeout_s=0.5)


async def test_a_damaged_ready_file_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(LaunchError, match="ready file is damaged"):
        await start(tmp_path, "damaged")
    assert "drained" in (tmp_path / "server.log").read_text()


async def test_a_stubborn_server_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "STOP_S", 0.2)
    server = await start(tmp_path, "stubborn")
    (worker,) = server.workers()
    await server.stop()
    assert is_gone(worker.pid)


KILLED_LAB = """
import asyncio, sys
from pathlib import Path
from pdrelay.lab.server import ChildLauncher
from pdrelay.lab.topology import parse_topology

async def main(stub, root):
    launcher = ChildLauncher(20.0, (sys.executable, stub))
    server = await launcher.start(
        parse_topology("replicas:1"), model="stubborn",
        event_log_path=root / "events.jsonl", log_path=root / "server.log",
    )
    print(server.workers()[0].pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


def test_a_killed_lab_leaves_no_server(tmp_path):
    arguments = [sys.executable, "-c", KILLED_LAB, STUB, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as lab:
        server = os.pidfd_open(int(lab.stdout.readline()))
        lab.kill()
    try:
        readable, _, _ = select.select([server], [], [], 20.0)
    finally:
        os.close(server)
    assert readable == [server]


def test_no_log_and_no_process_are_no_errors(tmp_path):
    assert last_words(tmp_path / "none") == "it left no log"
    (tmp_path / "empty").write_text("\n \n")
    assert last_words(tmp_path / "empty") == "its log is empty"
    assert peak_rss_bytes(2**22 + 1) == 0


async def test_the_end_of_processes_of_others_is_waited_for():
    process = await asyncio.create_subprocess_exec("sleep", "60")
    assert not await wait_gone([process.pid], 0.05)
    process.kill()
    assert await wait_gone([process.pid, 2**22 + 1], 20.0)
    await process.wait()
