"""The embedded engine as a driver: one process a rank, told its RankConfig on standard input."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdrelay.core.messages import Role
from pdrelay.core.rank_config import RankConfig, encode_rank_config
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.driver import Launch, ProcessSpec, last_line
from pdrelay.launch.gpus import NO_MULTICAST
from pdrelay.launch.resolve import ResolvedConfig
from pdrelay.launch.run_dir import RunDir
from pdrelay.launch.topology import InstanceSpec, gpu_of

WORKER_COMMAND = (sys.executable, "-m", "pdrelay.engine.worker")
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def rank_environment(
    base: Mapping[str, str], num_threads: int, *, on_gpu: bool = False
) -> dict[str, str]:
    """`base` with every library's thread count set, unbuffered output, and on GPUs no multicast
    unless `base` says otherwise."""
    env = (NO_MULTICAST if on_gpu else {}) | dict(base)
    env.update(dict.fromkeys(_THREAD_VARIABLES, str(num_threads)))
    env["PYTHONUNBUFFERED"] = "1"
    env["TOKENIZERS_PARALLELISM"] = "false"
    return env


@dataclass(frozen=True)
class RankPlan:
    """The RankConfig of every rank of an incarnation."""

    config: ServeConfig
    resolved: ResolvedConfig
    run_dir: RunDir
    pool: bytes = b""
    pool_fd: int = -1

    def __call__(self, spec: InstanceSpec, incarnation: int, control_fd: int) -> list[RankConfig]:
        return [
            self._rank(spec, incarnation, rank, control_fd if rank == 0 else -1)
            for rank in range(spec.world_size)
        ]

    def _rank(self, spec: InstanceSpec, incarnation: int, rank: int, control_fd: int) -> RankConfig:
        engine, resolved = self.config.engine, self.resolved
        listens = spec.role is Role.DECODE and rank == 0
        return RankConfig(
            instance=spec.instance,
            instance_index=spec.index,
            incarnation=incarnation,
            role=spec.role,
            rank=rank,
            world_size=spec.world_size,
            control_fd=control_fd,
            run_dir=str(self.run_dir.path),
            peer_address=self.run_dir.peer_address(spec, incarnation) if listens else "",
            model=engine.model,
            load_format=resolved.load_format,
            device=self._device(spec, rank),
            dtype=resolved.dtype,
            attention=engine.attention_backend,
            seed=engine.seed,
            max_model_len=resolved.max_model_len,
            block_size=resolved.layout.block_size,
            num_blocks=resolved.layout.num_blocks,
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            enable_prefix_caching=engine.enable_prefix_caching,
            gpu_memory_utilization=resolved.gpu_memory_utilization,
            transport=resolved.transport,
            kv_transfer_timeout_s=self.config.transport.kv_transfer_timeout_s,
            verify=self.config.transport.verify,
            num_threads=resolved.num_threads,
            busy_wait=resolved.busy_wait,
            pool=self.pool,
            pool_fd=self.pool_fd,
            log_level=self.config.log_level,
        )

    def _device(self, spec: InstanceSpec, rank: int) -> str:
        """Every rank sees every GPU that the server sees: a producer maps its consumer's pages."""
        if self.resolved.num_gpus == 0:
            return self.resolved.device
        return f"{self.resolved.device}:{gpu_of(spec, rank, self.resolved.num_gpus)}"


@dataclass(frozen=True)
class NativeDriver:
    """Rank 0 has the other end of a socket pair; `Drain` on it ends the instance."""

    plan: RankPlan
    command: Sequence[str] = WORKER_COMMAND
    drain_signal: signal.Signals | None = None

    def launch(self, spec: InstanceSpec, incarnation: int) -> Launch:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        ranks = self.plan(spec, incarnation, theirs.fileno())
        return Launch(tuple(self._process(rank) for rank in ranks), ours, (theirs,))

    def _process(self, config: RankConfig) -> ProcessSpec:
        name = f"{config.instance}.{config.rank}"
        return ProcessSpec(
            label=f"rank {config.rank}",
            prefix=f"[{name}] ",
            command=(*self.command, name),  # an argument only to be seen by ps
            env=rank_environment(os.environ, config.num_threads, on_gpu=config.device != "cpu"),
            stdin=encode_rank_config(config),
            pass_fds=tuple(fd for fd in (config.control_fd, config.pool_fd) if fd >= 0),
        )

    def explain(self, lines: Sequence[str]) -> str:
        return last_line(lines)
