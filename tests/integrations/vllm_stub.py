"""As much of vLLM's modules as PdrelayConnector imports."""

from __future__ import annotations

import enum
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
METRICS = "vllm.distributed.kv_transfer.kv_connector.v1.metrics"
STATE = "vllm.distributed.parallel_state"


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class Base:
    """KVConnectorBase_V1."""

    def __init__(self, vllm_config: Any, role: Role, kv_cache_config: Any) -> None:
        self.role = role

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata


@dataclass
class Stats:
    data: dict[str, Any] = field(default_factory=dict)


@contextmanager
def stubbed_vllm() -> Iterator[Any]:
    """The connector's module over stubs."""
    contents = {
        BASE: {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorRole": Role,
        },
        METRICS: {"KVConnectorStats": Stats, "KVConnectorPromMetrics": object},
        "vllm.logger": {"init_logger": logging.getLogger},
        STATE: {"get_tensor_model_parallel_rank": lambda: 0},
    }
    ours = ["pdrelay.integrations.vllm.connector", "pdrelay.integrations.vllm.vllm_stats"]
    names = {
        ".".join(name.split(".")[:i])
        for name in contents
        for i in range(1, len(name.split(".")) + 1)
    }
    before = {name: sys.modules.pop(name, None) for name in [*names, *ours]}
    try:
        for name in sorted(names):
            module = types.ModuleType(name)
            module.__path__ = []  # type: ignore[attr-defined]
            vars(module).update(contents.get(name, {}))
            sys.modules[name] = module
        import pdrelay.integrations.vllm.connector as connector

        yield connector
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def config_of(role: str, address: str, *, block_size: int, **parallel: Any) -> SimpleNamespace:
    """A vllm_config."""
    transfer = SimpleNamespace(
        kv_role=role,
        engine_id="e",
        is_kv_producer=role in ("kv_producer", "kv_both"),
        is_kv_consumer=role in ("kv_consumer", "kv_both"),
        kv_connector_extra_config={"address": address},
    )
    sizes = {
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "data_parallel_index": 0,
        **parallel,
    }
    return SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(**sizes),
        cache_config=SimpleNamespace(block_size=block_size),
    )


def request_of(request_id: str, prompt: list[int], params: Any) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=request_id,
        prompt_token_ids=prompt,
        num_prompt_tokens=len(prompt),
        num_preemptions=0,
        kv_transfer_params=params,
        status=SimpleNamespace(name="RUNNING"),
        lora_request=None,
        mm_features=[],
    )


def blocks_of(ids: list[int]) -> SimpleNamespace:
    """A KVCacheBlocks."""
    return SimpleNamespace(get_block_ids=lambda: (ids,))


def step_of(new: Any = (), cached: Any = ()) -> SimpleNamespace:
    """A SchedulerOutput. `new`: (id, blocks, computed, scheduled); `cached` the same and whether it
    resumes."""
    cached = list(cached)
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=entry[0], block_ids=(entry[1],), num_computed_tokens=entry[2])
            for entry in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[entry[0] for entry in cached],
            new_block_ids=[(entry[1],) if entry[1] else None for entry in cached],
            num_computed_tokens=[entry[2] for entry in cached],
            resumed_req_ids={entry[0] for entry in cached if entry[4]},
        ),
        num_scheduled_tokens={entry[0]: entry[3] for entry in [*new, *cached]},
    )
