"""Everything that the preflight knows, gathered in one place; the checks are pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from pdrelay.doctor.engine_probe import EngineFacts, probe_engine
from pdrelay.doctor.gpus import GpuFacts, read_gpus, visible
from pdrelay.doctor.machine import Machine, inspect_machine
from pdrelay.doctor.rule import Engine
from pdrelay.errors import ConfigError, ModelError
from pdrelay.launch.config import ServeConfig
from pdrelay.launch.host import Host, inspect_host
from pdrelay.launch.listen import listen
from pdrelay.model.config import ModelConfig, load_model_config


@dataclass(frozen=True)
class Ask:
    """What is to be launched. `config` says it in `serve`'s own terms."""

    engine: Engine
    config: ServeConfig
    connector: str = ""  # vLLM's name of it; "" leaves the choice to pdrelay
    engine_python: str = ""


@dataclass(frozen=True)
class Facts:
    """`model` is None when no model was named or it is not on this machine (`model_error`)."""

    host: Host
    machine: Machine
    gpus: GpuFacts
    engine: EngineFacts | None = None  # None for the native engine
    model: ModelConfig | None = None
    model_error: str = ""
    port_error: str = ""


def gather(ask: Ask) -> Facts:
    """Looks at this machine; takes a few seconds at most."""
    model, model_error = _model(ask.config.engine.model)
    return Facts(
        host=inspect_host(),
        machine=inspect_machine(),
        gpus=visible(read_gpus()),
        engine=None if ask.engine == "native" else probe_engine(ask.engine_python, ask.engine),
        model=model,
        model_error=model_error,
        port_error=_port_error(ask.config),
    )


def _model(name: str) -> tuple[ModelConfig | None, str]:
    if not name:
        return None, ""
    try:
        return load_model_config(name), ""
    except ModelError as error:
        return None, str(error)


def _port_error(config: ServeConfig) -> str:
    try:
        listen(config.host, config.port).close()
    except ConfigError as error:
        return str(error)
    return ""
