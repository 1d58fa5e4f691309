"""From flags and files to a configuration: what is refused, and in which words."""

from __future__ import annotations

import pytest

from pdrelay import cli
from pdrelay.cli.serve_options import serve_config
from pdrelay.errors import ConfigError
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.topology import PrefillDecode, Replicas, TensorParallel


def parse(*argv) -> ServeConfig:
    return serve_config(cli.parse(["serve", *argv]))


def test_defaults():
    config = parse("tiny")
    assert config.engine.model == "tiny"
    assert config.topology == Replicas(1)
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.engine.block_size is None
    assert config.engine.gpu_memory_utilization == 0.9
    assert config.engine.enable_prefix_caching is True
    assert config.transport.name == "mapped"
    assert config.worker_timeout_s == 30.0


def test_every_flag_arrives():
    config = parse(
        *("tiny", "--prefill", "3", "--decode", "2", "--transport", "tcp", "--engine", "native"),
        *("--device", "cpu", "--dtype", "bfloat16", "--load-format", "dummy", "--seed", "7"),
        *("--host", "0.0.0.0", "--port", "0", "--served-model-name", "m", "--max-model-len", "99"),
        *("--kv-cache-memory", "64MiB", "--block-size", "8", "--max-num-seqs", "5"),
        *("--max-num-batched-tokens", "77", "--no-enable-prefix-caching", "--api-key", "k"),
        *("--kv-transfer-timeout", "1.5", "--kv-transfer-verify", "full", "--event-log", "e"),
        *("--ready-file", "r", "--max-num-requests", "11", "--request-timeout", "12"),
        *("--worker-timeout", "13", "--threads-per-rank", "2", "--log-level", "debug"),
        *("--drain-timeout", "0", "--startup-timeout", "14", "--allow-oversubscribe"),
        *("--gpu-memory-utilization", "0.5", "--busy-wait", "off"),
    )
    engine = config.engine
    assert config.topology == PrefillDecode(3, 2)
    assert config.transport.name == "tcp"
    assert config.transport.kv_transfer_timeout_s == 1.5
    assert config.transport.verify == "full"
    assert (engine.device, engine.dtype, engine.load_format) == ("cpu", "bfloat16", "dummy")
    assert (engine.seed, engine.max_model_len, engine.block_size) == (7, 99, 8)
    assert engine.kv_cache_memory == 64 << 20
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (5, 77)
    assert engine.enable_prefix_caching is False
    assert engine.gpu_memory_utilization == 0.5
    assert engine.threads_per_rank == 2
    assert (config.host, config.port, config.api_key) == ("0.0.0.0", 0, "k")
    assert config.served_model_name == "m"
    assert (config.event_log, config.ready_file, config.log_level) == ("e", "r", "debug")
    assert (config.max_num_requests, config.request_timeout_s) == (11, 12.0)
    assert (config.worker_timeout_s, config.startup_timeout_s) == (13.0, 14.0)
    assert config.drain_timeout_s == 0.0
    assert config.allow_oversubscribe is True
    assert config.busy_wait == "off"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--replicas", "0"], "--replicas is '0'; it must be an integer from 1 to 1024"),
        (["--replicas", "-1"], "--replicas is '-1'"),
        (["--replicas", "two"], "--replicas is 'two'"),
        (["--replicas", "1.5"], "--replicas is '1.5'"),
        (["--replicas", "9" * 400], "--replicas is '999"),
        (["--replicas", "٣"], "--replicas"),
        (["--replicas", ""], "--replicas is ''"),
        (["--tp", "99999999999999999999"], "--tp is"),
        (["--replicas", "2", "--tp", "2"], "--replicas and --tp exclude each other"),
        (["--tp", "2", "--prefill", "1", "--decode", "1"], "exclude each other"),
        (["--replicas", "2", "--decode", "1"], "exclude each other"),
        (["--prefill", "1"], "--prefill needs --decode"),
        (["--decode", "1"], "--decode needs --prefill"),
        (["--transport", "mappd"], "mapped?"),
        (["--transport", "rdma"], "one of mapped, nccl, tcp, pool"),
        (["--engine", "vlm"], "vllm?"),
        (["--device", "tpu"], "one of auto, cpu, cuda"),
        (["--dtype", "float16"], "one of auto, float32, bfloat16"),
        (["--load-format", "pt"], "one of auto, dummy"),
        (["--port", "65536"], "--port is '65536'; it must be an integer from 0 to 65535"),
        (["--port", "-1"], "--port is '-1'"),
        (["--seed", "-5"], "--seed"),
        (["--max-model-len", "0"], "--max-model-len"),
        (["--block-size", "0"], "--block-size"),
        (["--block-size", "4096"], "--block-size"),
        (["--max-num-seqs", "1e3"], "--max-num-seqs is '1e3'"),
        (["--kv-cache-memory", "2XB"], "such as 536870912 or 512MiB"),
        (["--kv-cache-memory", "-1"], "--kv-cache-memory"),
        (["--kv-cache-memory", "0"], "--kv-cache-memory"),
        (["--kv-cache-memory", "9999999TiB"], "--kv-cache-memory"),
        (["--kv-transfer-timeout", "nan"], "--kv-transfer-timeout is 'nan'; it must be a number"),
        (["--kv-transfer-timeout", "inf"], "--kv-transfer-timeout"),
        (["--kv-transfer-timeout", "0"], "--kv-transfer-timeout"),
        (["--worker-timeout", "1e999"], "--worker-timeout"),
        (["--request-timeout", "-3"], "--request-timeout"),
        (["--drain-timeout", "soon"], "--drain-timeout"),
        (["--host", ""], "--host"),
        (["--served-model-name", "a\nb"], "--served-model-name"),
        (["--log-level", "loud"], "one of debug, info, warning, error"),
        (["--config", "/nonexistent.toml"], "cannot read --config /nonexistent.toml"),
    ],
)
def test_bad_flags_name_cause_and_fix(argv, says, capsys):
    with pytest.raises(ConfigError) as error:
        parse("tiny", *argv)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert cli.main(["serve", "tiny", *argv]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("pdrelay: error: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["serve", "tiny", "--prefil", "1"], "did you mean --prefill?"),
        (["serve", "tiny", "--max_num_seqs=3"], "did you mean --max-num-seqs?"),
        (["serve", "tiny", "--port"], "expected one argument"),
        (["serve", "tiny", "extra"], "unknown argument extra"),
        (["sevre", "tiny"], "did you mean serve?"),
        (["--nonsense"], "COMMAND"),
        ([], "COMMAND"),
    ],
)
def test_unknown_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1


def test_no_model():
    with pytest.raises(ConfigError, match="no model"):
        parse()


def test_version_and_help(capsys):
    for argv in (["--version"], ["--help"], ["serve", "--help"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(argv)
        assert exit.value.code == 0
    assert "--kv-cache-memory" in capsys.readouterr().out


def test_interrupt_and_launch_errors_have_their_status(monkeypatch, capsys):
    from pdrelay.cli import serve

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "run", interrupted)
    assert cli.main(["serve", "tiny"]) == 130


@pytest.fixture
def toml(tmp_path):
    def write(content):
        path = tmp_path / "serve.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_file_gives_what_flags_do_not(toml):
    path = toml('model = "tiny"\nreplicas = 2\nport = 1234\nkv_cache_memory = "1GiB"\n')
    config = parse("--config", path, "--port", "0")
    assert (config.engine.model, config.port) == ("tiny", 0)
    assert config.topology == Replicas(2)
    assert config.engine.kv_cache_memory == 1 << 30


def test_file_keys_may_have_dashes_and_booleans(toml):
    path = toml("enable-prefix-caching = false\nmax-num-seqs = 3\nkv-transfer-timeout = 2\n")
    config = parse("tiny", "--config", path)
    assert config.engine.enable_prefix_caching is False
    assert config.engine.max_num_seqs == 3
    assert config.transport.kv_transfer_timeout_s == 2.0
    config = parse("tiny", "--config", path, "--enable-prefix-caching")
    assert config.engine.enable_prefix_caching is True


def test_topology_of_the_command_line_replaces_the_files(toml):
    path = toml("prefill = 1\ndecode = 1\n")
    assert parse("tiny", "--config", path).topology == PrefillDecode(1, 1)
    assert parse("tiny", "--config", path, "--tp", "2").topology == TensorParallel(2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prot = 1\n", "unknown key 'prot'; did you mean port?"),
        ("xyzzy = 1\n", "unknown key 'xyzzy'"),
        ('port = "many"\n', "port is 'many'"),
        ("port = true\n", "port is 'True'"),
        ("port = 80.5\n", "port is '80.5'"),
        ("port = [1]\n", "port is '[1]'"),
        ("[port]\na = 1\n", "port is"),
        ("host = 3\n", "host is '3'"),
        ("request-timeout = nan\n", "request-timeout is 'nan'"),
        ("request-timeout = false\n", "request-timeout"),
        ("allow-oversubscribe = 1\n", "true or false"),
        ("block_size = 8\nblock-size = 8\n", "given twice"),
        ("port = \n", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        ("x = " + "[" * 100_000, "not valid TOML"),
    ],
)
def test_bad_files_name_file_and_key(toml, content, says):
    path = toml(content)
    with pytest.raises(ConfigError) as error:
        parse("tiny", "--config", path)
    assert says in str(error.value)
    assert path in str(error.value)
    assert "\n" not in str(error.value)
