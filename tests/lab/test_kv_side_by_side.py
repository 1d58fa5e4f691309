"""`pdrelay kv`'s servers side by side, over stand-ins for them."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from fake_launcher import FakeLauncher
from test_kv_run import KV_CONFIG

from pdrelay.errors import LaunchError
from pdrelay.lab.kv.config import ServeConfig
from pdrelay.lab.kv.rundir import PAIRS_FILE, PairRecord
from pdrelay.lab.kv.side_by_side import measure_side_by_side, pool_args
from pdrelay.lab.kv.side_by_side_figures import side_by_side_rows
from pdrelay.lab.progress import SilentReporter
from pdrelay.lab.rundir import read_jsonl
from pdrelay.model.config import load_model_config

SHAPE = load_model_config("tiny")
SERVE = ServeConfig(lengths=(64, 256), requests=11, repeats=1, args=("--transport", "tcp"))


class SlowPd(FakeLauncher):
    """P/D takes four times as long a token."""

    async def start(self, topology, **options):
        server = await super().start(topology, **options)
        server.token_s = 160e-6 if topology.kind == "pd" else 40e-6
        return server


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("kv")
    launcher = SlowPd()
    config = dataclasses.replace(KV_CONFIG, out=out, serve=SERVE)
    assert measure_side_by_side(config, SERVE, SHAPE, launcher, SilentReporter()) == ""
    return launcher, read_jsonl(out / PAIRS_FILE, PairRecord)


def test_each_prompt_goes_to_both_servers_in_turn(measured):
    launcher, pairs = measured
    pd, alone = sorted(launcher.servers, key=lambda server: server.topology.kind)
    assert pd.topology.kind == "pd" and alone.topology.kind == "replicas"
    assert all(server.stopped for server in launcher.servers)
    assert len(pairs) == 22 and {pair.tokens for pair in pairs} == {64, 256}
    assert pd.prompts[-22:] == alone.prompts[-22:]
    measured_prompts = set(pd.prompts[-22:])
    assert len(measured_prompts) == 22
    warm_ups = [*pd.prompts[:-22], *alone.prompts[:-22]]
    assert warm_ups and not measured_prompts & set(warm_ups)
    assert {pair.pd_first for pair in pairs} == {True, False}


def test_ratios_are_medians_of_pairs(measured):
    _, pairs = measured
    rows = side_by_side_rows(pairs)
    assert [row.tokens for row in rows] == [64, 256]
    row = rows[1]
    ratios = sorted(p.prefill_ns / p.prefill_alone_ns for p in pairs if p.tokens == 256)
    assert row.prefill_ratio.value == pytest.approx(ratios[5])
    assert row.prefill_ratio.lo <= row.prefill_ratio.value <= row.prefill_ratio.hi
    assert row.prefill_ratio.value > 1.5
    assert row.prefill.value > row.prefill_alone.value
    assert row.ttft.value > row.prefill.value


def test_below_the_floor_there_is_no_ratio(measured):
    _, pairs = measured
    (row,) = side_by_side_rows([pair for pair in pairs if pair.tokens == 64][:10])
    assert row.prefill_ratio.value is None and "n=10" in row.prefill_ratio.note


def test_a_server_that_does_not_start_is_a_note_and_the_other_is_stopped(tmp_path):
    first_is_up = asyncio.Event()

    class SecondIsBroken(FakeLauncher):
        async def start(self, topology, **options):
            if topology.kind == "replicas":
                await first_is_up.wait()
                raise LaunchError("it is broken: mend it")
            server = await super().start(topology, **options)
            first_is_up.set()
            return server

    launcher = SecondIsBroken()
    config = dataclasses.replace(KV_CONFIG, out=tmp_path, serve=SERVE)
    problem = measure_side_by_side(config, SERVE, SHAPE, launcher, SilentReporter())
    assert "side by side" in problem and "is broken" in problem
    assert [server.stopped for server in launcher.servers] == [1]
    assert not (tmp_path / PAIRS_FILE).exists()


def test_both_servers_leave_room_for_each_other():
    args = pool_args(KV_CONFIG, SERVE, SHAPE)
    tokens = 4 * (256 + 8 + 64)
    assert args == ["--kv-cache-memory", str(tokens * 4096), "--max-model-len", "264"]
    asked = dataclasses.replace(SERVE, args=("--max-model-len", "9000"))
    assert pool_args(KV_CONFIG, asked, SHAPE) == ["--kv-cache-memory", str(9000 * 4096)]
