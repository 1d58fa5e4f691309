"""The run directory of `pdrelay kv`: what it writes, and what the report reads, nothing else.

DIR/run.json           KvRunInfo, with kind "kv"
DIR/environment.json   as the lab's
DIR/samples.jsonl      SampleRecord: every measured transfer, plain copy, and computation
DIR/pairs.jsonl        PairRecord: the same prompt on two servers side by side
DIR/endpoints.log      what the measuring processes said
DIR/side-by-side/      the logs of those servers
DIR/serve/             a run directory of the lab (lab/rundir.py): P/D beside one replica
DIR/report.html, DIR/summary.json     made by `pdrelay report DIR`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pdrelay.errors import ConfigError
from pdrelay.lab.kv.wire import Mode
from pdrelay.lab.rundir import Run, read_json, read_jsonl, read_run
from pdrelay.model.config import ModelConfig

SCHEMA_VERSION = 1
KIND = "kv"
SERVE_DIR = "serve"
PAIRS_FILE = "pairs.jsonl"
PAIRS_DIR = "side-by-side"


class KvRunInfo(msgspec.Struct, kw_only=True):
    """`run.json`."""

    kind: str = KIND
    schema_version: int = SCHEMA_VERSION
    pdrelay_version: str
    git_commit: str
    argv: list[str]
    config: dict[str, Any]  # KvConfig.as_json
    model: str
    shape: ModelConfig
    dtype: str
    tp: int
    device: str
    device_words: str = ""  # what the measuring processes ran on
    measured_flops_per_s: float | None = None  # one producer's
    measured_how: str = ""
    foreign_cores: float | None = None  # kept busy by other processes: the worst round's average
    started: str  # ISO 8601, UTC
    ended: str = ""
    notes: list[str] = []


class SampleRecord(msgspec.Struct, kw_only=True):
    """One line of `samples.jsonl`. Times are CLOCK_MONOTONIC ns (wire.Sample tells them apart)."""

    schema_version: int = SCHEMA_VERSION
    transport: str  # "" where nothing was handed over: plain copies and computation alone
    mode: Mode
    placement: str
    block_size: int
    tokens: int
    rep: int
    start_ns: int
    computed_ns: int = 0
    sent_ns: int = 0
    landed_ns: int = 0
    num_bytes: int = 0
    num_pieces: int = 0
    busy_ns: int = 0
    taken_ns: int = 0
    damaged: bool = False


class PairRecord(msgspec.Struct, kw_only=True):
    """One line of `pairs.jsonl`: one prompt on P/D and on one replica, one after the other, ns."""

    schema_version: int = SCHEMA_VERSION
    tokens: int
    rep: int
    pd_first: bool
    prefill_ns: int  # on P, first chunk's start to last chunk's end
    prefill_alone_ns: int
    ttft_ns: int
    ttft_alone_ns: int


@dataclass(frozen=True)
class KvRun:
    """A whole run directory in memory."""

    root: Path
    info: KvRunInfo
    environment: dict[str, Any]
    samples: list[SampleRecord]
    pairs: list[PairRecord]
    serve: Run | None


class _Kind(msgspec.Struct):
    kind: str = ""


def is_kv_run(root: Path) -> bool:
    """Whether `root` is a run of `pdrelay kv`. Raises ConfigError for a damaged run.json."""
    path = root / "run.json"
    return path.is_file() and read_json(path, _Kind).kind == KIND


def read_kv_run(root: Path) -> KvRun:
    """Raises ConfigError that names the file (and line) and the fix."""
    info = read_json(root / "run.json", KvRunInfo)
    if info.schema_version != SCHEMA_VERSION:
        raise ConfigError(
            f"{root / 'run.json'} has schema_version {info.schema_version}, this pdrelay reads "
            f"{SCHEMA_VERSION}: use the pdrelay that made it ({info.pdrelay_version})"
        )
    environment, samples = root / "environment.json", root / "samples.jsonl"
    pairs = root / PAIRS_FILE
    serve = root / SERVE_DIR
    return KvRun(
        root=root,
        info=info,
        environment=read_json(environment, dict[str, Any]) if environment.is_file() else {},
        samples=read_jsonl(samples, SampleRecord) if samples.is_file() else [],
        pairs=read_jsonl(pairs, PairRecord) if pairs.is_file() else [],
        serve=read_run(serve) if (serve / "run.json").is_file() else None,
    )
