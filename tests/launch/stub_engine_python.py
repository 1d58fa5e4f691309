"""Stands in for the interpreter of an engine's environment (`--engine-python`).

    -c CODE vllm ...         tells what it holds, as the launcher asks for it; STUB_VERSION and
                             STUB_MODULES say which release and modules
    -m MODULE ARGS           runs the package's fake server; STUB_ENGINE says how it fares

STUB_ENGINE: "" serves, "crash" prints a traceback and exits, "hang" never listens.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CRASH = """\
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] EngineCore failed to start.
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7)   File "model.py", line 1, in load
(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def main() -> int:
    if sys.argv[1] == "-c":
        engine, flags = sys.argv[3], sys.argv[5].split()
        version = os.environ.get("STUB_VERSION", "0.32.0")
        facts = {
            "python": sys.version.split()[0],
            "versions": {engine: version},
            "torch_requirement": "",
            "torch_cuda": "",
            "connectors": ["NixlConnector", *["P2pNcclConnector"] * version.startswith("0.23.")],
            "flags": flags[:1],
            "modules": os.environ.get("STUB_MODULES", "").split(),
        }
        print(json.dumps(facts))
        return 0
    notes = os.environ.get("STUB_NOTES")
    if notes:
        keep = ("CUDA_", "PDRELAY_", "VLLM_", "UCX_", "PYTHONPATH", "HF_", "OMP_")
        env = {key: value for key, value in os.environ.items() if key.startswith(keep)}
        # As real engines do, it starts a process that ends with nobody.
        core = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
        pids = [os.getpid(), core.pid]
        line = json.dumps({"argv": sys.argv[1:], "env": env, "pids": pids})
        with Path(notes).open("a") as file:
            file.write(line + "\n")
    match os.environ.get("STUB_ENGINE", ""):
        case "crash":
            print(CRASH, file=sys.stderr, flush=True)
            return 1
        case "hang":
            time.sleep(600)
    from pdrelay.router.fakes.server import run_fake
    from pdrelay.router.fakes.sglang import FakeSglang
    from pdrelay.router.fakes.vllm import FakeVllm

    kind = FakeSglang if sys.argv[2].startswith("sglang") else FakeVllm
    return run_fake(kind, sys.argv[3:], os.environ.get("PDRELAY_ENGINE_KEY", ""))


if __name__ == "__main__":
    sys.exit(main())
