"""Machine, servers and commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from pdrelay.lab import fmt
from pdrelay.lab.blocks import note
from pdrelay.lab.html import Markup, el, join, table
from pdrelay.lab.report.figures import Summary


def environment_table(environment: Mapping[str, object]) -> Markup:
    """What the run ran on."""
    rows = [[key, _value(value)] for key, value in environment.items()]
    return table(["", "value"], rows, text_columns=2)


def environment_section(summary: Summary) -> Markup:
    servers = []
    for topology in summary.topologies:
        peaks = topology.peak_rss_bytes
        servers.append(
            [
                topology.label,
                topology.engine or fmt.NONE,
                topology.num_gpus,
                ", ".join(f"{fmt.number(seconds)}" for seconds in topology.startup_s),
                fmt.num_bytes(topology.bytes_per_token) if topology.bytes_per_token else fmt.NONE,
                "; ".join(f"{name} {fmt.num_bytes(size)}" for name, size in peaks.items()),
            ]
        )
    head = ["topology", "engine", "ranks", "start-up, s", "KV a token", "peak memory of a rank"]
    return join(
        [
            environment_table(summary.environment),
            table(head, servers, caption="The servers as they ran.", text_columns=2),
            _resolved(summary),
        ]
    )


def _resolved(summary: Summary) -> Markup:
    rows = [
        [topology.label, instance, ", ".join(f"{k}={v}" for k, v in settings.items())]
        for topology in summary.topologies
        for instance, settings in topology.resolved.items()
        if settings
    ]
    if not rows:
        return Markup("")
    return table(
        ["topology", "instance", "resolved settings"],
        rows,
        caption="What “auto” became.",
        text_columns=3,
    )


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def commands_section(summary: Summary) -> Markup:
    run = summary.run
    commands = [shlex.join(run.argv), *(shlex.join(t.argv) for t in summary.topologies)]
    return join(
        [
            note(
                f"pdrelay {run.pdrelay_version}, commit {run.git_commit or 'unknown'}, "
                f"seeds {', '.join(map(str, run.seeds))}, {run.started} to {run.ended or '?'}."
            ),
            el("pre", "\n\n".join(command for command in commands if command)),
        ]
    )
