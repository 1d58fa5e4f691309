"""GPUs, ports, versions, and causes: what the drivers of production engines are built from."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pdrelay.doctor.engine_probe import EngineFacts
from pdrelay.errors import ConfigError
from pdrelay.launch.config import EngineConfig, ExternalConfig, ServeConfig
from pdrelay.launch.engine_version import engine_notes
from pdrelay.launch.external import external_plan, make_driver
from pdrelay.launch.external_driver import EnginePlan
from pdrelay.launch.gpus import assign_gpus, visible_gpus, with_peers
from pdrelay.launch.host import Host
from pdrelay.launch.ports import Ports
from pdrelay.launch.resolve_external import resolve_external
from pdrelay.launch.run_dir import RunDir
from pdrelay.launch.sglang_driver import SglangDriver
from pdrelay.launch.topology import PrefillDecode, Replicas, TensorParallel, instances
from pdrelay.launch.vllm_driver import VllmDriver
from pdrelay.model.config import BUILT_IN

BOOTSTRAP = "--disaggregation-bootstrap-port"


def test_gpus_of_the_outer_environment_are_handed_out():
    assert visible_gpus(None, 3) == ["0", "1", "2"]
    assert visible_gpus("5, GPU-ab", 8) == ["5", "GPU-ab"]
    assert visible_gpus("-1", 8) == visible_gpus("", 8) == []


def test_each_instance_gets_its_own():
    assert assign_gpus(instances(Replicas(2)), ["4", "7"]) == {"replica-0": "4", "replica-1": "7"}
    assert assign_gpus(instances(TensorParallel(2)), ["4", "7"]) == {"tp-0": "4,7"}
    pair = assign_gpus(instances(PrefillDecode(1, 1)), ["4", "7", "9"])
    assert pair == {"prefill-0": "4", "decode-0": "7"}
    assert with_peers(pair, ["4", "7"]) == {"prefill-0": "4,7", "decode-0": "7,4"}


def test_too_few_gpus():
    with pytest.raises(ConfigError, match=r"2 GPUs are needed.*1 can be seen"):
        assign_gpus(instances(Replicas(2)), ["0"])
    shared = assign_gpus(instances(Replicas(2)), ["0"], share=True)
    assert shared == {"replica-0": "0", "replica-1": "0"}
    with pytest.raises(ConfigError, match="2 GPUs"):
        assign_gpus(instances(TensorParallel(2)), ["0"], share=True)


def test_ports_are_kept_and_can_be_listened_on():
    with Ports() as ports:
        first, second = ports.port("a"), ports.port("b")
        assert ports.port("a") == first != second
        for _ in range(2):  # a restarted server too
            with socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(("127.0.0.1", first))
                server.listen()
                socket.create_connection(("127.0.0.1", first), timeout=5).close()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", first))


@pytest.mark.parametrize(
    ("engine", "version", "connector", "words"),
    [
        ("vllm", "0.23.0", "pdrelay", []),
        ("vllm", "0.26.0rc1+cu130", "nixl", ["removed in 0.24", "has no nixl"]),
        ("vllm", "0.32.0", "", []),
        ("vllm", "0.33.1", "pdrelay", ["removed in 0.24"]),
        ("vllm", "0.22.1", "pdrelay", ["untested"]),
        ("vllm", "0.34.0", "pdrelay", ["untested", "removed in 0.24"]),
        ("vllm", "unknown", "", ["cannot be read"]),
        ("sglang", "unknown", "nixl", ["cannot be read"]),
        ("sglang", "0.5.16", "nixl", []),
        ("sglang", "0.5.17", "nixl", []),
        ("sglang", "0.5.18", "", ["to its end"]),
        ("sglang", "0.5.19", "nixl", ["to its end"]),
        ("sglang", "0.5.20", "nixl", []),
        ("sglang", "0.4.9", "nixl", ["untested"]),
    ],
)
def test_what_a_release_lacks(engine, version, connector, words):
    old = version < "0.24" and engine == "vllm"
    connectors = ("NixlConnector", "P2pNcclConnector") if old else ("NixlConnector",)
    facts = EngineFacts("python", versions={engine: version}, connectors=connectors)
    notes = engine_notes(engine, facts, connector)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_an_installed_nixl_is_not_missed():
    facts = EngineFacts("python", versions={"vllm": "0.23.0", "nixl-cu13": "1.3.2"})
    assert engine_notes("vllm", facts, "nixl") == []


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            [
                "(EngineCore pid=7) INFO starting",
                "(EngineCore pid=7) ValueError: a cause nobody has seen",
                "RuntimeError: Engine core initialization failed. Failed core proc(s): {}",
            ],
            "its earliest error: ValueError: a cause nobody has seen",
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB"],
            "its log says: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB; "
            "cause: ",
        ),
        (["INFO starting", "ends here", ""], "its last line: ends here"),
        ([], ""),
    ],
)
def test_the_end_of_an_engine_is_explained(log, said):
    with plan_on_two_gpus() as plan:
        assert VllmDriver(plan).explain(log).startswith(said)
        assert bool(VllmDriver(plan).explain(log)) == bool(said)


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ((), False),
        (("--max-num-seqs", "8"), False),
        (("--api-server-count", "4"), True),
        (("--api-server-count=4",), True),
        (("--api_server_count=4",), True),
        (("-asc", "2"), True),
    ],
)
def test_several_http_servers_of_an_instance_are_vllm_serves(asked, served):
    external = ExternalConfig(engine_args=asked)
    with plan_on_two_gpus() as plan:
        driver = VllmDriver(replace(plan, config=replace(plan.config, external=external)))
        (process,) = driver.launch(instances(PrefillDecode(1, 1))[1], 0).processes
        start = process.command[process.command.index("-m") :]
        own = ("vllm.entrypoints.openai.api_server", "--model")
        assert start[1:3] == (("vllm.entrypoints.cli.main", "serve") if served else own)
        assert start[-len(asked) :] == asked or not asked


@contextlib.contextmanager
def plan_of(engine, **fields):
    """One prefill and one decode instance of `engine`, on a host with two GPUs."""
    config = ServeConfig(engine=engine, topology=PrefillDecode(1, 1))
    host = Host(8, 64 << 30, 64 << 30, 2, 4096, None)
    with RunDir() as run_dir, Ports() as ports:
        yield EnginePlan(
            config=config,
            resolved=resolve_external(config, BUILT_IN[engine.model], host),
            run_dir=run_dir,
            ports=ports,
            python="/v/python",
            model_dir="/m",
            **fields,
        )


def plan_on_two_gpus():
    assigned = assign_gpus(instances(PrefillDecode(1, 1)), ["0", "1"])
    engine = EngineConfig("llama-3.1-8b", engine="vllm")
    gpus = with_peers(assigned, ["0", "1"])
    return plan_of(engine, version="0.26.0", api_key="k3y", gpus=gpus)


def connector_config_of(command: list[str]) -> dict[str, str]:
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "PdrelayConnector"
    return transfer["kv_connector_extra_config"]


def test_a_vllm_command_on_gpus(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "the user's")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")
    specs = instances(PrefillDecode(1, 1))
    with plan_on_two_gpus() as plan:
        launch = VllmDriver(plan).launch(specs[1], 0)
        (process,) = launch.processes
        assert process.env["CUDA_VISIBLE_DEVICES"] == "1,0"
        assert process.env["NCCL_NVLS_ENABLE"] == "2"
        assert process.env["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
        assert process.env["VLLM_ALLREDUCE_USE_SYMM_MEM"] == "0"
        assert process.env["PDRELAY_ENGINE_KEY"] == "k3y"
        assert process.env["VLLM_API_KEY"] == ""
        command = list(process.command)
        assert command[0] == "/v/python"
        assert command[command.index("--gpu-memory-utilization") + 1] == "0.9"
        assert command[command.index("--dtype") + 1] == "bfloat16"
        assert launch.control.ready.resolved["gpus"] == "1"  # its own; it sees both
        assert "VLLM_USE_FLASHINFER_SAMPLER" not in process.env
        assert "transport" not in connector_config_of(command)
        over_nccl = replace(plan, resolved=replace(plan.resolved, transport="pdrelay-nccl"))
        command = list(VllmDriver(over_nccl).launch(specs[1], 0).processes[0].command)
        assert connector_config_of(command)["transport"] == "nccl"
        producer = VllmDriver(over_nccl).launch(specs[0], 0).control
        assert producer.producer_address
        shared = replace(plan, gpus=dict.fromkeys(plan.gpus, "0"))
        assert shared.sharers(specs[0]) == 2


@pytest.mark.parametrize(
    ("modules", "users", "device", "sampler"),
    [
        ("", None, "cuda", "0"),
        ("", "1", "cuda", "1"),
        ("flashinfer", None, "cuda", None),
        ("", None, "cpu", None),
    ],
)
def test_without_flashinfer_vllm_samples_by_itself(
    tmp_path, monkeypatch, modules, users, device, sampler
):
    python = tmp_path / "python"
    stub = Path(__file__).with_name("stub_engine_python.py")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {stub} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("STUB_MODULES", modules)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    if users is not None:
        monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", users)
    config = ServeConfig(
        engine=EngineConfig("llama-3.1-8b", engine="vllm", device=device),
        topology=PrefillDecode(1, 1),
        external=ExternalConfig(engine_python=str(python)),
    )
    host = Host(8, 64 << 30, 64 << 30, 2, 4096, None)
    with RunDir() as run_dir, contextlib.ExitStack() as stack:
        plan = external_plan(config, host)
        driver, lines = make_driver(plan, host, run_dir, stack)
        for spec in plan.specs:
            (process,) = driver.launch(spec, 0).processes
            assert process.env.get("VLLM_USE_FLASHINFER_SAMPLER") == sampler
    said = [line for line in lines if "VLLM_USE_FLASHINFER_SAMPLER=0" in line]
    assert len(said) == (sampler == "0")


def test_an_instance_over_two_gpus_reports_both_and_none_behind_them():
    spec = instances(TensorParallel(2))[0]
    with plan_on_two_gpus() as plan:
        assert replace(plan, gpus={spec.instance: "4,7,9"}).own_gpus(spec) == "4,7"


def sglang_plan(device):
    engine = EngineConfig("tiny", engine="sglang", device=device, threads_per_rank=3)
    gpus = {"prefill-0": "0", "decode-0": "1"} if device == "cuda" else {}
    return plan_of(engine, version="0.5.21", gpus=gpus)


def option(command, name):
    return command[command.index(name) + 1]


def test_a_restarted_sglang_producer_has_another_bootstrap_port():
    prefill, decode = instances(PrefillDecode(1, 1))
    with sglang_plan("cuda") as plan:
        driver = SglangDriver(plan)
        launches = [driver.launch(prefill, incarnation) for incarnation in (0, 1)]
        told = [each.control.bootstrap_port for each in launches]
        given = [option(each.processes[0].command, BOOTSTRAP) for each in launches]
        assert list(map(str, told)) == given and told[0] != told[1]
        urls = {each.control.url for each in launches}
        assert len(urls) == 1
        consumer = driver.launch(decode, 0)
        assert consumer.control.bootstrap_port == 0
        assert BOOTSTRAP not in consumer.processes[0].command


def test_sglangs_instances_get_a_key_that_no_command_shows():
    spec = instances(Replicas(1))[0]
    with sglang_plan("cpu") as plan:
        plan = replace(plan, api_key="k3y")
        driver = SglangDriver(plan)
        launch = driver.launch(spec, 0)
        (process,) = launch.processes
        assert launch.control.api_key == "k3y"
        assert not any("k3y" in text for text in (*process.command, *process.env.values()))
        file = Path(option(process.command, "--config"))
        assert json.loads(file.read_text()) == {"api-key": "k3y"}
        assert file.stat().st_mode & 0o777 == 0o600
        assert driver.notes() == []
        external = replace(plan.config.external, engine_args=("--config", "mine.yaml"))
        with_args = replace(plan, config=replace(plan.config, external=external))
        for without in (replace(plan, version="0.5.2"), with_args):
            driver = SglangDriver(without)
            launch = driver.launch(spec, 0)
            assert launch.control.api_key == ""
            assert launch.processes[0].command.count("--config") == (without is with_args)
            assert "anybody on this host" in driver.notes()[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("users", [{}, {"HOST_IP": "10.0.0.7", "OMP_NUM_THREADS": "2"}])
def test_the_environment_of_sglang(device, users, monkeypatch):
    for name in ("SGLANG_HOST_IP", "HOST_IP", "OMP_NUM_THREADS", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    with sglang_plan(device) as plan:
        (process,) = SglangDriver(plan).launch(instances(PrefillDecode(1, 1))[1], 0).processes
        alone = SglangDriver(plan).environment(instances(Replicas(1))[0])
    on_cpu = device == "cpu"
    assert process.env.get("SGLANG_HOST_IP") == (None if users else "127.0.0.1")
    assert "SGLANG_HOST_IP" not in alone
    assert process.env.get("SGLANG_USE_CPU_ENGINE") == ("1" if on_cpu else None)
    threads = users.get("OMP_NUM_THREADS", "3" if on_cpu else None)
    assert process.env.get("OMP_NUM_THREADS") == threads
    assert ("--device" in process.command) == on_cpu
