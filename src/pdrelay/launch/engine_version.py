"""Which release of a production engine an environment has, and what that release lacks."""

from __future__ import annotations

from pdrelay.doctor.engine_probe import EngineFacts, probe_engine
from pdrelay.doctor.version import Version, in_range, parse_version, show_version
from pdrelay.errors import ConfigError

_ASK_S = 120.0
KNOWN: dict[str, tuple[Version, Version]] = {  # tested or read; first, and first beyond
    "vllm": ((0, 23, 0), (0, 34, 0)),
    "sglang": ((0, 5, 0), (0, 6, 0)),
}

_DEAF: tuple[Version, Version] = ((0, 5, 18), (0, 5, 20))  # of SGLang; first, and first beyond


def find_engine(python: str, engine: str) -> EngineFacts:
    """What the environment of the interpreter `python` holds.

    Raises ConfigError when there is no such interpreter or it has no such engine.
    """
    facts = probe_engine(python, engine, _ASK_S)
    if facts.error:
        raise ConfigError(
            f"cannot run {python} ({facts.error}): give --engine-python the interpreter of the "
            f"environment that has {engine}"
        )
    if facts.version_of(engine) is None:
        raise ConfigError(
            f"{python} has no {engine}: install it there, or give --engine-python the "
            "interpreter of the environment that has it"
        )
    return facts


def engine_notes(engine: str, facts: EngineFacts, connector: str) -> list[str]:
    """What a user of this release has to know before it starts, one line each. `connector`: of
    P/D topologies, "" for others."""
    first, beyond = KNOWN[engine]
    known = f"{show_version(first)} up to, and without, {show_version(beyond)} are known"
    version = facts.version_of(engine) or "unknown"
    found = parse_version(version)
    notes = []
    if found is None:
        notes.append(f"the release of {engine} {version!r} cannot be read: {known}")
    elif not in_range(found, first, beyond):
        notes.append(f"{engine} {version} is untested: {known}")
    elif engine == "sglang" and in_range(found, *_DEAF):
        notes.append(
            f"SGLang {version} computes a stream to its end when the client has left: 0.5.17 and "
            "0.5.20 do not"
        )
    if engine == "vllm" and connector:
        notes += _lacks(version, facts, connector)
    return notes


def _lacks(version: str, facts: EngineFacts, connector: str) -> list[str]:
    """Of vLLM's own P/D."""
    notes = []
    if facts.connectors and "P2pNcclConnector" not in facts.connectors:
        notes.append(
            f"vLLM {version} has no P2pNcclConnector (removed in 0.24): --connector pdrelay, or "
            "pdrelay-nccl, replaces it"
        )
    if connector == "nixl" and not any(name.startswith("nixl") for name in facts.versions):
        notes.append(
            "this environment has no nixl, without which NixlConnector does not start: install it "
            "there, or use --connector pdrelay"
        )
    return notes
