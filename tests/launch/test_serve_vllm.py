"""`pdrelay serve --engine vllm` as a process, over fake vLLM servers that it starts itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from serve_rig import DEADLINE_S, ServeProcess, alive, until

STUB = Path(__file__).with_name("stub_engine_python.py")


class Serve(ServeProcess):
    """A front door and the engines that it starts with a stub of their interpreter."""

    def __init__(self, tmp_path, *args, engine="vllm", mode="", **env) -> None:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        self.notes = tmp_path / "notes"
        super().__init__(
            tmp_path,
            [sys.executable, "-m", "pdrelay", "serve", "tiny", "--engine", engine],
            *("--engine-python", str(python), "--device", "cpu", "--max-model-len", "512"),
            *args,
            **{"STUB_ENGINE": mode, "STUB_NOTES": str(self.notes), **env},
        )

    def started(self):
        """What each engine process was started with, in order."""
        return [json.loads(line) for line in self.notes.read_text().splitlines()]

    @property
    def pids(self):
        return [pid for each in self.started() for pid in each["pids"]]


def flag(started, name):
    argv = started["argv"]
    return argv[argv.index(name) + 1]


def test_two_replicas_serve_and_leave_nothing(tmp_path):
    with Serve(tmp_path, "--replicas", "2", "--engine-args", "--swap-space '0'") as serve:
        serve.wait_ready()
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "return_token_ids": True}
        answers = [serve.request("/v1/completions", body) for _ in range(2)]
        assert [status for status, _ in answers] == [200, 200]
        assert len(answers[0][1]["choices"][0]["token_ids"]) == 5
        assert serve.request("/health")[0] == 200
        one, two = serve.started()
        assert flag(one, "--port") != flag(two, "--port")
        assert one["argv"][:2] == ["-m", "vllm.entrypoints.openai.api_server"]
        assert one["argv"][-2:] == ["--swap-space", "0"]
        assert flag(one, "--load-format") == "dummy"
        assert flag(one, "--max-model-len") == "512"
        assert "--kv-transfer-config" not in one["argv"]
        assert one["env"]["PDRELAY_ENGINE_KEY"] not in " ".join(one["argv"])
        assert "VLLM_API_KEY" not in one["env"]  # a new one would have vLLM compile anew
        assert flag(one, "--middleware") == "pdrelay.integrations.bearer.RequireKey"
        assert one["env"]["HF_HUB_OFFLINE"] == "1"
        directory = Path(flag(one, "--model"))
        assert json.loads((directory / "config.json").read_text())["vocab_size"] == 264
        assert sorted(pid for each in serve.info["workers"] for pid in each["pids"]) == sorted(
            serve.pids
        )
        assert [worker["resolved"]["engine"] for worker in serve.info["workers"]] == ["vllm"] * 2
        status, output = serve.stop(signal.SIGTERM)
        assert status == 0, output
        assert "engine: vllm 0.32.0" in output
        assert "[replica-1] FakeVllm listens" in output
        assert "Traceback" not in output
        serve.nothing_left()


def test_prefill_and_decode_get_their_roles_and_addresses(tmp_path):
    with Serve(tmp_path, "--prefill", "1", "--decode", "1") as serve:
        serve.wait_ready()
        producer, consumer = (
            json.loads(flag(each, "--kv-transfer-config"))
            for each in sorted(serve.started(), key=lambda each: "kv_consumer" in str(each))
        )
        assert producer["kv_connector"] == "PdrelayConnector"
        assert producer["kv_connector_module_path"] == "pdrelay.integrations.vllm"
        assert (producer["kv_role"], consumer["kv_role"]) == ("kv_producer", "kv_consumer")
        address = Path(producer["kv_connector_extra_config"]["address"])
        assert address.parent.parent == serve.temporary
        assert address.parent.stat().st_mode & 0o777 == 0o700
        assert producer["kv_connector_extra_config"]["lease_s"] == 30
        path = Path(serve.started()[0]["env"]["PYTHONPATH"].split(":")[0])
        assert [each.name for each in path.iterdir()] == ["pdrelay"]
        assert serve.stop(signal.SIGTERM)[0] == 0
        serve.nothing_left()


def test_nixl_gets_side_channels_of_its_own(tmp_path):
    with Serve(tmp_path, "--prefill", "1", "--decode", "2", "--connector", "nixl") as serve:
        serve.wait_ready()
        started = serve.started()
        ports = {each["env"]["VLLM_NIXL_SIDE_CHANNEL_PORT"] for each in started}
        assert len(ports | {flag(each, "--port") for each in started}) == 6
        assert {each["env"]["UCX_TLS"] for each in started} == {"all"}
        configs = [json.loads(flag(each, "--kv-transfer-config")) for each in started]
        assert {each["kv_connector"] for each in configs} == {"NixlConnector"}
        assert serve.stop(signal.SIGTERM)[0] == 0


def test_a_killed_instance_comes_back_on_its_port(tmp_path):
    with Serve(tmp_path) as serve:
        serve.wait_ready()
        body = {"prompt": [1, 2, 3], "max_tokens": 3}
        assert serve.request("/v1/completions", body)[0] == 200
        os.kill(serve.pids[0], signal.SIGKILL)
        until(lambda: serve.request("/health")[0] == 503, "/health tells")
        until(lambda: serve.request("/health")[0] == 200, "/health recovers")
        assert serve.request("/v1/completions", body)[0] == 200
        one, two = serve.started()
        assert flag(one, "--port") == flag(two, "--port")
        assert serve.stop(signal.SIGTERM)[0] == 0
        serve.nothing_left()


def test_sigkill_of_the_front_door_takes_the_engines(tmp_path):
    with Serve(tmp_path, "--replicas", "2") as serve:
        serve.wait_ready()
        pids = serve.pids
        os.kill(serve.process.pid, signal.SIGKILL)
        serve.process.wait(DEADLINE_S)
        until(lambda: not any(alive(pid) for pid in pids), "engines die")


def test_a_failed_start_names_the_first_cause(tmp_path):
    with Serve(tmp_path, mode="crash") as serve:
        output = serve.failed()
        (error,) = [line for line in output.splitlines() if line.startswith("pdrelay: error:")]
        assert "torch.OutOfMemoryError: CUDA out of memory" in error
        assert "[replica-0] RuntimeError: Engine core initialization failed" in output
        serve.nothing_left()


def test_an_instance_that_never_answers_ends_the_start(tmp_path):
    with Serve(tmp_path, "--startup-timeout", "2", mode="hang") as serve:
        output = serve.failed()
        assert "was not ready after 2 s" in output
        serve.nothing_left()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--engine-args", "--port 3"], "--engine-args has --port"),
        (["--engine-args=--kv-transfer-config={}"], "--engine-args has --kv-transfer-config"),
        (["--engine-python", "/nonexistent/python"], "cannot run /nonexistent/python"),
        (["--engine-python", sys.executable], "has no vllm"),
        (["--block-size", "32"], "--block-size is not for --engine vllm"),
        (["--prefill", "1", "--decode", "1", "--connector", "p2p-nccl"], "removed in vLLM 0.24"),
        (["--prefill", "1", "--decode", "1", "--connector", "x"], "auto, pdrelay, pdrelay-nccl"),
        (["--prefill", "1", "--decode", "1", "--connector", "pdrelay-nccl"], "between GPUs"),
        (["--attach", "127.0.0.1:8000"], "http://HOST:PORT"),
        (["--attach", "prefill=http://h:1"], "at least one of each"),
        (["--attach", "http://h:1", "--replicas", "2"], "leave --replicas"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(tmp_path, args, words):
    with Serve(tmp_path, *args) as serve:
        output = serve.failed()
        assert words in output
        assert "Traceback" not in output
        assert not serve.notes.exists()
        assert list(serve.temporary.iterdir()) == []


@pytest.mark.parametrize(("version", "words"), [("0.23.0", ""), ("0.24.1", "removed in 0.24")])
def test_what_a_version_lacks_is_said_at_start(tmp_path, version, words):
    with Serve(tmp_path, "--prefill", "1", "--decode", "1", STUB_VERSION=version) as serve:
        serve.wait_ready()
        output = serve.stop(signal.SIGTERM)[1]
        assert f"engine: vllm {version}" in output
        assert ("removed in 0.24" in output) == bool(words)


def test_sglang_is_started_with_its_own_words(tmp_path):
    args = ("--prefill", "1", "--decode", "1", "--no-enable-prefix-caching")
    with Serve(tmp_path, *args, engine="sglang", STUB_VERSION="0.5.16") as serve:
        serve.wait_ready()
        assert serve.request("/health")[0] == 200
        modes = {flag(each, "--disaggregation-mode"): each for each in serve.started()}
        assert sorted(modes) == ["decode", "prefill"]
        assert flag(modes["prefill"], "--disaggregation-transfer-backend") == "nixl"
        assert int(flag(modes["prefill"], "--disaggregation-bootstrap-port"))
        assert "--disaggregation-bootstrap-port" not in modes["decode"]["argv"]
        for started in modes.values():
            assert started["argv"][:2] == ["-m", "sglang.launch_server"]
            assert flag(started, "--context-length") == "512"
            assert "--incremental-streaming-output" in started["argv"]
            assert "--disable-radix-cache" in started["argv"]
        assert serve.info["workers"][0]["resolved"]["engine_version"] == "0.5.16"
        status, output = serve.stop(signal.SIGTERM)
        assert status == 0
        assert "engine: sglang 0.5.16" in output
        serve.nothing_left()


def test_attached_instances_are_routed_to_and_left_running(tmp_path):
    with contextlib.ExitStack() as stack:
        urls, engines = [], []
        for _ in range(2):
            engine = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "pdrelay.router.fakes.vllm", "--port", "0"],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(engine.kill)
            urls.append(engine.stdout.readline().split()[-1])
            engines.append(engine)
        with Serve(tmp_path, "--attach", urls[0], "--attach", urls[1] + "/") as serve:
            serve.wait_ready()
            assert [worker["pids"] for worker in serve.info["workers"]] == [[], []]
            assert serve.request("/v1/completions", {"prompt": [1], "max_tokens": 2})[0] == 200
            assert serve.request("/health")[0] == 200
            engines[0].kill()
            assert serve.stop(signal.SIGTERM)[0] == 0
            assert engines[1].poll() is None
            assert list(serve.temporary.iterdir()) == []
