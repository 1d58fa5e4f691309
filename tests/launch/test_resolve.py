"""What "auto" becomes, and which requests no machine or this machine cannot serve."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import msgspec
import pytest

from pdrelay.core.messages import Role
from pdrelay.core.rank_config import encode_rank_config, read_rank_config
from pdrelay.errors import ConfigError, ProtocolError
from pdrelay.launch.config import EngineConfig, ServeConfig, TransportConfig
from pdrelay.launch.host import Host, _num_cores, _num_visible, inspect_host
from pdrelay.launch.listen import listen, url_of
from pdrelay.launch.native_driver import RankPlan, rank_environment
from pdrelay.launch.preflight import check_files, check_memory, check_topology, describe
from pdrelay.launch.resolve import num_parameters, resolve
from pdrelay.launch.resolve_external import resolve_external
from pdrelay.launch.restart_policy import RestartOptions, RestartPolicy
from pdrelay.launch.run_dir import RunDir
from pdrelay.launch.shared_pool import open_shared_pool
from pdrelay.launch.topology import (
    PrefillDecode,
    Replicas,
    TensorParallel,
    instances,
    num_ranks,
)
from pdrelay.launch.units import format_bytes, parse_bytes
from pdrelay.model.config import BUILT_IN

GIB = 1 << 30
HOST = Host(
    num_cores=8,
    memory_bytes=64 * GIB,
    available_bytes=60 * GIB,
    num_gpus=0,
    max_open_files=1024,
    compiler="/usr/bin/cc",
)
TINY = BUILT_IN["tiny"]
LLAMA = BUILT_IN["llama-3.1-8b"]


def config(topology=None, **engine) -> ServeConfig:
    return ServeConfig(
        engine=EngineConfig(**{"model": "tiny", **engine}), topology=topology or Replicas(1)
    )


def test_tiny_on_a_cpu():
    resolved = resolve(config(), TINY, HOST)
    assert (resolved.device, resolved.dtype, resolved.load_format) == ("cpu", "float32", "dummy")
    assert resolved.max_model_len == 16_384
    assert resolved.layout.total_bytes == 256 << 20
    assert resolved.layout.num_blocks == 4096
    assert resolved.num_threads == 7
    assert resolved.transport == ""
    assert resolved.served_model_name == "tiny"
    assert any("auto" in line for line in describe(config(), resolved, HOST))


def test_small_machine_gets_a_tenth_of_its_memory():
    resolved = resolve(config(), TINY, replace(HOST, memory_bytes=GIB))
    assert resolved.layout.total_bytes <= GIB // 10
    assert resolved.layout.total_bytes > GIB // 10 - resolved.layout.block_bytes


def test_large_model_gets_more_and_its_context_is_bounded():
    resolved = resolve(config(model="llama-3.1-8b"), LLAMA, HOST)
    assert resolved.layout.total_bytes <= 16 * GIB
    assert resolved.max_model_len == resolved.layout.num_blocks * 16
    assert any("holds no longer request" in note for note in resolved.notes)
    short = resolve(config(model="llama-3.1-8b", max_model_len=4096), LLAMA, HOST)
    assert short.max_model_len == 4096


@pytest.mark.parametrize(
    ("cores", "gpus", "asked", "awake"),
    [
        (12, 2, "auto", True),  # front door, P and D
        (11, 2, "auto", False),
        (64, 0, "auto", False),
        (2, 0, "on", True),
        (64, 2, "off", False),
    ],
)
def test_processes_wait_awake_where_a_quarter_of_the_cores_is_enough(cores, gpus, asked, awake):
    host = replace(HOST, num_cores=cores, num_gpus=gpus)
    wanted = replace(config(PrefillDecode(1, 1)), busy_wait=asked)
    resolved = resolve(wanted, TINY, host)
    assert resolved.busy_wait is awake
    said = [note for note in resolved.notes if note.startswith("busy wait")]
    assert len(said) == (asked == "auto" and gpus > 0)


@pytest.mark.parametrize(("cores", "awake"), [(12, True), (11, False)])
def test_the_front_door_of_another_engine_waits_awake_as_well(cores, awake):
    host = replace(HOST, num_cores=cores, num_gpus=2)
    wanted = config(PrefillDecode(1, 1), engine="vllm", model="llama-3.1-8b")
    assert resolve_external(wanted, LLAMA, host).busy_wait is awake


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("", None)],
)
def test_cores_are_no_more_than_the_control_group_gives_time_on(tmp_path, limit, cores):
    (tmp_path / "cpu.max").write_text(limit)
    available = len(os.sched_getaffinity(0))
    assert _num_cores(tmp_path) == (available if cores is None else cores)


def test_tensor_parallel_ranks_hold_their_heads_only():
    one = resolve(config(), TINY, HOST)
    two = resolve(config(TensorParallel(2)), TINY, HOST)
    assert two.layout.num_kv_heads == 2
    assert two.layout.num_blocks == 2 * one.layout.num_blocks
    assert two.weights_bytes == one.weights_bytes // 2


def test_transport_is_for_prefill_and_decode_only():
    assert resolve(config(PrefillDecode(1, 1)), TINY, HOST).transport == "mapped"
    assert resolve(config(Replicas(2)), TINY, HOST).transport == ""


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (8, 2, 3), (8, 8, 1)]
)
def test_threads_leave_one_core_to_the_front_door(cores, ranks, threads):
    host = replace(HOST, num_cores=cores)
    assert resolve(config(Replicas(ranks)), TINY, host).num_threads == threads


def test_parameters_of_the_published_shape():
    assert num_parameters(LLAMA) == pytest.approx(8.03e9, rel=0.001)


def test_model_directory(tmp_path):
    asked = config(model=str(tmp_path / "Qwen3-0.6B"))
    resolved = resolve(asked, TINY, HOST)
    assert resolved.load_format == "safetensors"
    assert resolved.served_model_name == "Qwen3-0.6B"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (config(max_model_len=16_385), "exceeds the model's context of 16384"),
        (config(device="cuda"), "no NVIDIA GPU"),
        (config(attention_backend="fa3"), "--attention-backend fa3 runs on GPUs"),
        (config(TensorParallel(3)), "divide"),
        (config(TensorParallel(8)), "divide"),
        (config(kv_cache_memory=100), "holds no block"),
        (config(kv_cache_memory=1 << 20, max_model_len=1024), "lower it to 256"),
        (config(max_num_seqs=64, max_num_batched_tokens=63), "--max-num-batched-tokens 63"),
    ],
)
def test_impossible_requests(asked, says):
    with pytest.raises(ConfigError, match=says) as error:
        resolve(asked, TINY, HOST)
    assert "\n" not in str(error.value)


def test_suggested_kv_memory_is_exactly_enough():
    with pytest.raises(ConfigError) as error:
        resolve(config(kv_cache_memory=1 << 20, max_model_len=1001), TINY, HOST)
    enough = int(str(error.value).rsplit(" ", 1)[1])
    assert (
        resolve(config(kv_cache_memory=enough, max_model_len=1001), TINY, HOST).max_model_len
        == 1001
    )
    with pytest.raises(ConfigError):
        resolve(config(kv_cache_memory=enough - 1, max_model_len=1001), TINY, HOST)


def test_more_ranks_than_cores():
    asked = config(PrefillDecode(8, 1))
    with pytest.raises(ConfigError, match=r"needs 9 CPU cores.*offers 8.*--allow-oversubscribe"):
        check_topology(asked, HOST)
    check_topology(replace(asked, allow_oversubscribe=True), HOST)
    check_topology(config(PrefillDecode(7, 1)), HOST)


def test_more_ranks_than_gpus():
    host = replace(HOST, num_gpus=2)
    asked = config(PrefillDecode(2, 1), device="cuda")
    with pytest.raises(ConfigError, match=r"needs 3 GPUs.*offers 2.*--allow-oversubscribe"):
        check_topology(asked, host)
    check_topology(replace(asked, allow_oversubscribe=True), host)
    check_topology(config(PrefillDecode(1, 1)), host)
    check_topology(config(TensorParallel(2), device="cuda"), host)
    with pytest.raises(ConfigError, match=r"needs 4 GPUs.*offers 2.*--allow-oversubscribe"):
        check_topology(config(TensorParallel(4), device="cuda"), host)


def test_ranks_on_gpus_use_no_multicast():
    env = rank_environment({"NCCL_NVLS_ENABLE": "2"}, 1, on_gpu=True)
    assert env["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert env["NCCL_NVLS_ENABLE"] == "2", "as the user says"
    assert "NCCL_NVLS_ENABLE" not in rank_environment({}, 1)


def test_auto_takes_gpus_where_there_are_any():
    host = replace(HOST, num_gpus=2)
    resolved = resolve(config(PrefillDecode(1, 1), model="llama-3.1-8b"), LLAMA, host)
    assert (resolved.device, resolved.dtype, resolved.num_gpus) == ("cuda", "bfloat16", 2)
    assert resolved.layout.num_blocks == 0, "each rank measures"
    assert resolved.layout.layer_block_bytes == 256 << 10
    assert resolved.max_model_len == 131_072
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens) == (256, 8192)
    assert resolved.gpu_memory_utilization == 0.9
    assert any("measured by each rank" in line for line in describe(config(), resolved, host))
    assert resolve(config(device="cpu"), TINY, host).device == "cpu"
    with pytest.raises(ConfigError, match="float32 runs on CPU only"):
        resolve(config(dtype="float32"), TINY, host)


def test_kv_cache_memory_counts_on_gpus_too():
    host = replace(HOST, num_gpus=1)
    resolved = resolve(config(model="llama-3.1-8b", kv_cache_memory=32 * GIB), LLAMA, host)
    assert resolved.layout.num_blocks == 32 * GIB // (64 * 131_072)


def test_ranks_on_gpus_are_told_what_reads_their_pages():
    asked = config(attention_backend="fa3")
    resolved = resolve(asked, TINY, replace(HOST, num_gpus=1))
    with RunDir() as run_dir:
        (rank,) = RankPlan(asked, resolved, run_dir)(instances(asked.topology)[0], 0, 5)
    assert rank.attention == "fa3"


@pytest.mark.parametrize("asked", ["on", "off"])
def test_ranks_are_told_how_to_wait(asked):
    wanted = replace(config(PrefillDecode(1, 1)), busy_wait=asked)
    with RunDir() as run_dir:
        plan = RankPlan(wanted, resolve(wanted, TINY, HOST), run_dir)
        ranks = [plan(spec, 0, 5)[0] for spec in instances(wanted.topology)]
    assert [rank.busy_wait for rank in ranks] == [asked == "on"] * 2


def test_ranks_get_gpus_in_turn_and_share_their_memory():
    host = replace(HOST, num_gpus=2)
    for asked, devices, share in (
        (config(Replicas(2)), ["cuda:0", "cuda:1"], 0.9),
        (config(PrefillDecode(1, 1)), ["cuda:0", "cuda:1"], 0.9),
        (config(PrefillDecode(2, 1)), ["cuda:0", "cuda:1", "cuda:0"], 0.45),
    ):
        resolved = resolve(asked, TINY, host)
        with RunDir() as run_dir:
            plan = RankPlan(asked, resolved, run_dir)
            ranks = [plan(spec, 0, 5)[0] for spec in instances(asked.topology)]
        assert [rank.device for rank in ranks] == devices
        assert {rank.gpu_memory_utilization for rank in ranks} == {share}
        assert {rank.num_blocks for rank in ranks} == {0}


@pytest.mark.parametrize(
    ("devices", "count"), [("0", 1), ("3,1", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("GPU-ab,1", 2)]
)
def test_visible_devices_are_counted(devices, count):
    assert _num_visible(devices) == count


def test_memory_that_is_not_there():
    asked = config(Replicas(4), kv_cache_memory=GIB)
    resolved = resolve(asked, TINY, HOST)
    check_memory(asked, resolved, replace(HOST, available_bytes=6 * GIB))
    with pytest.raises(ConfigError, match=r"4 ranks.*lower --kv-cache-memory"):
        check_memory(asked, resolved, replace(HOST, available_bytes=4 * GIB))


def test_shared_pool_counts_once():
    asked = replace(
        config(PrefillDecode(1, 1), kv_cache_memory=GIB), transport=TransportConfig("pool")
    )
    resolved = resolve(asked, TINY, HOST)
    mapped = replace(resolved, transport="mapped")
    host = replace(HOST, available_bytes=int(2.8 * GIB))
    check_memory(asked, mapped, host)
    with pytest.raises(ConfigError):
        check_memory(asked, resolved, host)


def test_output_files(tmp_path):
    check_files(replace(config(), event_log=str(tmp_path / "e.jsonl")), HOST)
    with pytest.raises(ConfigError, match="--event-log: no directory"):
        check_files(replace(config(), event_log=str(tmp_path / "no" / "e.jsonl")), HOST)
    with pytest.raises(ConfigError, match="--ready-file: cannot write"):
        check_files(replace(config(), ready_file=str(tmp_path)), HOST)
    with pytest.raises(ConfigError, match="ulimit"):
        check_files(config(), replace(HOST, max_open_files=64))


def test_this_machine_is_described():
    host = inspect_host()
    assert host.num_cores == len(os.sched_getaffinity(0))
    assert 0 < host.available_bytes <= host.memory_bytes


def test_rank_configs_are_complete_and_travel():
    asked = config(PrefillDecode(1, 1))
    resolved = resolve(asked, TINY, HOST)
    with RunDir() as run_dir:
        assert os.stat(run_dir.path).st_mode & 0o777 == 0o700
        plan = RankPlan(asked, resolved, run_dir, pool=b"x", pool_fd=9)
        producer, consumer = (plan(spec, 3, 5)[0] for spec in instances(asked.topology))
        assert (producer.role, consumer.role) == (Role.PREFILL, Role.DECODE)
        assert producer.peer_address == ""
        assert consumer.peer_address == str(run_dir.path / "decode-0.3.sock")
        assert (consumer.control_fd, consumer.pool_fd, consumer.instance_index) == (5, 9, 1)
        read_end, write_end = os.pipe()
        with os.fdopen(write_end, "wb") as writer:
            writer.write(encode_rank_config(consumer))
        with os.fdopen(read_end, "rb") as reader:
            assert read_rank_config(reader) == consumer
        two = RankPlan(config(TensorParallel(2)), resolved, run_dir)
        ranks = two(instances(TensorParallel(2))[0], 0, 5)
        assert [(rank.rank, rank.control_fd) for rank in ranks] == [(0, 5), (1, -1)]
    assert not run_dir.path.exists()


def test_ranks_started_by_hand_are_told_so(tmp_path):
    for content in (b"", b"nonsense", msgspec.msgpack.encode({"instance": 3})):
        path = tmp_path / "in"
        path.write_bytes(content)
        with path.open("rb") as stream, pytest.raises(ProtocolError, match="pdrelay serve"):
            read_rank_config(stream)


def test_run_dir_refuses_a_path_too_long_for_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="TMPDIR"):
        RunDir()
    assert list(deep.iterdir()) == []


def test_shared_pool_is_for_its_transport_only():
    layout = resolve(config(PrefillDecode(1, 1), kv_cache_memory=1 << 20), TINY, HOST).layout
    assert open_shared_pool("mapped", layout).fd == -1
    pool = open_shared_pool("pool", layout)
    try:
        assert pool.fd >= 0
        assert pool.description
        pool.reclaim(1)
    finally:
        pool.close()


def test_instances_of_topologies():
    assert [spec.instance for spec in instances(PrefillDecode(2, 1))] == [
        "prefill-0",
        "prefill-1",
        "decode-0",
    ]
    assert [spec.index for spec in instances(PrefillDecode(2, 1))] == [0, 1, 2]
    assert [spec.world_size for spec in instances(TensorParallel(4))] == [4]
    assert num_ranks(PrefillDecode(2, 3)) == 5


@pytest.mark.parametrize(
    ("text", "num"),
    [("1", 1), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), ("4k", 4000)],
)
def test_bytes_are_read(text, num):
    assert parse_bytes(text) == num


@pytest.mark.parametrize("text", ["", "GiB", "1e9", "0x10", "1 2", "-1", "1XB", "nan", "1" * 40])
def test_other_bytes_are_not(text):
    with pytest.raises(ValueError, match="byte count"):
        parse_bytes(text)


def test_bytes_are_shown():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 << 29, 5 << 40, 1 << 52)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 GiB",
        "5 TiB",
        "4096 TiB",
    ]


def test_restart_policy_backs_off_forgets_and_gives_up():
    options = RestartOptions(initial_s=0.5, factor=2, max_s=1.5, max_deaths=5, window_s=60)
    policy = RestartPolicy(options)
    assert [policy.died(t) for t in (0, 1, 2, 3, 4)] == [0.5, 1.0, 1.5, 1.5, None]
    policy = RestartPolicy(options)
    assert [policy.died(100.0 * t) for t in range(20)] == [0.5] * 20


def test_listening_sockets():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            listen("127.0.0.1", port)
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    for host in ("no.such.host.invalid", "192.0.2.1", "\x00", "a" * 300):
        with pytest.raises(ConfigError, match="--host"):
            listen(host, 0)
