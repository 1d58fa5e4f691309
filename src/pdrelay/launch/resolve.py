"""From what was asked to what will run: a pure function of request, model, and machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ConfigError
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.host import Host
from pdrelay.launch.topology import PrefillDecode, num_ranks, tensor_parallel_size
from pdrelay.launch.units import format_bytes
from pdrelay.model.config import ModelConfig, is_built_in, kv_layout

_AUTO_KV_BYTES = 256 << 20
_AUTO_KV_SHARE = 0.10  # of the machine's memory, a rank
_CORES_A_PROCESS = 4  # from here on a front door may have one for itself
_LARGE_KV_SHARE = 0.25  # of the machine's memory, all ranks, where one request needs more


@dataclass(frozen=True)
class _Defaults:
    """What "auto" means on a device.

    Blocks of 64 tokens on CUDA: a layer of one block of Llama-3.1-8B is 2 x 64 x 8 x 128 x 2 B =
    256 KiB in one piece, which a peer copy moves at over 80 % of its peak, and 64 keys are one
    tile of the decode kernel. On CPU 16 share more prefixes, and copies are cheap.
    """

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


_DEFAULTS = {"cpu": _Defaults(16, 64, 2048), "cuda": _Defaults(64, 256, 8192)}


@dataclass(frozen=True)
class ResolvedConfig:
    """No "auto" left. Sizes are per rank.

    `layout.num_blocks` is 0 where each rank finds out after loading how many its GPU holds.
    """

    load_format: str  # "safetensors" or "dummy"
    device: str
    dtype: str
    max_model_len: int
    layout: KVLayout
    max_num_seqs: int
    max_num_batched_tokens: int
    num_gpus: int  # 0 on CPU
    gpu_memory_utilization: float  # a rank's share of its GPU
    num_threads: int
    busy_wait: bool
    transport: str  # "" for co-located topologies
    served_model_name: str
    weights_bytes: int  # a rank, estimated from the shape
    notes: tuple[str, ...]  # what "auto" became and why, one line each


def resolve(config: ServeConfig, model: ModelConfig, host: Host) -> ResolvedConfig:
    """Fill in every "auto". Raises ConfigError (or ModelError) for what cannot run here."""
    engine = config.engine
    notes: list[str] = []
    device = resolve_device(config, host)
    if engine.device == "auto":
        notes.append(f"device: {device} (auto; {host.num_gpus} GPUs)")
    if device == "cpu" and config.transport.name == "nccl":
        raise ConfigError("--transport nccl moves KV between GPUs: on CPU, use mapped or tcp")
    if device == "cpu" and engine.attention_backend != "auto":
        raise ConfigError(
            f"--attention-backend {engine.attention_backend} runs on GPUs: leave it out on CPU"
        )
    dtype = _dtype(config, device, model, notes)
    tp_size = tensor_parallel_size(config.topology)
    defaults = _DEFAULTS[device]
    block_size = engine.block_size or defaults.block_size
    block = kv_layout(model, block_size, 1, dtype, tp_size)
    wanted_len = min(engine.max_model_len or model.max_position_embeddings, 1 << 40)
    if wanted_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {wanted_len} exceeds the model's context of "
            f"{model.max_position_embeddings} tokens: lower it"
        )
    num_blocks, max_model_len = 0, wanted_len
    if device == "cpu" or engine.kv_cache_memory is not None:
        memory = _kv_cache_memory(config, block, wanted_len, host, notes)
        num_blocks = memory // block.block_bytes
        max_model_len = _max_model_len(config, block, num_blocks, wanted_len, notes)
    elif isinstance(config.topology, PrefillDecode) and config.transport.name == "pool":
        raise ConfigError(
            "--transport pool on GPUs needs --kv-cache-memory: the shared pool gets as many blocks "
            "as a GPU's"
        )
    else:
        notes.append(
            f"KV cache: what {engine.gpu_memory_utilization:g} of each GPU's memory leaves beside "
            "weights and activations (auto; measured by each rank)"
        )
    max_num_seqs = engine.max_num_seqs or defaults.max_num_seqs
    max_num_batched_tokens = engine.max_num_batched_tokens or max(
        defaults.max_num_batched_tokens, max_num_seqs
    )
    _check_batch(max_num_seqs, max_num_batched_tokens)
    num_gpus = host.num_gpus if device == "cuda" else 0
    ranks_a_gpu = -(-num_ranks(config.topology) // num_gpus) if num_gpus else 1
    return ResolvedConfig(
        load_format=_load_format(config, notes),
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        layout=kv_layout(model, block_size, num_blocks, dtype, tp_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_gpus=num_gpus,
        gpu_memory_utilization=engine.gpu_memory_utilization / ranks_a_gpu,
        num_threads=_num_threads(config, host, notes),
        busy_wait=waits_awake(config, host, num_gpus, notes),
        transport=config.transport.name if isinstance(config.topology, PrefillDecode) else "",
        served_model_name=config.served_model_name or default_model_name(engine.model),
        weights_bytes=num_parameters(model) * (4 if dtype == "float32" else 2) // tp_size,
        notes=tuple(notes),
    )


def waits_awake(config: ServeConfig, host: Host, num_gpus: int, notes: list[str]) -> bool:
    """Whether the front door and native ranks wait awake (`core/awake.py`)."""
    if config.busy_wait != "auto":
        return config.busy_wait == "on"
    processes = 1 + num_ranks(config.topology)  # of other engines, too: they compute beside it
    awake = num_gpus > 0 and host.num_cores >= _CORES_A_PROCESS * processes
    if num_gpus:
        notes.append(f"busy wait: {'on' if awake else 'off'} (auto; {host.num_cores} cores)")
    return awake


def default_model_name(model: str) -> str:
    """A built-in shape's name, or the last part of a directory's path."""
    return model if is_built_in(model) else PurePath(model).name or model


def num_parameters(model: ModelConfig) -> int:
    """Weights of the shape, biases and norms left out."""
    attention = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return model.num_layers * (attention + mlp) + embeddings


def resolve_device(config: ServeConfig, host: Host) -> str:
    """ "cpu" or "cuda". Raises ConfigError for a GPU that is not there."""
    asked = config.engine.device
    if asked == "cuda" and host.num_gpus == 0:
        raise ConfigError(
            "--device cuda, but the driver lists no NVIDIA GPU (or CUDA_VISIBLE_DEVICES hides "
            "them): use --device cpu"
        )
    if asked == "auto":
        return "cuda" if host.num_gpus else "cpu"
    return asked


def _dtype(config: ServeConfig, device: str, model: ModelConfig, notes: list[str]) -> str:
    asked = config.engine.dtype
    if device == "cuda" and asked == "float32":
        raise ConfigError("--dtype float32 runs on CPU only: use --dtype bfloat16, or --device cpu")
    if asked != "auto":
        return asked
    if device == "cpu":
        notes.append("dtype: float32 (auto; the fast CPU kernels are float32)")
        return "float32"
    notes.append(f"dtype: bfloat16 (auto; the checkpoint is {model.dtype})")
    return "bfloat16"


def _load_format(config: ServeConfig, notes: list[str]) -> str:
    engine = config.engine
    if engine.load_format == "dummy":
        return "dummy"
    if is_built_in(engine.model):
        notes.append(f"load format: dummy (auto; {engine.model} is a shape without weights)")
        return "dummy"
    return "safetensors"


def _kv_cache_memory(
    config: ServeConfig, block: KVLayout, wanted_len: int, host: Host, notes: list[str]
) -> int:
    asked = config.engine.kv_cache_memory
    if asked is not None:
        if asked < block.block_bytes:
            raise ConfigError(
                f"--kv-cache-memory {format_bytes(asked)} holds no block: one takes "
                f"{format_bytes(block.block_bytes)}"
            )
        return asked
    small = min(_AUTO_KV_BYTES, int(host.memory_bytes * _AUTO_KV_SHARE))
    one_request = _num_blocks(wanted_len, block) * block.block_bytes
    share = int(host.memory_bytes * _LARGE_KV_SHARE) // num_ranks(config.topology)
    memory = max(small, min(one_request, share), block.block_bytes)
    notes.append(
        f"KV cache: {format_bytes(memory)} a rank (auto; {memory // block.block_bytes} blocks of "
        f"{block.block_size} tokens)"
    )
    return memory


def _num_blocks(num_tokens: int, block: KVLayout) -> int:
    return -(-num_tokens // block.block_size)


def _max_model_len(
    config: ServeConfig, block: KVLayout, num_blocks: int, wanted_len: int, notes: list[str]
) -> int:
    capacity = num_blocks * block.block_size
    if wanted_len <= capacity:
        if config.engine.max_model_len is None:
            notes.append(f"max model length: {wanted_len} tokens (auto; the model's context)")
        return wanted_len
    if config.engine.max_model_len is not None:
        need = _num_blocks(wanted_len, block) * block.block_bytes
        raise ConfigError(
            f"one request of --max-model-len {wanted_len} tokens needs {format_bytes(need)} of KV "
            f"cache a rank, there is {format_bytes(num_blocks * block.block_bytes)}: lower it to "
            f"{capacity} or raise --kv-cache-memory to {need}"
        )
    notes.append(
        f"max model length: {capacity} tokens (auto; the KV cache holds no longer request, the "
        f"model's context is {wanted_len})"
    )
    return capacity


def _check_batch(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {max_num_batched_tokens} is less than --max-num-seqs "
            f"{max_num_seqs}: a step decodes one token of every sequence"
        )


def _num_threads(config: ServeConfig, host: Host, notes: list[str]) -> int:
    if config.engine.threads_per_rank is not None:
        return config.engine.threads_per_rank
    ranks = num_ranks(config.topology)
    threads = max(1, (host.num_cores - 1) // ranks)
    notes.append(
        f"threads a rank: {threads} (auto; {host.num_cores} cores, one of them the front door's, "
        f"over {ranks} rank{'s' if ranks != 1 else ''})"
    )
    return threads
