"""`pdrelay serve` as a process, over stub workers: what it prints, answers, and leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
from serve_rig import DEADLINE_S, ServeProcess, alive, until

from pdrelay.launch.run_dir import remove_stale

PROGRAM = str(Path(__file__).with_name("stub_front_door.py"))


class Serve(ServeProcess):
    def __init__(self, tmp_path, *args, mode="", **env) -> None:
        command = [sys.executable, PROGRAM, "tiny", "--allow-oversubscribe"]
        super().__init__(tmp_path, command, *args, STUB_MODE=mode, **env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_it_and_leaves_nothing(tmp_path, number):
    with Serve(tmp_path, "--prefill", "1", "--decode", "1") as serve:
        serve.wait_ready()
        assert [worker["instance"] for worker in serve.info["workers"]] == ["prefill-0", "decode-0"]
        assert serve.request("/health") == (200, {})
        assert len(list(serve.temporary.iterdir())) == 1
        status, output = serve.stop(number)
        assert status == 0, output
        assert f"pdrelay is ready: {serve.info['url']}" in output
        assert "stub prefill-0.0 drained" in output
        assert "stub decode-0.0 drained" in output
        assert "Traceback" not in output
        serve.nothing_left()


@pytest.mark.parametrize("wait", ["on", "off"])
def test_a_loop_that_waits_awake_goes_by_the_front_doors_requests(tmp_path, wait):
    asked = tmp_path / "asked"
    with Serve(tmp_path, "--busy-wait", wait, STUB_ASKED=str(asked)) as serve:
        serve.wait_ready()
        assert serve.request("/health") == (200, {})
        assert serve.stop(signal.SIGTERM)[0] == 0
    assert asked.exists() is (wait == "on")


def test_sigkill_of_the_front_door_takes_the_ranks(tmp_path):
    with Serve(tmp_path, "--tp", "2", mode="ignore-term") as serve:
        serve.wait_ready()
        os.kill(serve.process.pid, signal.SIGKILL)
        serve.process.wait(DEADLINE_S)
        assert len(serve.pids) == 2
        until(lambda: not any(alive(pid) for pid in serve.pids), "ranks die")
        assert len(list(serve.temporary.iterdir())) == 1
        remove_stale(serve.temporary)  # as the next server does
        assert list(serve.temporary.iterdir()) == []


@pytest.mark.parametrize("finishes", [True, False])
def test_drain_waits_for_running_requests_unless_told_again(tmp_path, finishes):
    with Serve(tmp_path, mode="hold") as serve:
        serve.wait_ready()
        answers = []
        client = threading.Thread(target=lambda: answers.append(serve.request("/echo", [1, 2, 3])))
        client.start()
        until(lambda: _connections(serve) > 0, "the request arrives")
        serve.process.send_signal(signal.SIGTERM)
        until(lambda: not _accepts(serve), "no new connection is taken")
        assert serve.process.poll() is None, "it did not wait for the request"
        assert alive(serve.pids[0])
        if finishes:
            os.kill(serve.pids[0], signal.SIGUSR1)
        else:
            serve.process.send_signal(signal.SIGTERM)
        client.join(DEADLINE_S)
        assert answers[0] == (200, [1, 2, 3]) if finishes else answers[0][0] == 503
        assert serve.stop()[0] == 0
        serve.nothing_left()


def _connections(serve):
    port = f"{int(serve.info['url'].rsplit(':', 1)[1]):04X}"
    table = Path(f"/proc/{serve.process.pid}/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in table]
    return sum(row[1].endswith(":" + port) and row[3] == "01" for row in rows)


def _accepts(serve):
    host, port = serve.info["url"].removeprefix("http://").rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def test_drain_deadline_ends_a_stuck_request(tmp_path):
    with Serve(tmp_path, "--drain-timeout", "0.2", mode="hold") as serve:
        serve.wait_ready()
        client = threading.Thread(target=lambda: _quietly(serve))
        client.start()
        until(lambda: _connections(serve) > 0, "the request arrives")
        status, _ = serve.stop(signal.SIGTERM)
        client.join(DEADLINE_S)
        assert status == 0
        serve.nothing_left()


def _quietly(serve):
    with contextlib.suppress(OSError):
        serve.request("/echo", [1])


def test_request_is_answered_and_a_killed_worker_comes_back(tmp_path):
    with Serve(tmp_path) as serve:
        serve.wait_ready()
        assert serve.request("/echo", [5, 6]) == (200, [5, 6])
        os.kill(serve.pids[0], signal.SIGKILL)
        until(lambda: serve.request("/health")[0] == 503, "/health tells")
        until(lambda: serve.request("/health")[0] == 200, "/health recovers")
        assert serve.request("/echo", [7]) == (200, [7])
        assert serve.stop(signal.SIGTERM)[0] == 0


def test_shared_pool_survives_a_worker(tmp_path):
    with Serve(tmp_path, "--prefill", "1", "--decode", "1", "--transport", "pool") as serve:
        serve.wait_ready()
        victim = serve.pids[1]
        assert _has_memfd(victim)
        os.kill(victim, signal.SIGKILL)
        until(lambda: serve.request("/health")[0] == 503, "/health tells")
        until(lambda: serve.request("/health")[0] == 200, "/health recovers")
        status, output = serve.stop(signal.SIGTERM)
        assert status == 0
        assert "Traceback" not in output
        assert "stays there" not in output


def _has_memfd(pid):
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return any("memfd" in link for link in links)


def test_signal_while_starting(tmp_path):
    with Serve(tmp_path, mode="hang") as serve:
        until(lambda: list(serve.temporary.glob("pdrelay-*")), "it runs")
        line = serve.process.stdout.readline()
        while "starts" not in line:
            line = serve.process.stdout.readline()
        status, output = serve.stop(signal.SIGINT)
        assert status == 0, output
        assert list(serve.temporary.iterdir()) == []


@pytest.mark.parametrize("mode", ["exit", "fatal"])
def test_failed_start_is_one_line_and_status_2(tmp_path, mode):
    with Serve(tmp_path, "--replicas", "2", mode=mode) as serve:
        output = serve.failed()
        errors = [line for line in output.splitlines() if line.startswith("pdrelay: error:")]
        assert len(errors) == 1
        assert "replica-" in errors[0]
        assert "Traceback" not in output
        assert list(serve.temporary.iterdir()) == []


def test_occupied_port_is_found_before_any_worker_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Serve(tmp_path, "--port", str(port)) as serve:
            output = serve.failed()
            assert f"port {port} on 127.0.0.1 is in use" in output
            assert "--port" in output
            assert "stub" not in output


def test_two_servers_side_by_side(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Serve(tmp_path / "a") as one, Serve(tmp_path / "b") as two:
        one.wait_ready()
        two.wait_ready()
        assert one.info["url"] != two.info["url"]
        assert one.stop(signal.SIGTERM)[0] == 0
        assert two.request("/health")[0] == 200
        assert two.stop(signal.SIGTERM)[0] == 0
