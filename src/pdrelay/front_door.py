"""The router, given the instances that the launcher supervises."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import Drain
from pdrelay.core.time_slice import RELAY_SLICE_NS, request_short_slices
from pdrelay.errors import WorkerLostError
from pdrelay.launch.attached import AttachedInstance
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.driver import Control
from pdrelay.launch.instance import Instance
from pdrelay.launch.plan import Plan
from pdrelay.launch.topology import InstanceSpec
from pdrelay.model.generation_config import load_generation_config
from pdrelay.model.tokenizer import load_tokenizer
from pdrelay.router.app import FLOW, METRICS, build_app
from pdrelay.router.bridge import Bridge
from pdrelay.router.cluster import Cluster
from pdrelay.router.config import ModelInfo, RouterConfig
from pdrelay.router.engine_client import StreamEngineClient
from pdrelay.router.engines.http_client import HttpEngineClient
from pdrelay.router.engines.http_pd import HandOvers, NixlStyle, PdrelayStyle, SglangStyle, Style
from pdrelay.router.engines.http_session import HttpSession
from pdrelay.router.event_log import EventLog
from pdrelay.router.gpu_metrics import GpuMetrics
from pdrelay.router.introductions import MEET_TIMEOUT_S
from pdrelay.router.metrics import Metrics
from pdrelay.router.server import make_runner
from pdrelay.telemetry.assignment import Worker, assign
from pdrelay.telemetry.source import NoGpu, OpenGpus, open_source

_log = logging.getLogger(__name__)

_MAX_PING_INTERVAL_S = 1.0
_MAX_ANSWER_TIMEOUT_S = 15.0  # after which /health says 503, long before the worker is killed


def router_config(config: ServeConfig) -> RouterConfig:
    router = RouterConfig(
        api_key=config.api_key,
        request_timeout_s=config.request_timeout_s,
        drain_timeout_s=config.drain_timeout_s,
    )
    if config.max_num_requests is not None:
        router = replace(router, max_num_requests=config.max_num_requests)
    return router


def model_info(plan: Plan) -> ModelInfo:
    """Raises ModelError for a broken tokenizer or generation_config.json."""
    model = plan.config.engine.model
    return ModelInfo(
        served_model_name=plan.resolved.served_model_name,
        root=model,
        max_model_len=plan.resolved.max_model_len,
        tokenizer=load_tokenizer(model, plan.model),
        generation=load_generation_config(model, plan.model),
        created=int(time.time()),
    )


def hand_over_style(plan: Plan) -> Style:
    """How HTTP engines hand over; native ones do it among themselves."""
    if plan.config.engine.engine == "sglang":
        return SglangStyle()
    if plan.resolved.transport == "nixl":
        return NixlStyle()
    return PdrelayStyle(plan.config.external.dispatch)


class RouterFrontDoor:
    """The router as `pdrelay.serve.FrontDoor`."""

    def __init__(
        self,
        plan: Plan,
        down: Callable[[], dict[str, str]],
        open_gpus: OpenGpus = open_source,
        meet_timeout_s: float = MEET_TIMEOUT_S,
    ) -> None:
        """`down`: instance id to why it is not ready. Raises ConfigError and ModelError."""
        request_short_slices(RELAY_SLICE_NS)
        # A text is encoded by the thread that asks, and not by a pool of one thread a core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._plan = plan
        self._session = HttpSession()
        self._hand_overs = HandOvers(hand_over_style(plan))
        self._clients = [self._client(spec) for spec in plan.specs]
        self._cluster = cluster = Cluster(self._clients, meet_timeout_s=meet_timeout_s)
        self._bridge = Bridge(self._clients, lambda instance, reason: cluster.forget(instance))
        model = model_info(plan)
        self._event_log = EventLog(plan.config.event_log)
        config = router_config(plan.config)
        app = build_app(config, model, cluster, self._event_log, down)
        self.runner = make_runner(app, config)
        self._flow = app[FLOW]
        self._incarnations: dict[str, Instance] = {}
        self._gpus = self._watch_gpus(app[METRICS], open_gpus)

    def _watch_gpus(self, metrics: Metrics, open_gpus: OpenGpus) -> GpuMetrics | None:
        """Gauges of the GPUs, where ranks run on some and they can be read."""
        if not self._plan.resolved.device.startswith("cuda"):
            return None
        source = open_gpus()
        if isinstance(source, NoGpu):
            _log.info("no GPU metrics: %s", source.reason)
            return None
        gpus = GpuMetrics(
            source,
            self._plan.resolved.served_model_name,
            lambda: assign([self._worker(spec) for spec in self._plan.specs], source.gpus),
        )
        metrics.add(gpus)
        return gpus

    def _worker(self, spec: InstanceSpec) -> Worker:
        incarnation = self._incarnations.get(spec.instance)
        ready = incarnation.ready if incarnation is not None else None
        return Worker(spec.instance, spec.world_size, ready.resolved if ready is not None else {})

    def _client(self, spec: InstanceSpec) -> StreamEngineClient | HttpEngineClient:
        timeout_s = self._plan.config.worker_timeout_s
        ping_interval_s = min(_MAX_PING_INTERVAL_S, timeout_s / 4)
        answer_timeout_s = min(_MAX_ANSWER_TIMEOUT_S, timeout_s)
        if self._plan.config.engine.engine == "native":
            return StreamEngineClient(
                spec.instance,
                spec.role,
                ping_interval_s=ping_interval_s,
                answer_timeout_s=answer_timeout_s,
            )
        return HttpEngineClient(
            spec.instance,
            spec.role,
            session=self._session,
            hand_overs=self._hand_overs,
            ping_interval_s=ping_interval_s,
            answer_timeout_s=answer_timeout_s,
        )

    def on_started(self, instance: Instance, control: Control) -> None:
        self._incarnations[instance.instance] = instance
        self._bridge.on_started(instance, control)

    def attach(self, instance: AttachedInstance, endpoint: HttpEndpoint) -> None:
        self._bridge.on_started(instance, endpoint)

    def on_exited(self, instance: Instance, reason: str) -> None:
        self._bridge.on_exited(instance, reason)

    def busy(self) -> bool:
        return self._flow.num_requests > 0

    async def all_met(self) -> None:
        await self._cluster.all_met()

    def drain_workers(self) -> None:
        for client in self._clients:
            with contextlib.suppress(WorkerLostError):
                client.send(Drain())

    async def close(self) -> None:
        if self._gpus is not None:
            self._gpus.close()
        for client in self._clients:
            client.close()
        await self._session.close()
        self._event_log.close()
