"""A benchmark's ranks as processes of its own script, each started with `--rank N`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# NVLink multicast needs rights over the host's switches that a shared host does not give.
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def run_ranks(command: Sequence[str], directory: str, *, world_size: int, seconds: float) -> Any:
    """What rank 0 left as JSON in `directory`/rank0.json. Ends the program when a rank fails, or
    they are not done within `seconds`."""
    environment = os.environ | _NO_MULTICAST
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment)
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        sys.exit(f"not done within {seconds:g} s")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed; see above")
    return json.loads(Path(directory, "rank0.json").read_text())
