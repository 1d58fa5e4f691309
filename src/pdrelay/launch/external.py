"""Getting ready to start, or to reach, the instances of a production engine."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import Ready
from pdrelay.errors import ConfigError
from pdrelay.launch.config import Attach, ServeConfig
from pdrelay.launch.driver import Driver
from pdrelay.launch.engine_version import engine_notes, find_engine
from pdrelay.launch.external_driver import EnginePlan, flag_of
from pdrelay.launch.gpus import VARIABLE, assign_gpus, visible_gpus, with_peers
from pdrelay.launch.host import Host
from pdrelay.launch.plan import Plan
from pdrelay.launch.ports import Ports
from pdrelay.launch.resolve_external import resolve_external
from pdrelay.launch.run_dir import RunDir
from pdrelay.launch.sglang_driver import OWNED as SGLANG_OWNED
from pdrelay.launch.sglang_driver import SglangDriver
from pdrelay.launch.topology import InstanceSpec, PrefillDecode, instances
from pdrelay.launch.transport_choice import settle_connector
from pdrelay.launch.vllm_driver import OWNED as VLLM_OWNED
from pdrelay.launch.vllm_driver import VllmDriver
from pdrelay.model.config import is_built_in
from pdrelay.model.foreign import find_model, load_foreign_config
from pdrelay.model.shape_dir import shape_dir

_OWNED = {"vllm": VLLM_OWNED, "sglang": SGLANG_OWNED}


def external_plan(config: ServeConfig, host: Host) -> Plan:
    """Raises ConfigError for what cannot run here, before any process starts."""
    check_engine_args(config)
    config = _found(config)
    model = load_foreign_config(config.engine.model)
    resolved = resolve_external(config, model, host)
    specs = instances(config.topology)
    if resolved.device == "cuda" and not config.external.attach:
        _gpus(config, specs, host)
        if config.external.connector == "auto":
            resolved = settle_connector(resolved, specs)
    return Plan(config, model, resolved, specs)


def _found(config: ServeConfig) -> ServeConfig:
    """With a directory for a Hub name, which stays the name in the API."""
    asked = config.engine.model
    directory = find_model(asked)
    if directory == asked:
        return config
    return replace(
        config,
        engine=replace(config.engine, model=directory),
        served_model_name=config.served_model_name or asked,
    )


def check_engine_args(config: ServeConfig) -> None:
    """Raises ConfigError for an argument that pdrelay gives itself."""
    for argument in config.external.engine_args:
        flag = flag_of(argument)
        if flag in _OWNED[config.engine.engine]:
            raise ConfigError(
                f"--engine-args has {flag}, which pdrelay gives every instance itself: leave it out"
            )


def _gpus(config: ServeConfig, specs: Sequence[InstanceSpec], host: Host) -> dict[str, str]:
    seen = visible_gpus(os.environ.get(VARIABLE), host.num_gpus)
    assigned = assign_gpus(specs, seen, share=config.allow_oversubscribe)
    if isinstance(config.topology, PrefillDecode):
        return with_peers(assigned, seen)
    return assigned


def make_driver(
    plan: Plan, host: Host, run_dir: RunDir, stack: contextlib.ExitStack
) -> tuple[Driver, list[str]]:
    """The driver, and lines for the user to read. Raises ConfigError."""
    config, resolved = plan.config, plan.resolved
    engine = config.engine.engine
    python = config.external.engine_python or sys.executable
    facts = find_engine(python, engine)
    version = facts.version_of(engine) or ""
    model_dir = config.engine.model
    if is_built_in(model_dir):
        model_dir = str(shape_dir(model_dir, run_dir.path))
    elif os.path.isdir(model_dir):
        model_dir = os.path.abspath(model_dir)
    engine_plan = EnginePlan(
        config=config,
        resolved=resolved,
        run_dir=run_dir,
        ports=stack.enter_context(Ports()),
        python=python,
        version=version,
        model_dir=model_dir,
        gpus=_gpus(config, plan.specs, host) if resolved.device == "cuda" else {},
        engine_flags=facts.flags[:1],
        api_key=secrets.token_hex(24),
        has_flashinfer="flashinfer" in facts.modules,
    )
    lines = [f"engine: {engine} {version} ({python})"]
    lines += engine_notes(engine, facts, resolved.transport)
    lines += [f"{name}: {VARIABLE}={gpus}" for name, gpus in engine_plan.gpus.items()]
    driver = VllmDriver(engine_plan) if engine == "vllm" else SglangDriver(engine_plan)
    return driver, lines + driver.notes()


def describe_external(plan: Plan) -> list[str]:
    """What will run, as lines to print."""
    config, resolved = plan.config, plan.resolved
    lines = [
        f"topology: {config.topology}",
        f"model: {config.engine.model} as {resolved.served_model_name!r} on {resolved.device}, "
        f"weights {resolved.load_format}; context {resolved.max_model_len} tokens",
    ]
    if resolved.transport:
        lines.append(f"connector: {resolved.transport}, dispatch {config.external.dispatch}")
    return lines + [f"  {note}" for note in resolved.notes]


def attached_endpoints(plan: Plan) -> list[tuple[InstanceSpec, HttpEndpoint]]:
    """Instances that were started elsewhere, in the order of the plan's specs."""
    waiting = list(plan.config.external.attach)
    return [(spec, _endpoint(plan, spec, _take(waiting, spec))) for spec in plan.specs]


def _take(waiting: list[Attach], spec: InstanceSpec) -> Attach:
    found = next(each for each in waiting if each.role is spec.role)
    waiting.remove(found)
    return found


def _endpoint(plan: Plan, spec: InstanceSpec, attach: Attach) -> HttpEndpoint:
    engine = plan.config.engine.engine
    assert engine != "native"
    return HttpEndpoint(
        engine=engine,
        url=attach.url,
        bootstrap_host=urlsplit(attach.url).hostname or "",
        bootstrap_port=attach.bootstrap_port,
        ready=Ready(
            instance=spec.instance,
            role=spec.role,
            pid=0,
            layout=plan.resolved.layout,
            max_model_len=plan.resolved.max_model_len,
            transport=plan.resolved.transport,
            resolved={"engine": engine, "url": attach.url},
        ),
    )
