"""Runs `pdrelay kv`: measures into a run directory."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pdrelay import __version__
from pdrelay.errors import LaunchError
from pdrelay.lab.environment import environment, git_commit
from pdrelay.lab.kv.config import KvConfig, ServeConfig
from pdrelay.lab.kv.measure import Measurement, num_samples
from pdrelay.lab.kv.rundir import KvRunInfo
from pdrelay.lab.kv.serve import measure_servers
from pdrelay.lab.kv.side_by_side import measure_side_by_side
from pdrelay.lab.progress import Reporter
from pdrelay.lab.rundir import claim_directory, write_json
from pdrelay.lab.server import Launcher
from pdrelay.model.config import ModelConfig


def run_kv(
    config: KvConfig, shape: ModelConfig, launcher: Launcher, reporter: Reporter
) -> KvRunInfo:
    """Write a complete run directory at `config.out`.

    Raises ConfigError when the directory is in use, LaunchError when nothing could be measured.
    """
    claim_directory(config.out)
    info = KvRunInfo(
        pdrelay_version=__version__,
        git_commit=git_commit(),
        argv=list(config.argv),
        config=config.as_json(),
        model=config.model,
        shape=shape,
        dtype=config.dtype,
        tp=config.tp,
        device=config.device,
        started=now(),
    )
    _save(config.out, info)
    write_json(config.out / "environment.json", environment())
    if config.remark and not config.predict_only:
        info.notes.append(config.remark)
        reporter.note(config.remark)
    if not config.predict_only:
        _measure(config, shape, info, reporter)
        if config.serve is not None:
            info.notes += _measure_servers(config, config.serve, shape, launcher, reporter)
    info.ended = now()
    _save(config.out, info)
    return info


def _measure_servers(
    config: KvConfig,
    serve: ServeConfig,
    shape: ModelConfig,
    launcher: Launcher,
    reporter: Reporter,
) -> list[str]:
    """Returns why something was not measured."""
    failed = []
    if serve.side_by_side:
        failed.append(measure_side_by_side(config, serve, shape, launcher, reporter))
    if serve.apart:
        failed.append(measure_servers(config, launcher, reporter))
    return [text for text in failed if text]


def _measure(config: KvConfig, shape: ModelConfig, info: KvRunInfo, reporter: Reporter) -> None:
    began, total = time.monotonic(), num_samples(config)

    def tell(done: int, words: str) -> None:
        elapsed = time.monotonic() - began
        reporter.work_left(elapsed, elapsed * (total - done) / done)
        reporter.step(f"transfers, {words}")

    def note(text: str) -> None:
        info.notes.append(text)
        reporter.note(text)
        _save(config.out, info)

    measurement = Measurement(config, shape, tell, note)
    count = 0
    with (config.out / "samples.jsonl").open("wb") as file:
        for samples in measurement.run():
            count += len(samples)
            file.write(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))
            file.flush()
    if count == 0:
        raise LaunchError(f"nothing could be measured: {info.notes[-1]}")
    if measurement.up is not None:
        info.device_words = measurement.up.device
        info.measured_flops_per_s = measurement.up.flops_per_s or None
        info.measured_how = measurement.up.rate
    known = [cores for cores in measurement.foreign_cores if cores is not None]
    info.foreign_cores = max(known, default=None)
    _save(config.out, info)


def _save(out: Path, info: KvRunInfo) -> None:
    write_json(out / "run.json", info)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
