"""From what was asked to what will run, for engines that size their own KV cache."""

from __future__ import annotations

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ConfigError
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.host import Host
from pdrelay.launch.resolve import (
    ResolvedConfig,
    default_model_name,
    num_parameters,
    resolve_device,
    waits_awake,
)
from pdrelay.launch.topology import PrefillDecode, num_ranks, tensor_parallel_size
from pdrelay.model.config import ModelConfig, is_built_in

VLLM_CONNECTORS = ("pdrelay", "pdrelay-nccl", "nixl")
SGLANG_BACKENDS = ("nixl", "mooncake", "ascend", "fake")
_BLOCK_TOKENS = 16  # for bytes a token only: the engine chooses its own block size


def resolve_external(config: ServeConfig, model: ModelConfig, host: Host) -> ResolvedConfig:
    """Fill in every "auto". Raises ConfigError for what cannot run here."""
    engine = config.engine
    notes: list[str] = []
    device = resolve_device(config, host)
    if engine.device == "auto":
        notes.append(f"device: {device} (auto; the driver lists {host.num_gpus} NVIDIA GPUs)")
    max_model_len = _max_model_len(config, model, notes)
    tp_size = tensor_parallel_size(config.topology)
    dtype = _dtype(config, device, model, notes)
    layout = KVLayout(
        num_layers=model.num_layers,
        num_blocks=0,
        block_size=_BLOCK_TOKENS,
        num_kv_heads=max(model.num_kv_heads // tp_size, 1),
        head_dim=model.head_dim,
        dtype=dtype,
    )
    num_gpus = host.num_gpus if device == "cuda" else 0
    dummy = engine.load_format == "dummy" or is_built_in(engine.model)
    if dummy and engine.load_format == "auto":
        notes.append(f"load format: dummy (auto; {engine.model} is a shape without weights)")
    return ResolvedConfig(
        load_format="dummy" if dummy else "auto",
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        layout=layout,
        max_num_seqs=engine.max_num_seqs or 0,  # 0: the engine's own default
        max_num_batched_tokens=engine.max_num_batched_tokens or 0,
        num_gpus=num_gpus,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        num_threads=_num_threads(config, host),
        busy_wait=waits_awake(config, host, num_gpus, notes),
        transport=_connector(config, device, notes),
        served_model_name=config.served_model_name or default_model_name(engine.model),
        weights_bytes=num_parameters(model) * (4 if dtype == "float32" else 2) // tp_size,
        notes=tuple(notes),
    )


def _dtype(config: ServeConfig, device: str, model: ModelConfig, notes: list[str]) -> str:
    """The checkpoint's, but no float32 on a GPU; said to the engine, so that nothing is guessed."""
    asked = config.engine.dtype
    if asked != "auto":
        return asked
    dtype = "bfloat16" if device == "cuda" and model.dtype == "float32" else model.dtype
    notes.append(f"dtype: {dtype} (auto; the checkpoint is {model.dtype})")
    return dtype


def _max_model_len(config: ServeConfig, model: ModelConfig, notes: list[str]) -> int:
    """What the instances are told, so that the front door refuses what they would refuse."""
    asked = config.engine.max_model_len
    longest = model.max_position_embeddings
    if asked is None:
        notes.append(f"max model length: {longest} tokens (auto; the model's context)")
        return longest
    if asked > longest:
        raise ConfigError(
            f"--max-model-len {asked} exceeds the model's context of {longest} tokens: lower it"
        )
    return asked


def _connector(config: ServeConfig, device: str, notes: list[str]) -> str:
    """Of P/D topologies; "" for others. Raises ConfigError for one that cannot be."""
    if not isinstance(config.topology, PrefillDecode):
        return ""
    asked = config.external.connector
    known = VLLM_CONNECTORS if config.engine.engine == "vllm" else SGLANG_BACKENDS
    if asked == "auto":
        chosen = "nixl" if config.external.attach else known[0]
        notes.append(f"connector: {chosen} (auto)")
        return chosen
    if asked in ("p2p-nccl", "P2pNcclConnector"):
        raise ConfigError(
            "P2pNcclConnector was removed in vLLM 0.24: use --connector pdrelay, which stores into "
            "the other GPU's memory, or pdrelay-nccl, or nixl"
        )
    if asked not in known:
        raise ConfigError(
            f"--connector {asked!r} is unknown to {config.engine.engine}: use one of "
            f"auto, {', '.join(known)}"
        )
    if asked == "pdrelay-nccl" and device == "cpu":
        raise ConfigError(
            "--connector pdrelay-nccl moves KV between GPUs: on CPU, leave --connector at auto"
        )
    return asked


def _num_threads(config: ServeConfig, host: Host) -> int:
    if config.engine.threads_per_rank is not None:
        return config.engine.threads_per_rank
    return max(1, (host.num_cores - 1) // num_ranks(config.topology))
