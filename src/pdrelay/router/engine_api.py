"""What differs between HTTP engines: paths, bodies, and how answers are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import EngineRequest, WorkerStats
from pdrelay.router import sglang_api, vllm_api, vllm_stats
from pdrelay.router.piece import Leg, Piece


@dataclass(frozen=True)
class Facts:
    """What an instance says of itself; None where it says nothing."""

    model: str | None = None
    max_model_len: int | None = None
    version: str | None = None


class EngineApi(Protocol):
    """One instance's dialect."""

    path: str  # of generation
    fact_paths: tuple[str, ...]
    stats_path: str  # "" where there is none

    def read_facts(self, answers: Mapping[str, bytes | None]) -> Facts:
        """From the bodies of `fact_paths`. Raises ValueError for what is not the engine's."""

    def body(self, request: EngineRequest, leg: Leg) -> bytes: ...

    def reader(self) -> Callable[[bytes], Piece]:
        """Reads the answer of one call: each event's data in order, or the whole body."""

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
    path: str = vllm_api.COMPLETIONS
    fact_paths: tuple[str, ...] = ("/v1/models", "/version")
    stats_path: str = "/metrics"

    def __init__(self) -> None:
        self._model = ""

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

    def body(self, request: EngineRequest, leg: Leg) -> bytes:
        return vllm_api.body(self._model, request, leg)

    def reader(self) -> Callable[[bytes], Piece]:
        return vllm_api.read_piece

    def read_stats(self, body: bytes) -> WorkerStats:
        return vllm_stats.read_stats(body, monotonic_ns())


class SglangApi:
    path: str = sglang_api.GENERATE
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

    def body(self, request: EngineRequest, leg: Leg) -> bytes:
        return sglang_api.body(request, leg)

    def reader(self) -> Callable[[bytes], Piece]:
        return sglang_api.StreamReader()

    def read_stats(self, body: bytes) -> WorkerStats:
        return WorkerStats()


def api_of(endpoint: HttpEndpoint) -> EngineApi:
    return VllmApi() if endpoint.engine == "vllm" else SglangApi()
