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


def engine_notes(engine: str, version: str, connector: str) -> list[str]:
    """What a user of this release has to know before it starts, one line each. `connector`: of
    P/D topologies, "" for others."""
    first, beyond = KNOWN[engine]
    known = f"{show_version(first)} up to, and without, {show_version(beyond)} are known"
    found = parse_version(version)
    if found is None:
        return [f"the release of {engine} {version!r} cannot be read: {known}"]
    notes = []
    if not in_range(found, first, beyond):
        notes.append(f"{engine} {version} is untested: {known}")
    return notes + (_vllm_notes(version, found, connector) if engine == "vllm" else [])


def _vllm_notes(version: str, found: Version, connector: str) -> list[str]:
    notes = []
    if connector and found >= (0, 24, 0):
        notes.append(
            f"vLLM {version} has no P2pNcclConnector (removed in 0.24): --connector pdrelay "
            "replaces it"
        )
    return notes
