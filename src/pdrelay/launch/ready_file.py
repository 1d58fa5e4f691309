"""What `--ready-file` tells those who started the server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import Ready, Role


class ReadyInstance(Protocol):
    """What is told of: launched or attached."""

    @property
    def instance(self) -> str: ...

    @property
    def ready(self) -> Ready | None: ...

    @property
    def pids(self) -> list[int]: ...


class ReadyWorker(msgspec.Struct, frozen=True, kw_only=True):
    """One instance. `pid` is rank 0's, `pids` are all ranks'; 0 and none when attached."""

    instance: str
    role: Role
    pid: int
    pids: list[int]
    layout: KVLayout
    bytes_per_token: int
    max_model_len: int
    transport: str
    resolved: dict[str, str]


class ReadyFile(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = 1
    url: str
    pid: int  # the front door's
    model: str
    topology: str
    workers: list[ReadyWorker]


def ready_worker(instance: ReadyInstance) -> ReadyWorker:
    ready = instance.ready
    assert ready is not None
    return ReadyWorker(
        instance=instance.instance,
        role=ready.role,
        pid=instance.pids[0] if instance.pids else 0,
        pids=instance.pids,
        layout=ready.layout,
        bytes_per_token=ready.layout.bytes_per_token,
        max_model_len=ready.max_model_len,
        transport=ready.transport,
        resolved=ready.resolved,
    )


def write_ready_file(
    path: Path, url: str, model: str, topology: str, instances: Sequence[ReadyInstance]
) -> None:
    """Write it whole or not at all: a reader never sees a part. Raises OSError."""
    content = ReadyFile(
        url=url,
        pid=os.getpid(),
        model=model,
        topology=topology,
        workers=[ready_worker(instance) for instance in instances],
    )
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    temporary.replace(path)
