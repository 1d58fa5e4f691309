"""All checks before a launch, in the order in which a launch would meet them."""

from __future__ import annotations

from pdrelay.doctor.check import Check, Level
from pdrelay.doctor.checks_engine import check_engine, check_environment
from pdrelay.doctor.checks_gpu import check_gpus
from pdrelay.doctor.checks_host import (
    check_compiler,
    check_container,
    check_kernel,
    check_loopback,
    check_model,
    check_open_files,
    check_port,
    check_serve,
    check_shm,
)
from pdrelay.doctor.facts import Ask, Facts


def preflight(ask: Ask, facts: Facts) -> list[Check]:
    """Pure: the same facts give the same answers."""
    return [
        *check_gpus(ask, facts),
        *check_engine(ask, facts),
        *check_environment(ask, facts),
        *check_model(ask, facts),
        *check_serve(ask, facts),
        *check_port(ask, facts),
        *check_open_files(ask, facts),
        *check_loopback(facts),
        *check_shm(ask, facts),
        *check_container(facts),
        *check_compiler(ask, facts),
        *check_kernel(facts),
    ]


def would_stop(checks: list[Check]) -> bool:
    """Whether a launch would fail."""
    return any(check.level is Level.FAILURE for check in checks)
