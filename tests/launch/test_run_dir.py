"""Run directories of killed servers go; those of living ones and other people's stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from pdrelay.launch.run_dir import LOCK_NAME, RunDir, remove_stale

DEADLINE_S = 60.0
HOLDER = """
import sys
from pdrelay.launch.run_dir import RunDir
print(RunDir().path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch):
    """A TMPDIR of its own, short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="t") as path:
        monkeypatch.setattr("tempfile.tempdir", path)
        monkeypatch.setenv("TMPDIR", path)
        yield Path(path)


def test_the_next_server_removes_what_a_killed_one_left(temporary):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    path = Path(holder.stdout.readline().strip())
    try:
        with RunDir() as ours:
            assert {path, ours.path} == set(temporary.iterdir()), "it lives"
        assert list(temporary.iterdir()) == [path]
        (path / "decode-0.0.sock").touch()
    finally:
        holder.kill()
        holder.communicate(timeout=DEADLINE_S)
    assert path.exists()
    with RunDir() as ours:
        assert list(temporary.iterdir()) == [ours.path]
    assert list(temporary.iterdir()) == []


def test_what_is_not_ours_stays(temporary, monkeypatch):
    (temporary / "pdrelay-results").mkdir()
    (temporary / "pdrelay-file").touch()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK_NAME).touch()
    (temporary / "pdrelay-link").symlink_to(elsewhere)
    linked_lock = temporary / "pdrelay-linked-lock"
    linked_lock.mkdir()
    (linked_lock / LOCK_NAME).symlink_to(elsewhere / LOCK_NAME)
    everything = set(temporary.rglob("*"))
    remove_stale(temporary)
    assert set(temporary.rglob("*")) == everything

    stale = temporary / "pdrelay-stale"
    stale.mkdir()
    (stale / LOCK_NAME).touch()
    other = os.geteuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: other)
        remove_stale(temporary)
    assert stale.exists(), "another user's"
    remove_stale(temporary)
    assert set(temporary.rglob("*")) == everything


def test_servers_that_start_at_once_spare_each_other(temporary):
    """A lock belongs to an open file, not to a process: threads race as servers do."""
    barrier = threading.Barrier(8, timeout=DEADLINE_S)
    lost: list[Path] = []

    def start_and_stop():
        barrier.wait()
        for _ in range(40):
            with RunDir() as directory:
                remove_stale(temporary)
                if not (directory.path / LOCK_NAME).exists():
                    lost.append(directory.path)

    threads = [threading.Thread(target=start_and_stop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not lost
    assert list(temporary.iterdir()) == []


def test_a_sweep_between_making_and_locking_costs_another_try(temporary, monkeypatch):
    import pdrelay.launch.run_dir as module

    locked, attempts = module._locked, []

    def swept_first(lock, path):
        attempts.append(path)
        if len(attempts) == 1:
            remove_first = os.open(path / LOCK_NAME, os.O_RDWR)
            assert locked(remove_first, path)
            os.unlink(path / LOCK_NAME)
            path.rmdir()
            os.close(remove_first)
        return locked(lock, path)

    monkeypatch.setattr(module, "_locked", swept_first)
    with RunDir() as directory:
        assert len(attempts) == 2 and attempts[1] == directory.path != attempts[0]
        assert directory.path.exists() and not attempts[0].exists()


def test_close_is_idempotent(temporary):
    directory = RunDir()
    directory.close()
    directory.close()
    assert list(temporary.iterdir()) == []
