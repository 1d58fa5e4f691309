"""PdrelayConnector: vLLM's hooks on one side, the hand-over's own modules on the other.

vLLM makes one in the scheduler and one in each worker. The scheduler's turns vLLM's requests into
a StepPlan a step; the workers' hand it to their Producer and Consumer. Fields of vLLM's objects are
read here only.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger

from pdrelay.core.clock import monotonic_ns
from pdrelay.errors import ConfigError, InvalidRequestError
from pdrelay.integrations.vllm.bookkeeping import ConsumerBook, ProducerBook, Prompt
from pdrelay.integrations.vllm.config import (
    ConnectorConfig,
    connector_config,
    instance_address,
    rank_address,
)
from pdrelay.integrations.vllm.consumer import Consumer
from pdrelay.integrations.vllm.params import (
    RemoteDecode,
    RemotePrefill,
    parse_params,
    reply_params,
)
from pdrelay.integrations.vllm.producer import Producer
from pdrelay.integrations.vllm.registered import create_pages, describe
from pdrelay.integrations.vllm.service import ProducerService
from pdrelay.integrations.vllm.stats import add_stats
from pdrelay.integrations.vllm.step import StepPlan
from pdrelay.integrations.vllm.vllm_stats import PdrelayPromMetrics, PdrelayStats

logger = init_logger(f"vllm.{__name__}")  # below vLLM's logger, so that its handlers print it

_DELIVERED = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass
class PdrelayMetadata(KVConnectorMetadata):
    """What the scheduler's connector sends its workers in each step."""

    plan: StepPlan = field(default_factory=StepPlan)


class PdrelayConnector(KVConnectorBase_V1):
    """See the package's docstring for how to start vLLM with it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config = connector_config(
            transfer.kv_connector_extra_config,
            is_producer=transfer.is_kv_producer,
            is_consumer=transfer.is_kv_consumer,
        )
        check_supported(vllm_config)
        address = instance_address(self._config.address, _data_parallel_rank(vllm_config))
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(vllm_config, self._config, address)
        else:
            num_blocks = kv_cache_config.num_blocks
            self._worker = WorkerHalf(vllm_config, self._config, address, num_blocks)

    # ---- scheduler

    @property
    def _books(self) -> SchedulerHalf:
        assert self._scheduler is not None, "a scheduler's hook was called in a worker"
        return self._scheduler

    def on_new_request(self, request: Any) -> None:
        self._books.want(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        count = self._books.num_external_tokens(request, num_computed_tokens)
        return count, bool(count)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._books.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return PdrelayMetadata(self._books.plan(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        self._books.ended(
            connector_output.finished_sending or (), connector_output.finished_recving or ()
        )

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._books.finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        """Asked from 0.24 on; 0.23 steps while any finished request's blocks are held."""
        return self._books.producer.num_held > 0

    # ---- worker

    @property
    def _rank(self) -> WorkerHalf:
        assert self._worker is not None, "a worker's hook was called in the scheduler"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._rank.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, PdrelayMetadata)
        self._rank.begin_step(connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to start: loads were announced when the metadata was bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Never waits: requests run when all their KV is there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._rank.layer_written(layer_name)

    def wait_for_save(self) -> None:
        """Never waits: blocks are freed by way of get_finished."""
        self._rank.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._rank.take_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._rank.take_failed_blocks()

    def get_kv_connector_stats(self) -> PdrelayStats | None:
        taken = self._worker.take_stats() if self._worker is not None else {}
        return PdrelayStats(data=taken) if taken else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PdrelayStats:
        return PdrelayStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[Any]],
    ) -> PdrelayPromMetrics:
        return PdrelayPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()


class SchedulerHalf:
    """Reads vLLM's requests and scheduler outputs into the two books."""

    def __init__(self, vllm_config: Any, config: ConnectorConfig, address: str) -> None:
        self._peer_dir = config.peer_dir
        self._address = address
        self._is_producer = vllm_config.kv_transfer_config.is_kv_producer
        self._is_consumer = vllm_config.kv_transfer_config.is_kv_consumer
        self._block_size = vllm_config.cache_config.block_size
        self.producer = ProducerBook()
        self.consumer = ConsumerBook(
            block_size=self._block_size, lease_s=config.lease_s, clock=monotonic_ns
        )
        self._parsed: dict[str, RemoteDecode | RemotePrefill | None] = {}

    def want(self, request: Any) -> None:
        params = self._params(request)
        if isinstance(params, RemotePrefill):
            self.consumer.want(request.request_id, params)

    def num_external_tokens(self, request: Any, num_computed: int) -> int | None:
        params = self._params(request)
        if not isinstance(params, RemotePrefill):
            return 0
        self.consumer.want(request.request_id, params)
        return self.consumer.num_external_tokens(params, request.num_prompt_tokens, num_computed)

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        params = self._params(request)
        if isinstance(params, RemotePrefill):
            ids = _only_group(blocks.get_block_ids())
            self.consumer.reserve(request.request_id, params, _prompt(request), ids, num_external)
        elif isinstance(params, RemoteDecode):
            self.producer.admit(
                request.request_id, params, _prompt(request), lambda: request.num_preemptions
            )

    def plan(self, output: Any) -> StepPlan:
        for new in output.scheduled_new_reqs:
            self._scheduled(output, new.req_id, new.block_ids, True, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if self.producer.tracks(request_id):
                anew = request_id in cached.resumed_req_ids
                blocks: Any = cached.new_block_ids[i] or ([],)
                self._scheduled(output, request_id, blocks, anew, cached.num_computed_tokens[i])
        plan = self.producer.take()
        self.consumer.take(plan)
        return plan

    def _scheduled(
        self, output: Any, request_id: str, blocks: Any, anew: bool, num_computed: int
    ) -> None:
        if self.producer.tracks(request_id):
            self.producer.scheduled(
                request_id,
                _only_group(blocks),
                anew=anew,
                num_computed=num_computed + output.num_scheduled_tokens[request_id],
            )

    def ended(self, sent: Iterable[str], received: Iterable[str]) -> None:
        for request_id in sent:
            self.producer.freed(request_id)
        for request_id in received:
            self.consumer.loaded(request_id)

    def finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        params = self._params(request)
        self._parsed.pop(request_id, None)
        self.consumer.finished(request_id)
        if not isinstance(params, RemoteDecode):
            return False, None
        whole = len(block_ids) * self._block_size >= request.num_prompt_tokens
        delivers = request.status.name in _DELIVERED and whole
        if not self.producer.finished(request_id, params, delivers=delivers):
            return False, None
        return True, reply_params(params.transfer_id, self._address)

    def _params(self, request: Any) -> RemoteDecode | RemotePrefill | None:
        """Parsed once a request. What is not valid, or not for this role, asks for nothing: the
        request is served as any other, its prompt computed here."""
        request_id = request.request_id
        if request_id not in self._parsed:
            self._parsed[request_id] = self._parse(request)
        return self._parsed[request_id]

    def _parse(self, request: Any) -> RemoteDecode | RemotePrefill | None:
        try:
            params = parse_params(
                request.kv_transfer_params,
                request_id=request.request_id,
                peer_dir=self._peer_dir,
            )
        except InvalidRequestError as error:
            logger.warning("request %s: %s; served without hand-over", request.request_id, error)
            return None
        if isinstance(params, RemoteDecode) and not self._is_producer:
            return None
        if isinstance(params, RemotePrefill) and not self._is_consumer:
            return None
        return params if request.prompt_token_ids is not None else None


class WorkerHalf:
    """One rank's producer and consumer, as far as its role has them."""

    def __init__(
        self, vllm_config: Any, config: ConnectorConfig, address: str, num_blocks: int
    ) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self._address = address
        self._num_blocks = num_blocks
        self._layer_index: dict[str, int] = {}
        self._producer: ProducerService | None = None
        self._consumer: Consumer | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        self.close()  # caches may be registered anew
        transfer = self._vllm_config.kv_transfer_config
        layout, storages, self._layer_index = describe(
            kv_caches,
            num_blocks=self._num_blocks,
            block_size=self._vllm_config.cache_config.block_size,
        )
        pages = create_pages(
            self._config.transport, layout, storages, share=transfer.is_kv_consumer
        )
        rank = get_tensor_model_parallel_rank()
        identity: dict[str, Any] = {
            "pages": pages,
            "instance": f"{transfer.engine_id or uuid.uuid4()}",
            "rank": rank,
            "num_ranks": self._vllm_config.parallel_config.tensor_parallel_size,
            "lease_s": self._config.lease_s,
            "clock": monotonic_ns,
        }
        if transfer.is_kv_producer:
            producer = Producer(address=rank_address(self._address, rank), **identity)
            self._producer = ProducerService(producer, monotonic_ns)
        if transfer.is_kv_consumer:
            self._consumer = Consumer(load_timeout_s=self._config.load_timeout_s, **identity)
        logger.info(
            "PdrelayConnector: %s, %d layers, %d blocks of %d bytes, transport %s",
            transfer.kv_role,
            len(layout.layers),
            layout.num_blocks,
            layout.block_bytes,
            pages.transport,
        )

    def begin_step(self, plan: StepPlan) -> None:
        if self._producer is not None:
            self._producer.begin_step(plan)
        if self._consumer is not None:
            self._consumer.begin_step(plan)

    def layer_written(self, layer_name: str) -> None:
        if self._producer is not None:
            layer = self._layer_index.get(layer_name)
            if layer is not None:
                self._producer.layer_written(layer)

    def end_step(self) -> None:
        if self._producer is not None:
            self._producer.end_step()

    def take_finished(self) -> tuple[set[str] | None, set[str] | None]:
        sent = self._producer.take_finished() if self._producer is not None else None
        received = None
        if self._consumer is not None:
            self._consumer.poll()
            received = self._consumer.take_finished()
        return sent or None, received or None

    def take_failed_blocks(self) -> set[int]:
        return self._consumer.take_failed_blocks() if self._consumer is not None else set()

    def take_stats(self) -> dict[str, int]:
        sent = self._producer.take_stats() if self._producer is not None else {}
        received = self._consumer.stats.take() if self._consumer is not None else {}
        return add_stats(sent, received)

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()
        if self._consumer is not None:
            self._consumer.close()
        self._producer = self._consumer = None


def check_supported(vllm_config: Any) -> None:
    """Raise ConfigError for a topology that is not handed over."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError("PdrelayConnector does not support --pipeline-parallel-size above 1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"PdrelayConnector does not support {name} above 1")


def _data_parallel_rank(vllm_config: Any) -> int:
    return int(vllm_config.parallel_config.data_parallel_index)


def _only_group(block_ids: Any) -> list[int]:
    """Block ids of the one KV cache group there is (vLLM gives a list a group)."""
    assert len(block_ids) == 1, "PdrelayConnector supports models with one KV cache group"
    return list(block_ids[0])


def _prompt(request: Any) -> Prompt:
    """The prompt, and what else decides its KV."""
    extra = []
    lora = getattr(request, "lora_request", None)
    if lora is not None:
        extra.append(f"lora {lora.lora_name}")
    images = getattr(request, "mm_features", None) or ()
    extra += [f"mm {feature.identifier}" for feature in images]
    return Prompt(request.prompt_token_ids[: request.num_prompt_tokens], tuple(extra))
