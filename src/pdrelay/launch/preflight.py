"""What can be known to fail before any process starts, said in one line with its fix."""

from __future__ import annotations

import os
from pathlib import Path

from pdrelay.errors import ConfigError
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.host import Host
from pdrelay.launch.resolve import ResolvedConfig, resolve_device
from pdrelay.launch.topology import num_ranks
from pdrelay.launch.units import format_bytes

_RANK_BASE_BYTES = 300 << 20  # interpreter and torch, resident, on CPU
_MIN_OPEN_FILES = 256


def check_topology(config: ServeConfig, host: Host) -> None:
    """Enough cores (GPUs) for the ranks. Raises ConfigError with both numbers."""
    ranks = num_ranks(config.topology)
    on_gpu = resolve_device(config, host) == "cuda"
    units, what = (host.num_gpus, "GPU") if on_gpu else (host.num_cores, "CPU core")
    if ranks <= units or config.allow_oversubscribe:
        return
    raise ConfigError(
        f"{config.topology} needs {ranks} {what}s, one a rank, and this machine offers {units}: "
        "ask for fewer, or pass --allow-oversubscribe (its latencies mean little)"
    )


def check_memory(config: ServeConfig, resolved: ResolvedConfig, host: Host) -> None:
    """Weights and KV cache of all ranks fit what is available. Raises ConfigError.

    On CUDA the engine checks its device's memory itself.
    """
    if resolved.device != "cpu":
        return
    ranks = num_ranks(config.topology)
    weights, kv_cache = resolved.weights_bytes, resolved.layout.total_bytes
    total = ranks * (weights + kv_cache + _RANK_BASE_BYTES)
    if resolved.transport == "pool":
        total += kv_cache
    if total <= host.available_bytes:
        return
    raise ConfigError(
        f"{ranks} rank{'s' if ranks != 1 else ''} with {format_bytes(weights)} of weights and "
        f"{format_bytes(kv_cache)} of KV cache each need {format_bytes(total)}, and "
        f"{format_bytes(host.available_bytes)} of memory are available: lower --kv-cache-memory, "
        "the number of ranks, or the model's size"
    )


def check_files(config: ServeConfig, host: Host) -> None:
    """Output files are writable and enough files may be open. Raises ConfigError."""
    for flag, path in (("--event-log", config.event_log), ("--ready-file", config.ready_file)):
        if path is None:
            continue
        parent = Path(path).resolve().parent
        if not parent.is_dir():
            raise ConfigError(f"{flag}: no directory {str(parent)!r}: make it first")
        if Path(path).is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"{flag}: cannot write {path!r}: give another path")
    if host.max_open_files < _MIN_OPEN_FILES:
        raise ConfigError(
            f"only {host.max_open_files} files may be open: raise it with 'ulimit -n 4096'"
        )


def describe(config: ServeConfig, resolved: ResolvedConfig, host: Host) -> list[str]:
    """What will run, as lines to print."""
    layout = resolved.layout
    pool = f"{layout.num_blocks} blocks" if layout.num_blocks else "blocks"
    size = f", {format_bytes(layout.total_bytes)}" if layout.num_blocks else ""
    lines = [
        f"topology: {config.topology}",
        f"model: {config.engine.model} as {resolved.served_model_name!r}, {resolved.dtype} on "
        f"{resolved.device}, weights {resolved.load_format}",
        f"KV cache a rank: {pool} of {layout.block_size} tokens{size}; context "
        f"{resolved.max_model_len} tokens",
    ]
    if resolved.transport:
        lines.append(f"transport: {resolved.transport}")
    if host.compiler is None and resolved.device == "cpu":
        lines.append("no C compiler found: torch replaces the fast CPU kernels (install gcc)")
    return lines + [f"  {note}" for note in resolved.notes]
