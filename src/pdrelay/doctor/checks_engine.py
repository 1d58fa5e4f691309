"""Preflight of vLLM and SGLang: versions, what they ask for, and the connector."""

from __future__ import annotations

from pdrelay.doctor.check import Check, failure, note, ok, warning
from pdrelay.doctor.engine_probe import EngineFacts, pinned_version
from pdrelay.doctor.facts import Ask, Facts
from pdrelay.doctor.version import Version, parse_version, show_version
from pdrelay.launch.engine_version import KNOWN
from pdrelay.launch.topology import PrefillDecode, num_ranks
from pdrelay.launch.units import format_bytes

_P2P_NCCL = "P2pNcclConnector"
_P2P_NCCL_SINCE, _P2P_NCCL_REMOVED = (0, 9, 2), (0, 24, 0)
_P2P_NCCL_POOL_BYTES = 32 << 30  # a rank, pinned
_RANDOM_IDS_SINCE = (0, 14, 0)
_V0_CONNECTORS = ("PyNcclConnector", "LMCacheConnector")


def check_engine(ask: Ask, facts: Facts) -> list[Check]:
    """All of this module; nothing for the native engine."""
    engine = facts.engine
    if engine is None:
        return []
    if engine.error:
        return [
            failure(
                "engine",
                f"{engine.executable}: {engine.error}",
                f"--engine-python must be the Python of an environment with {ask.engine}",
            )
        ]
    text = engine.version_of(ask.engine)
    if text is None:
        return [
            failure(
                "engine",
                f"{engine.executable} has no {ask.engine}",
                f"install it there, or give the right --engine-python (Python of an environment "
                f"with {ask.engine})",
            )
        ]
    return [
        check_release(ask, engine, text),
        *check_torch(engine, facts),
        *check_connector(ask, engine, parse_version(text)),
        *check_pinned_pool(ask, facts, parse_version(text)),
    ]


def check_release(ask: Ask, engine: EngineFacts, text: str) -> Check:
    first, beyond = KNOWN[ask.engine]
    version = parse_version(text)
    shown = f"{ask.engine} {text} on Python {engine.python}"
    if version is None or first <= version < beyond:
        return ok("engine", shown)
    return warning(
        "engine",
        f"{shown}: pdrelay knows {show_version(first)} up to, and without, {show_version(beyond)}",
        "use one of these releases, or look out for options that have changed",
    )


def check_torch(engine: EngineFacts, facts: Facts) -> list[Check]:
    """The release that the engine pins, and the driver's CUDA."""
    installed = engine.versions.get("torch")
    if installed is None:
        return [failure("torch", "the engine's Python has no torch", "reinstall the engine")]
    wanted = pinned_version(engine.torch_requirement)
    if wanted is not None and parse_version(wanted) != parse_version(installed):
        return [
            failure(
                "torch",
                f"torch {installed} is installed, the engine was built for {wanted}",
                f"install torch {wanted} there, in a fresh environment at best",
            )
        ]
    return [*_check_cuda(engine, facts), *_check_companions(engine)] or [
        ok("torch", f"{installed}, as the engine asks")
    ]


def _check_cuda(engine: EngineFacts, facts: Facts) -> list[Check]:
    built, driver = parse_version(engine.torch_cuda), facts.gpus.cuda_version
    if built is None or driver is None or built[0] * 1000 <= driver // 1000 * 1000:
        return []
    return [
        failure(
            "CUDA",
            f"torch is built for CUDA {engine.torch_cuda}, the driver offers "
            f"{driver // 1000}.{driver % 1000 // 10}",
            "update the NVIDIA driver, or install a torch for the driver's CUDA",
        )
    ]


def _check_companions(engine: EngineFacts) -> list[Check]:
    """CUDA builds of torchvision and torchaudio do not load beside a torch for the CPU."""
    if not engine.versions["torch"].endswith("+cpu"):
        return []
    clash = [
        name
        for name in ("torchvision", "torchaudio")
        if name in engine.versions and not engine.versions[name].endswith("+cpu")
    ]
    if not clash:
        return []
    return [
        warning(
            "torch",
            f"{' and '.join(clash)} may be CUDA builds beside a torch for the CPU",
            f"pip uninstall {' '.join(clash)}",
        )
    ]


def check_connector(ask: Ask, engine: EngineFacts, version: Version | None) -> list[Check]:
    """The one that was asked for exists in this vLLM, and what it needs."""
    if not isinstance(ask.config.topology, PrefillDecode) or ask.engine != "vllm":
        return []
    name = ask.connector
    if name in _V0_CONNECTORS:
        return [
            failure(
                "connector",
                f"{name} is a connector of vLLM's V0 engine",
                "use NixlConnector or pdrelay's own (leave --connector out)",
            )
        ]
    if name == _P2P_NCCL and version is not None and version >= _P2P_NCCL_REMOVED:
        return [
            failure(
                "connector",
                f"{name} was removed in vLLM {show_version(_P2P_NCCL_REMOVED)}",
                "use NixlConnector or pdrelay's own (leave --connector out)",
            )
        ]
    if name and engine.connectors and name not in (*engine.connectors, "PdrelayConnector"):
        return [
            failure(
                "connector",
                f"this vLLM has no connector {name}",
                f"use one of {', '.join(sorted(engine.connectors))}",
            )
        ]
    if name.startswith("Nixl"):
        return _check_nixl(engine)
    return [ok("connector", name or "pdrelay's choice")]


def _check_nixl(engine: EngineFacts) -> list[Check]:
    builds = [name for name in ("nixl", "nixl-cu12", "nixl-cu13") if name in engine.versions]
    if not builds:
        return [failure("connector", "the engine's Python has no nixl", "pip install nixl there")]
    cuda = engine.torch_cuda.split(".")[0]
    if cuda and "nixl" not in builds and f"nixl-cu{cuda}" not in builds:
        return [
            failure(
                "connector",
                f"{builds[0]} is installed and torch is built for CUDA {engine.torch_cuda}",
                f"pip install nixl-cu{cuda}",
            )
        ]
    return [ok("connector", ", ".join(f"{name} {engine.versions[name]}" for name in builds))]


def check_pinned_pool(ask: Ask, facts: Facts, version: Version | None) -> list[Check]:
    """P2pNcclConnector pins host memory, and its request ids changed under it."""
    if ask.connector != _P2P_NCCL or version is None:
        return []
    if not _P2P_NCCL_SINCE <= version < _P2P_NCCL_REMOVED:
        return []
    found = []
    need = num_ranks(ask.config.topology) * _P2P_NCCL_POOL_BYTES
    locked = facts.machine.memlock_bytes
    if need > facts.host.available_bytes or (locked is not None and locked < _P2P_NCCL_POOL_BYTES):
        limit = "" if locked is None else f", {format_bytes(locked)} may be locked"
        found.append(
            failure(
                "pinned memory",
                f"{_P2P_NCCL} pins 32 GiB a rank, {format_bytes(need)} in all; "
                f"{format_bytes(facts.host.available_bytes)} are available{limit}",
                'set "mem_pool_size_gb": "2" in kv_connector_extra_config, or another connector',
            )
        )
    variable = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
    if version >= _RANDOM_IDS_SINCE and facts.machine.environment.get(variable) != "1":
        found.append(
            failure(
                "request ids",
                f"from vLLM 0.14 on each instance appends a random suffix to request ids, and "
                f"decode waits for ever under {_P2P_NCCL}",
                f"set {variable}=1 for both instances",
            )
        )
    return found or [ok("pinned memory", f"{format_bytes(need)} for {_P2P_NCCL} are available")]


def check_environment(ask: Ask, facts: Facts) -> list[Check]:
    """Variables that change what an engine does in P/D."""
    env = facts.machine.environment
    found = []
    allocator = env.get("PYTORCH_ALLOC_CONF", "") + env.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" in allocator.replace(" ", ""):
        found.append(
            warning(
                "PYTORCH_CUDA_ALLOC_CONF",
                "expandable segments cannot be exported as one CUDA IPC handle",
                "unset it for P/D over CUDA IPC",
            )
        )
    if env.get("NCCL_P2P_DISABLE") == "1":
        found.append(
            warning(
                "NCCL_P2P_DISABLE",
                "NCCL may not use NVLink or PCIe peer access",
                "unset it unless peer access is broken on this machine",
            )
        )
    ucx = env.get("UCX_TLS", "")
    if ask.connector.startswith("Nixl") and ucx and ucx != "all" and "cuda" not in ucx:
        found.append(
            failure(
                "UCX_TLS",
                f"{ucx} has no CUDA transport: NIXL cannot reach the pages",
                "UCX_TLS=all",
            )
        )
    if env.get("VLLM_USE_V1") == "0" and ask.engine == "vllm":
        found.append(
            failure("VLLM_USE_V1", "the V0 engine has no KV connectors of V1", "unset VLLM_USE_V1")
        )
    if env.get("HF_HUB_OFFLINE") == "1" and facts.model is None and ask.config.engine.model:
        found.append(note("HF_HUB_OFFLINE", "a hub model must be in the local cache already"))
    return found
