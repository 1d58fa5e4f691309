"""What one rank process is told at its start: complete, resolved, nothing left to guess.

The launcher writes it as one msgpack document to the rank's standard input and closes it.
"""

from __future__ import annotations

from typing import BinaryIO, Literal

import msgspec

from pdrelay.core.messages import Role
from pdrelay.errors import ProtocolError

Verify = Literal["off", "sample", "full"]
AttentionName = Literal["auto", "triton", "fa3"]


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of one instance incarnation. Sizes are per rank; times are seconds."""

    instance: str  # "replica-0", "tp-0", "prefill-1", ...
    instance_index: int  # stable over restarts, unique in one server
    incarnation: int  # 0, then one more at each restart
    role: Role
    rank: int
    world_size: int
    control_fd: int = -1  # rank 0: connected Unix stream socket to the front door
    run_dir: str  # private directory: sockets, rendezvous files
    peer_address: str = ""  # rank 0 of a consumer: path of the socket to listen on
    model: str  # a directory or a built-in shape
    load_format: str  # "safetensors" or "dummy"
    device: str  # "cpu" or "cuda:0", ..
    dtype: str  # a key of core.kv_layout.DTYPE_BYTES
    attention: AttentionName = "auto"  # over pages, on CUDA
    seed: int
    max_model_len: int
    block_size: int
    num_blocks: int  # 0: as many as fit `gpu_memory_utilization` of the device
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    gpu_memory_utilization: float = 0.9  # this rank's share of its device's memory
    transport: str = ""  # "" for co-located instances
    kv_transfer_timeout_s: float = 30.0
    verify: Verify = "sample"
    num_threads: int = 1
    busy_wait: bool = False  # awake between steps too, for a while
    pool: bytes = b""  # msgpack description of the shared pool (transport "pool")
    pool_fd: int = -1
    log_level: str = "info"


def encode_rank_config(config: RankConfig) -> bytes:
    return msgspec.msgpack.encode(config)


def read_rank_config(stream: BinaryIO) -> RankConfig:
    """Read the rank's configuration to the end of `stream` (standard input, `sys.stdin.buffer`).

    Raises ProtocolError when it is missing or does not decode.
    """
    data = stream.read()
    try:
        return msgspec.msgpack.decode(data, type=RankConfig)
    except msgspec.MsgspecError as error:
        raise ProtocolError(
            f"bad rank configuration on standard input ({error}): ranks are started by "
            "'pdrelay serve', not by hand"
        ) from error
