"""Preflight of the host: what `serve` checks itself, then limits, loopback, kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

from pdrelay.doctor.check import Check, failure, note, ok, warning
from pdrelay.doctor.facts import Ask, Facts
from pdrelay.errors import ConfigError
from pdrelay.launch import preflight
from pdrelay.launch.external import external_plan
from pdrelay.launch.resolve import resolve
from pdrelay.launch.topology import num_ranks
from pdrelay.launch.units import format_bytes

_ENGINE_OPEN_FILES = 4096  # sockets of streams, weights files, libraries
_ENGINE_SHM_BYTES = 1 << 30  # NCCL's and vLLM's rings between the ranks of an instance
_SHORT_SLICES_SINCE = (6, 12)
_GOOD_CLOCKS = ("tsc", "arch_sys_counter", "kvm-clock", "hyperv_clocksource_tsc_page")


def check_serve(ask: Ask, facts: Facts) -> list[Check]:
    """What `serve` would refuse on this machine, by its own checks."""
    if not ask.config.engine.model:
        return []
    if ask.engine != "native":
        return _check_external(ask, facts)
    if facts.model is None:
        return [_refused("model", facts.model_error)]
    config, host, model = ask.config, facts.host, facts.model
    return [
        _asked("topology", lambda: preflight.check_topology(config, host), str(config.topology)),
        _asked(
            "memory",
            lambda: preflight.check_memory(config, resolve(config, model, host), host),
            f"{format_bytes(host.available_bytes)} available",
        ),
        _asked("files", lambda: preflight.check_files(config, host), "output files are writable"),
    ]


def _check_external(ask: Ask, facts: Facts) -> list[Check]:
    """Not for a connector that only a launch by hand can use, nor for a model of the hub."""
    config = ask.config
    if facts.model is None or config.external.connector.endswith("Connector"):
        return []
    plan = functools.partial(external_plan, config, facts.host)
    return [
        _asked("serve", plan, "accepts these flags here"),
        _asked("files", lambda: preflight.check_files(config, facts.host), "are writable"),
    ]


def _asked(what: str, check: Callable[[], object], fine: str) -> Check:
    try:
        check()
    except ConfigError as error:
        return _refused(what, str(error))
    return ok(what, fine)


def _refused(what: str, message: str) -> Check:
    """From a one-line error: cause, colon, fix."""
    cause, _, fix = message.rpartition(": ")
    return failure(what, cause or message, fix if cause else "")


def check_model(ask: Ask, facts: Facts) -> list[Check]:
    """For engines that can fetch models themselves."""
    name = ask.config.engine.model
    if ask.engine == "native" or not name:
        return []
    if facts.model is not None:
        return [ok("model", f"{name}: {facts.model.architecture}, {facts.model.num_layers} layers")]
    if "/" in name and not name.startswith(("/", ".", "~")):
        return [note("model", f"{name} is no directory here: {ask.engine} asks the hub for it")]
    return [note("model", f"pdrelay cannot read it ({facts.model_error}); {ask.engine} may")]


def check_port(ask: Ask, facts: Facts) -> list[Check]:
    if facts.port_error:
        return [_refused("port", facts.port_error)]
    shown = ask.config.port or "any"
    return [ok("port", f"{shown} on {ask.config.host} is free")]


def check_open_files(ask: Ask, facts: Facts) -> list[Check]:
    """An engine under load; `serve`'s own minimum is checked by `check_serve`."""
    limit = facts.host.max_open_files
    if ask.engine == "native" or limit >= _ENGINE_OPEN_FILES:
        return [ok("open files", f"{limit} may be open")]
    return [
        warning(
            "open files",
            f"only {limit} may be open; an engine with many streams runs out",
            "ulimit -n 65536 (docker: --ulimit nofile=65536)",
        )
    ]


def check_loopback(facts: Facts) -> list[Check]:
    machine = facts.machine
    if not machine.loopback_v4:
        return [
            failure(
                "loopback",
                "127.0.0.1 cannot be bound: the loopback interface is down or missing",
                "ip link set lo up",
            )
        ]
    if machine.localhost_v6_first and not machine.loopback_v6:
        return [
            warning(
                "loopback",
                "localhost means ::1 first, which cannot be bound: gloo and torch's rendezvous "
                "may fail or wait",
                "put 127.0.0.1 before ::1 in /etc/hosts, or set VLLM_HOST_IP=127.0.0.1",
            )
        ]
    if not machine.hostname_resolves:
        return [
            warning(
                "loopback",
                "the host's own name does not resolve: gloo and get_ip() of the engines use it",
                "add it to /etc/hosts, or set VLLM_HOST_IP=127.0.0.1 and GLOO_SOCKET_IFNAME=lo",
            )
        ]
    return [ok("loopback", "127.0.0.1" + (" and ::1" if machine.loopback_v6 else "; no IPv6"))]


def check_shm(ask: Ask, facts: Facts) -> list[Check]:
    """NCCL and vLLM's ranks use /dev/shm; the native engine does not."""
    total, free = facts.machine.shm_total_bytes, facts.machine.shm_free_bytes
    shown = f"{format_bytes(free)} of {format_bytes(total)} free"
    if ask.engine == "native" or num_ranks(ask.config.topology) == 1 or free >= _ENGINE_SHM_BYTES:
        return [ok("/dev/shm", shown)]
    return [
        warning(
            "/dev/shm",
            f"{shown}: NCCL's and the engine's rings between ranks may not fit",
            "start the container with --shm-size=16g or --ipc=host",
        )
    ]


def check_container(facts: Facts) -> list[Check]:
    machine = facts.machine
    where = f"in {machine.container}" if machine.container else "no container seen"
    limit = f"{format_bytes(facts.host.memory_bytes)} of memory"
    if machine.seccomp == 2 and not machine.can_ptrace:
        return [
            note(
                "container",
                f"{where}, {limit}; seccomp filters calls and CAP_SYS_PTRACE is missing: CUDA IPC "
                "works between processes of one container, not across containers",
                "run both instances in one container, or with --ipc=host --cap-add SYS_PTRACE",
            )
        ]
    return [ok("container", f"{where}, {limit}")]


def check_compiler(ask: Ask, facts: Facts) -> list[Check]:
    if facts.host.compiler is not None:
        return [ok("C compiler", facts.host.compiler)]
    if ask.engine == "native":
        return [note("C compiler", "none: torch replaces the fast CPU kernels", "install gcc")]
    return [
        warning(
            "C compiler", "none: Triton and the engine's start-up compile kernels", "install gcc"
        )
    ]


def check_kernel(facts: Facts) -> list[Check]:
    kernel, clock = facts.machine.kernel, facts.machine.clock_source
    found = []
    shown = f"Linux {kernel[0]}.{kernel[1]}"
    if kernel < _SHORT_SLICES_SINCE:
        found.append(
            note(
                "kernel",
                f"{shown} ignores short time slices: decode on shared CPU cores waits longer",
                "Linux 6.12 or later",
            )
        )
    if clock and clock not in _GOOD_CLOCKS:
        found.append(
            warning(
                "clock",
                f"the clock source is {clock}: each timestamp costs a system call",
                "boot with a stable TSC (clocksource=tsc)",
            )
        )
    return found or [ok("kernel", f"{shown}, clock {clock or 'unknown'}")]
