"""What differs between HTTP engines: paths, bodies, and how answers are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import EngineRequest, WorkerStats
from pdrelay.router.engines import sglang_api, vllm_api, vllm_stats, vllm_tokens_api
from pdrelay.router.engines.piece import Leg, Piece


@dataclass(frozen=True)
class Facts:
    """What an instance says of itself; None where it says nothing."""

    model: str | None = None
    max_model_len: int | None = None
    version: str | None = None


@dataclass(frozen=True)
class Call:
    """One leg of a request as an engine takes it."""

    path: str
    body: bytes
    read: Callable[[bytes], Piece]  # of the answer: each event's data in order, or the whole body


class EngineApi(Protocol):
    """One instance's dialect."""

    paths: tuple[str, ...]  # of generation; what follows the first not every version has
    fact_paths: tuple[str, ...]
    stats_path: str  # "" where there is none

    @property
    def path(self) -> str:
        """Of `paths`: where ordinary requests go."""

    def read_facts(self, answers: Mapping[str, bytes | None]) -> Facts:
        """From the bodies of `fact_paths`. Raises ValueError for what is not the engine's."""

    def read_refusals(self, statuses: Mapping[str, int]) -> None:
        """HTTP status of an empty object posted to each of `paths` but the first; 0 for none."""

    def call(self, request: EngineRequest, leg: Leg) -> Call: ...

    def read_stats(self, body: bytes) -> WorkerStats: ...


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class _Version(msgspec.Struct):
    version: str = ""


def _first_model(models: bytes | None) -> _Model | None:
    """Of /v1/models. Raises ValueError (msgspec's) when it is no list of models."""
    listed = msgspec.json.decode(models, type=_Models).data if models else []
    return listed[0] if listed else None


class VllmApi:
    paths: tuple[str, ...] = (vllm_api.COMPLETIONS, vllm_tokens_api.GENERATE)
    fact_paths: tuple[str, ...] = ("/v1/models", "/version")
    stats_path: str = "/metrics"

    def __init__(self) -> None:
        self._model = ""
        self._takes_tokens = False

    @property
    def path(self) -> str:
        return vllm_tokens_api.GENERATE if self._takes_tokens else vllm_api.COMPLETIONS

    def read_facts(self, answers: Mapping[str, bytes | None]) -> Facts:
        models, version = (answers[path] for path in self.fact_paths)
        first = _first_model(models)
        if first is not None:
            self._model = first.id
        return Facts(
            model=first.id if first else None,
            max_model_len=first.max_model_len if first else None,
            version=msgspec.json.decode(version, type=_Version).version if version else None,
        )

    def read_refusals(self, statuses: Mapping[str, int]) -> None:
        """Missing is 404, switched off 403; what is there finds the object wanting."""
        self._takes_tokens = statuses[vllm_tokens_api.GENERATE] in (400, 422)

    def call(self, request: EngineRequest, leg: Leg) -> Call:
        if self._takes_tokens and vllm_tokens_api.serves(request):
            body = vllm_tokens_api.body(self._model, request, leg)
            return Call(vllm_tokens_api.GENERATE, body, vllm_tokens_api.read_piece)
        body = vllm_api.body(self._model, request, leg)
        return Call(vllm_api.COMPLETIONS, body, vllm_api.read_piece)

    def read_stats(self, body: bytes) -> WorkerStats:
        return vllm_stats.read_stats(body, monotonic_ns())


class SglangApi:
    path: str = sglang_api.GENERATE
    paths: tuple[str, ...] = (path,)
    fact_paths: tuple[str, ...] = ("/v1/models", "/server_info")
    stats_path: str = ""

    def read_facts(self, answers: Mapping[str, bytes | None]) -> Facts:
        models, server = (answers[path] for path in self.fact_paths)
        first = _first_model(models)
        return Facts(
            model=first.id if first else None,
            max_model_len=first.max_model_len if first else None,
            version=msgspec.json.decode(server, type=_Version).version if server else None,
        )

    def read_refusals(self, statuses: Mapping[str, int]) -> None:
        pass

    def call(self, request: EngineRequest, leg: Leg) -> Call:
        return Call(sglang_api.GENERATE, sglang_api.body(request, leg), sglang_api.StreamReader())

    def read_stats(self, body: bytes) -> WorkerStats:
        return WorkerStats()


def api_of(endpoint: HttpEndpoint) -> EngineApi:
    return VllmApi() if endpoint.engine == "vllm" else SglangApi()
