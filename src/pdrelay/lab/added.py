"""Going on with a run directory: more topologies, or what an interrupted run did not come to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from pdrelay.errors import ConfigError
from pdrelay.lab.rundir import EXPERIMENTS, RunInfo, read_json

_SAME_SETTINGS = ("model", "scale", "slo", "repeats", "seed", "trace")
_SAME_PLACE = ("cpu", "cores", "gpus", "packages")


def add_to(out: Path, info: RunInfo, environment: dict[str, Any]) -> RunInfo:
    """`info` of a run that is about to begin, joined with that of the run which `out` holds.

    Raises ConfigError when `out` holds no run, or one of other settings or of another machine:
    their figures would not be comparable.
    """
    before = read_json(out / "run.json", RunInfo)
    ours, theirs = _comparable(info.config), _comparable(before.config)
    place = read_json(out / "environment.json", dict[str, Any])
    differ = [key for key in _SAME_SETTINGS if ours.get(key) != theirs.get(key)]
    differ += [key for key in _SAME_PLACE if environment.get(key) != place.get(key)]
    if differ:
        raise ConfigError(
            f"{out} was made with another {', '.join(differ)}: give the same, or a new --out"
        )
    if info.config["repeats"] != 1:
        raise ConfigError("--add is for runs of one repeat: give --repeats 1, or a new --out")
    info.started = before.started
    info.topologies = list(dict.fromkeys([*before.topologies, *info.topologies]))
    info.experiments = [
        name for name in EXPERIMENTS if name in (*before.experiments, *info.experiments)
    ]
    info.engines = {**before.engines}
    info.capacity_rps, info.baseline = before.capacity_rps, before.baseline or info.baseline
    info.notes = [*before.notes, f"added to by: {' '.join(info.argv)}"]
    info.argv = before.argv
    return info


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """As run.json has it: tuples are lists there. The time limit may differ."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    plain["scale"].pop("budget_s", None)
    return plain


def is_complete(out: Path, topology: str) -> bool:
    """Whether a server of this topology was measured to its end."""
    return (out / "topologies" / topology / "workers.json").is_file()


def remove_partial(out: Path, topology: str) -> None:
    """What an interrupted run left of a topology that is to be measured now."""
    shutil.rmtree(out / "topologies" / topology, ignore_errors=True)
    for directory in sorted((out / "experiments").glob(f"*/{topology}")):
        shutil.rmtree(directory, ignore_errors=True)
