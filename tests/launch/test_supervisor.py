"""Supervision of stub workers: start, death, restart, giving up, end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from serve_rig import alive
from stub_front_door import STUB_COMMAND, StubListener

from pdrelay.errors import LaunchError
from pdrelay.launch.config import EngineConfig, ServeConfig
from pdrelay.launch.host import Host
from pdrelay.launch.native_driver import NativeDriver, RankPlan
from pdrelay.launch.resolve import resolve
from pdrelay.launch.restart_policy import RestartOptions
from pdrelay.launch.run_dir import RunDir
from pdrelay.launch.supervisor import State, Supervisor, SupervisorOptions
from pdrelay.launch.topology import PrefillDecode, Replicas, TensorParallel, instances
from pdrelay.model.config import load_model_config

HOST = Host(4, 16 << 30, 8 << 30, 0, 4096, None)
FAST = RestartOptions(initial_s=0.01, max_s=0.02, max_deaths=3)


class Rig:
    """A supervisor over stub workers, and everything it said."""

    def __init__(self, run_dir, topology, command=STUB_COMMAND, **options) -> None:
        config = ServeConfig(engine=EngineConfig("tiny"), topology=topology)
        resolved = resolve(config, load_model_config("tiny"), HOST)
        options.setdefault("restart", FAST)
        self.listener = StubListener()
        self.lines: list[str] = []
        self.deaths: list[str] = []
        self.pids: list[int] = []
        self.supervisor = Supervisor(
            instances(topology),
            NativeDriver(RankPlan(config, resolved, run_dir), command),
            self.listener,
            options=SupervisorOptions(**options),
            log=self.lines.append,
            on_death=lambda spec: self.deaths.append(spec.instance),
        )

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.pids += [pid for each in self.supervisor.instances() for pid in each.pids]
        await self.supervisor.stop()
        for link in self.listener.links.values():
            link.close()
        for pid in self.pids:
            assert not alive(pid), f"{pid} survived"
        assert self.supervisor.instances() == []

    def instance(self, name):
        return next(each for each in self.supervisor.instances() if each.instance == name)

    async def state(self, name, state):
        await until(lambda: self.supervisor.states()[name][0] is state)


async def until(condition):
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


def environment(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@pytest.fixture
def run_dir():
    with RunDir() as directory:
        yield directory
    assert not directory.path.exists()


@pytest.fixture(autouse=True)
def no_leaks():
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


async def test_all_become_ready_in_topology_order(run_dir):
    async with Rig(run_dir, PrefillDecode(1, 2)) as rig:
        await rig.supervisor.start()
        names = [each.instance for each in rig.supervisor.instances()]
        assert names == ["prefill-0", "decode-0", "decode-1"]
        assert {state for state, _ in rig.supervisor.states().values()} == {State.READY}
        assert rig.instance("decode-1").ready.peer_address.endswith("decode-1.0.sock")
        assert rig.instance("prefill-0").ready.peer_address == ""


async def test_rank_output_is_prefixed_and_environment_set(run_dir):
    async with Rig(run_dir, TensorParallel(2)) as rig:
        await rig.supervisor.start()
        await until(lambda: len(rig.lines) >= 2)
        assert sorted(rig.lines) == [
            "[tp-0.0] stub tp-0.0 incarnation 0 starts",
            "[tp-0.1] stub tp-0.1 incarnation 0 starts",
        ]
        for pid in rig.instance("tp-0").pids:
            assert b"OMP_NUM_THREADS=1" in environment(pid)
            assert os.getpgid(pid) == pid


async def test_killed_instance_is_restarted_with_a_new_address(run_dir):
    async with Rig(run_dir, PrefillDecode(1, 1)) as rig:
        await rig.supervisor.start()
        first = rig.instance("decode-0")
        os.kill(first.pids[0], signal.SIGKILL)
        await rig.listener.seen("exited", "decode-0", 0)
        await rig.listener.seen("started", "decode-0", 1)
        await rig.state("decode-0", State.READY)
        second = rig.instance("decode-0")
        assert second.ready.peer_address != first.ready.peer_address
        assert rig.deaths == ["decode-0"]
        assert "was killed by SIGKILL" in rig.listener.reasons[0]
        assert rig.supervisor.states()["prefill-0"] == (State.READY, "")
        assert rig.instance("prefill-0").incarnation == 0


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_rank_takes_its_whole_instance_with_it(run_dir, victim):
    async with Rig(run_dir, TensorParallel(2)) as rig:
        await rig.supervisor.start()
        first = rig.instance("tp-0")
        os.kill(first.pids[victim], signal.SIGKILL)
        await rig.listener.seen("started", "tp-0", 1)
        assert not any(alive(pid) for pid in first.pids)
        await rig.state("tp-0", State.READY)
        assert f"rank {victim} was killed" in rig.listener.reasons[0]


@pytest.mark.parametrize(
    ("mode", "cause"),
    [
        ("exit", "exited with status 3; its last line: the reason is on the last line"),
        ("fatal@replica-1", "no weights in the directory: download them again"),
        ("hang", "was not ready after 0.3 s"),
        ("no-memory", "cause: the host's memory is used up or limited; fix: stop other"),
        ("no-torch", "fix: pip install 'pdrelay[engine]'"),
        ("exit@replica-0.0", "replica-0"),
    ],
)
async def test_failed_start_names_the_cause(run_dir, monkeypatch, mode, cause):
    monkeypatch.setenv("STUB_MODE", mode)
    timeout_s = 0.3 if mode == "hang" else 20
    async with Rig(run_dir, Replicas(2), startup_timeout_s=timeout_s) as rig:
        with pytest.raises(LaunchError) as error:
            await rig.supervisor.start()
        assert cause in str(error.value)
        assert "\n" not in str(error.value)
        assert rig.deaths == []


async def test_after_a_failed_start_nothing_is_restarted(run_dir, monkeypatch):
    """What ends between the failure and `stop` is no death of a server that ran."""
    monkeypatch.setenv("STUB_MODE", "fatal@replica-1")
    async with Rig(run_dir, Replicas(2)) as rig:
        with pytest.raises(LaunchError):
            await rig.supervisor.start()
        os.kill(rig.instance("replica-0").pids[0], signal.SIGKILL)
        await rig.state("replica-0", State.FAILED)
        assert rig.deaths == []


async def test_missing_program(run_dir):
    command = ("/nonexistent/python",)
    async with Rig(run_dir, Replicas(1), command=command) as rig:
        with pytest.raises(LaunchError, match="replica-0"):
            await rig.supervisor.start()


async def test_gives_up_after_quick_deaths(run_dir, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "exit@replica-1#1,exit@replica-1#2,exit@replica-1#3")
    async with Rig(run_dir, Replicas(2)) as rig:
        await rig.supervisor.start()
        os.kill(rig.instance("replica-1").pids[0], signal.SIGKILL)
        await rig.state("replica-1", State.FAILED)
        state, reason = rig.supervisor.states()["replica-1"]
        assert state is State.FAILED
        assert "the reason is on the last line" in reason
        assert len(rig.deaths) == FAST.max_deaths
        assert any("stays down" in line for line in rig.lines)
        assert rig.supervisor.states()["replica-0"][0] is State.READY


async def test_silent_worker_is_killed_and_restarted(run_dir, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "mute@replica-0#0")
    async with Rig(run_dir, Replicas(2), worker_timeout_s=0.5) as rig:
        await rig.supervisor.start()
        await rig.listener.seen("started", "replica-0", 1)
        assert rig.listener.reasons[0].startswith("replica-0 did not answer for 0.5 s")
        await rig.state("replica-0", State.READY)
        assert rig.instance("replica-1").incarnation == 0


async def test_stopped_worker_is_killed_and_restarted(run_dir):
    async with Rig(run_dir, Replicas(1), worker_timeout_s=0.5) as rig:
        await rig.supervisor.start()
        os.kill(rig.instance("replica-0").pids[0], signal.SIGSTOP)
        await rig.listener.seen("started", "replica-0", 1)
        await rig.state("replica-0", State.READY)


async def test_a_stalled_front_door_blames_no_worker(run_dir):
    async with Rig(run_dir, Replicas(1), worker_timeout_s=0.3) as rig:
        await rig.supervisor.start()
        time.sleep(0.8)  # noqa: ASYNC251 the stall itself
        await until(lambda: time.monotonic() - rig.instance("replica-0").last_alive_s < 0.05)
        assert rig.instance("replica-0").incarnation == 0
        assert rig.deaths == []


async def test_worker_that_closes_its_socket_is_replaced(run_dir, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "close-control@replica-0#0")
    async with Rig(run_dir, Replicas(1)) as rig:
        await rig.supervisor.start()
        await rig.listener.seen("started", "replica-0", 1)
        await rig.state("replica-0", State.READY)


async def test_death_after_ready_is_a_death(run_dir, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "die@replica-0#0")
    async with Rig(run_dir, Replicas(1)) as rig:
        await rig.supervisor.start()
        await rig.listener.seen("started", "replica-0", 1)
        await rig.state("replica-0", State.READY)
        assert "exited with status 4" in rig.listener.reasons[0]


async def test_descendants_die_with_their_rank(run_dir, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "child@replica-0#0")
    async with Rig(run_dir, Replicas(1)) as rig:
        await rig.supervisor.start()
        await until(lambda: any("grandchild" in line for line in rig.lines))
        pid = int(next(line for line in rig.lines if "grandchild" in line).split()[-1])
        assert alive(pid)
        os.kill(rig.instance("replica-0").pids[0], signal.SIGKILL)
        await rig.listener.seen("exited", "replica-0", 0)
        await until(lambda: not alive(pid))


async def test_stop_kills_what_ignores_drain_and_sigterm(run_dir, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "ignore-term,ignore-drain")
    async with Rig(run_dir, Replicas(1), term_grace_s=0.1) as rig:
        await rig.supervisor.start()
        await rig.supervisor.stop(0.1)
        assert rig.supervisor.states()["replica-0"][0] is State.STOPPED
        assert rig.deaths == []


async def test_stop_while_starting(run_dir, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "hang")
    async with Rig(run_dir, Replicas(2)) as rig:
        starting = asyncio.create_task(rig.supervisor.start())
        await rig.listener.seen("started", "replica-1", 0)
        await rig.supervisor.stop()
        with pytest.raises(LaunchError, match="stopped"):
            await starting


async def test_stop_while_waiting_to_restart(run_dir):
    slow = RestartOptions(initial_s=600)
    async with Rig(run_dir, Replicas(1), restart=slow) as rig:
        await rig.supervisor.start()
        os.kill(rig.instance("replica-0").pids[0], signal.SIGKILL)
        await rig.state("replica-0", State.BACKOFF)
        await rig.supervisor.stop()
        assert rig.supervisor.states()["replica-0"][0] is State.STOPPED
