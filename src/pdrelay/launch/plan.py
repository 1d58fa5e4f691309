"""Everything that is known before the first process starts."""

from __future__ import annotations

from dataclasses import dataclass

from pdrelay.launch.config import ServeConfig
from pdrelay.launch.resolve import ResolvedConfig
from pdrelay.launch.topology import InstanceSpec
from pdrelay.model.config import ModelConfig


@dataclass(frozen=True)
class Plan:
    config: ServeConfig
    model: ModelConfig
    resolved: ResolvedConfig
    specs: list[InstanceSpec]
