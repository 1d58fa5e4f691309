"""What the user asked of `pdrelay serve`: validated, frozen, None where it is "auto"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pdrelay.core.endpoint import Dispatch
from pdrelay.core.messages import Role
from pdrelay.core.rank_config import AttentionName, Verify
from pdrelay.launch.topology import Replicas, Topology

TransportName = Literal["mapped", "nccl", "tcp", "pool"]


@dataclass(frozen=True)
class EngineConfig:
    """One engine instance, all ranks alike. Sizes are bytes or tokens."""

    model: str  # a Hugging Face directory or a built-in shape
    engine: Literal["native", "vllm", "sglang"] = "native"
    load_format: Literal["auto", "dummy"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention_backend: AttentionName = "auto"
    seed: int = 0
    max_model_len: int | None = None
    block_size: int | None = None
    kv_cache_memory: int | None = None  # bytes a rank
    gpu_memory_utilization: float = 0.9  # of each GPU, all ranks on it together
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    threads_per_rank: int | None = None


@dataclass(frozen=True)
class TransportConfig:
    name: TransportName = "mapped"
    kv_transfer_timeout_s: float = 30.0
    verify: Verify = "sample"


@dataclass(frozen=True)
class Attach:
    """An instance started elsewhere."""

    url: str  # http://host:port
    role: Role = Role.BOTH
    bootstrap_port: int = 8998  # SGLang's default; of prefill instances


@dataclass(frozen=True)
class ExternalConfig:
    """A production engine in place of the native one."""

    connector: str = "auto"  # how its KV moves in P/D
    dispatch: Dispatch = "auto"  # vLLM in P/D: who of producer and consumer gets a request when
    engine_args: tuple[str, ...] = ()  # for every instance's command line, as they are
    engine_python: str | None = None  # the interpreter that has the engine; None: this one
    attach: tuple[Attach, ...] = ()


@dataclass(frozen=True)
class ServeConfig:
    """Everything `pdrelay serve` does."""

    engine: EngineConfig
    topology: Topology = field(default_factory=lambda: Replicas(1))
    transport: TransportConfig = TransportConfig()
    external: ExternalConfig = ExternalConfig()
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    served_model_name: str | None = None  # None: the model's directory or shape name
    api_key: str | None = None
    max_num_requests: int | None = None  # in flight; None: the router's default
    request_timeout_s: float = 600.0
    startup_timeout_s: float = 300.0
    worker_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    allow_oversubscribe: bool = False
    busy_wait: Literal["auto", "on", "off"] = "auto"
    event_log: str | None = None
    ready_file: str | None = None
    log_level: str = "info"
