"""What users may write into `kv_connector_extra_config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from pdrelay.errors import ConfigError

MAX_PATH_BYTES = 107  # sun_path of a Unix socket, less its end


class ConnectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one instance; the same on all its ranks."""

    address: str = ""  # a producer listens here; rank r > 0 at `<address>.<r>`
    peer_dir: str = ""  # a consumer opens no producer outside it; default: where `address` lies
    transport: Literal["auto", "shm", "cuda_ipc", "nccl"] = "auto"
    lease_s: float = 30.0  # how long a producer keeps KV that nobody has asked for
    load_timeout_s: float = 120.0  # how long a consumer's request waits for its KV


def connector_config(
    extra: Mapping[str, Any], *, is_producer: bool, is_consumer: bool
) -> ConnectorConfig:
    """Validate `extra`. Raises ConfigError that names the key and the fix."""
    where = "kv_connector_extra_config of PdrelayConnector"
    try:
        config = msgspec.convert(dict(extra), ConnectorConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    if config.lease_s <= 0 or config.load_timeout_s <= 0:
        raise ConfigError(f"{where}: lease_s and load_timeout_s must be above 0 seconds")
    if is_producer and not config.address:
        raise ConfigError(f'{where}: a producer needs "address", the Unix socket it listens at')
    if is_consumer and not (config.address or config.peer_dir):
        raise ConfigError(f'{where}: a consumer needs "peer_dir", where producers\' sockets lie')
    for key, path in (("address", config.address), ("peer_dir", config.peer_dir)):
        if path and not os.path.isabs(path):
            raise ConfigError(f'{where}: "{key}" must be an absolute path, not {path!r}')
    if len(os.fsencode(config.address)) > MAX_PATH_BYTES - 8:  # room for data parallel and rank
        raise ConfigError(
            f'{where}: "address" is longer than {MAX_PATH_BYTES - 8} bytes, which a Unix socket '
            "cannot have: choose a shorter directory"
        )
    peer_dir = config.peer_dir or os.path.dirname(config.address)
    return msgspec.structs.replace(config, peer_dir=peer_dir)


def rank_address(address: str, rank: int) -> str:
    """Where tensor-parallel rank `rank` of the producer at `address` listens."""
    return address if rank == 0 else f"{address}.{rank}"


def instance_address(address: str, data_parallel_rank: int) -> str:
    """The address of one data-parallel engine; the first has the configured one."""
    return f"{address}.d{data_parallel_rank}" if address and data_parallel_rank else address
