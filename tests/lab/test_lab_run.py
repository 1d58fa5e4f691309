from __future__ import annotations

import asyncio
import dataclasses

import pytest
from fake_launcher import FakeLauncher

from pdrelay.bench.client import ClosedLoop, LoadResult
from pdrelay.bench.record import ClientRecord
from pdrelay.bench.slo import Slo
from pdrelay.core.clock import FakeClock
from pdrelay.errors import ConfigError, LaunchError
from pdrelay.lab import run as run_module
from pdrelay.lab.budget import Budget
from pdrelay.lab.config import LabConfig, TraceConfig
from pdrelay.lab.experiments.base import Step
from pdrelay.lab.experiments.traffic import steady_rate
from pdrelay.lab.plan import schedule
from pdrelay.lab.progress import SilentReporter
from pdrelay.lab.report.build import build_report
from pdrelay.lab.run import run_lab
from pdrelay.lab.rundir import read_run
from pdrelay.lab.scale import QUICK, FixedLoad, Pace, Shape
from pdrelay.lab.topology import parse_topologies
from pdrelay.lab.verdict import best_goodput

TINY = dataclasses.replace(
    QUICK,
    pace=Pace(0.0, 2e-6, 0.0, 0.0005, 0.1, 0.1, 0.1),  # of the fake servers
    warmup_lengths=(64, 512),
    probes=((64, 3), (128, 2)),
    busy_probes=((64, 2),),
    num_streams=2,
    stream_output_len=100,
    rate_fractions=(0.2, 0.4),
    traffic_s=0.2,
    synthetic_trace_s=0.3,
    chat_output_mean=8.0,
    chat_max_output_len=12,
    quiet_s=0.1,
    long_input_len=256,
    num_long=3,
    long_gap_s=0.05,
    long_group=2,
    long_pause_s=0.05,
    fixed=FixedLoad(128, 8, 40.0, 12),
    shapes=(
        Shape("short-short", 100, 20, 40.0),
        Shape("long-short", 512, 30, 20.0),
        Shape("short-long", 20, 100, 30.0),
    ),
    shape_requests=2,
    stream_counts=(1, 3),
    stream_shape=(64, 50),
    budget_s=None,
)


def config(tmp_path, topologies="replicas:2,pd:1:1", **changes) -> LabConfig:
    return LabConfig(
        model="tiny",
        topologies=tuple(parse_topologies(topologies)),
        out=tmp_path / "run",
        scale=changes.pop("scale", TINY),
        quick=True,
        slo=Slo(250, 10),
        **changes,
    )


async def test_a_run_fills_every_section_and_the_report_builds(tmp_path):
    launcher, reporter = FakeLauncher(), SilentReporter()
    info = await run_lab(config(tmp_path), launcher, reporter)
    assert info.notes == []
    run = read_run(tmp_path / "run")
    for experiment, cases in {
        "ttft": ["busy", "idle"],
        "traffic": ["fixed", "fixed-idle", "poisson-0", "poisson-1", "trace"],
        "interference": ["interference"],
        "shapes": ["long-short", "short-long", "short-short", "streams-1", "streams-3"],
    }.items():
        for topology in ("replicas-2", "pd-1-1"):
            found = run.select(experiment, topology)
            assert [case.info.case for case in found] == cases
            assert all(record.ok for case in found for record in case.measured)
    assert run.topologies["pd-1-1"].workers[0].peak_rss_bytes == 123_456_789
    summary = build_report(tmp_path / "run").summary
    assert summary.phases
    assert summary.transfers
    assert summary.timelines
    assert sum(row.bytes_wrong + row.bytes_unverified for row in summary.transfers) == 0
    assert [server.stopped for server in launcher.servers] == [1, 1]
    busy = run.select("interference", "pd-1-1")[0]
    assert len(busy.streams) >= 2
    assert not any(record.status == "failed" for record in busy.streams)


async def test_rates_that_the_scale_names_need_no_capacity(tmp_path):
    """As on GPUs, where runs on different engines are to be offered the same load."""
    scale = dataclasses.replace(TINY, rates=(30.0, 60.0), rate_fractions=(), synthetic_trace_s=0.0)
    chosen = config(tmp_path, scale=scale, experiments=("traffic", "interference"))
    info = await run_lab(chosen, FakeLauncher(), SilentReporter())
    assert info.notes == [] and info.capacity_rps is None
    summary = build_report(tmp_path / "run").summary
    rows = [row for row in summary.traffic if row.topology == "pd-1-1"]
    assert [(row.kind, row.rate) for row in rows] == [
        ("fixed", 40.0), ("poisson", 30.0), ("poisson", 60.0)
    ]  # fmt: skip
    assert all(row.rate_fraction is None and row.attainment.known for row in rows)
    assert best_goodput("pd-1-1", summary.traffic) is not None
    assert {row.topology for row in summary.queues} == {"replicas-2", "pd-1-1"}
    assert not (tmp_path / "run" / "synthetic_trace.csv").exists()


async def test_topologies_get_the_same_traffic(tmp_path):
    launcher = FakeLauncher()
    chosen = config(tmp_path, experiments=("ttft", "traffic"))
    await run_lab(chosen, launcher, SilentReporter())
    run = read_run(tmp_path / "run")
    for experiment in chosen.experiments:
        pairs = zip(
            run.select(experiment, "replicas-2"), run.select(experiment, "pd-1-1"), strict=True
        )
        for one, two in pairs:
            assert one.info.rate == two.info.rate
            assert offered(one) == offered(two)
    first, second = (set(server.prompts) for server in launcher.servers)
    shared = first & second
    assert len(shared) > 0.5 * len(first)


def offered(case):
    """Lengths and, in an open loop, intended times: what the traffic is, apart from its answers."""
    start = case.info.window_start_ns if case.info.mode == "open" else None
    return [
        (r.tag, r.num_prompt_tokens, r.max_tokens, start and r.intended_ns - start)
        for r in case.measured
    ]


async def test_no_prompt_is_sent_twice_to_a_server(tmp_path):
    launcher = FakeLauncher()
    await run_lab(config(tmp_path, "replicas:1"), launcher, SilentReporter())
    prompts = launcher.servers[0].prompts
    heads = [prompt[:16] for prompt in prompts]
    assert len(set(heads)) == len(heads)


async def test_repeats_rotate_the_order_and_share_no_prompts(tmp_path):
    launcher = FakeLauncher()
    chosen = config(tmp_path, repeats=2, experiments=("ttft",))
    await run_lab(chosen, launcher, SilentReporter())
    names = [server.topology.name for server in launcher.servers]
    assert names == ["replicas-2", "pd-1-1", "pd-1-1", "replicas-2"]
    assert not set(launcher.servers[0].prompts) & set(launcher.servers[3].prompts)
    run = read_run(tmp_path / "run")
    assert [case.info.rep for case in run.select("ttft", "pd-1-1")] == [0, 1, 0, 1]
    assert len(run.topologies["pd-1-1"].launch.startup_s) == 2
    assert build_report(tmp_path / "run").summary.phases


async def test_one_broken_topology_is_noted_and_the_rest_goes_on(tmp_path):
    launcher = FakeLauncher(broken=("replicas-2",))
    chosen = config(tmp_path, experiments=("traffic",))
    info = await run_lab(chosen, launcher, SilentReporter())
    assert info.notes == ["2 replicas, repeat 0: replicas-2 is broken: mend it"]
    assert info.baseline == "pd-1-1"  # where the capacity was measured then
    assert read_run(tmp_path / "run").select("traffic", "pd-1-1")
    build_report(tmp_path / "run")


async def test_a_server_that_refuses_everything_is_noted_and_stopped(tmp_path):
    launcher = FakeLauncher(refusing=("pd-1-1",))
    info = await run_lab(config(tmp_path, experiments=("ttft",)), launcher, SilentReporter())
    assert len(info.notes) == 1
    assert "answers no request" in info.notes[0]
    assert [server.stopped for server in launcher.servers] == [1, 1]


async def test_a_server_that_hangs_is_given_up_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_STEP_MIN_S", 2.0)
    all_steps = run_module.steps_of

    def steps(context):
        if context.topology.kind != "pd":
            return all_steps(context)
        return [Step("1 stuck", "stuck", 0.01, asyncio.Event().wait), *all_steps(context)]

    monkeypatch.setattr(run_module, "steps_of", steps)
    launcher = FakeLauncher()
    chosen = config(tmp_path, "pd:1:1,replicas:2", experiments=("shapes",), cases=("streams-1",))
    info = await run_lab(chosen, launcher, SilentReporter())
    assert info.notes == ["P/D 1:1, 1 stuck: given up after 2 s, and the server"]
    assert [server.stopped for server in launcher.servers] == [1, 1]
    assert {case.info.topology for case in read_run(tmp_path / "run").cases} == {"replicas-2"}


async def test_no_server_at_all_is_an_error(tmp_path):
    launcher = FakeLauncher(broken=("replicas-2", "pd-1-1"))
    with pytest.raises(LaunchError, match=r"no server started.*mend it"):
        await run_lab(config(tmp_path), launcher, SilentReporter())


async def test_a_used_directory_is_refused_before_anything_starts(tmp_path):
    chosen = config(tmp_path)
    chosen.out.mkdir()
    (chosen.out / "precious.txt").write_text("mine")
    launcher = FakeLauncher()
    with pytest.raises(ConfigError, match="not empty"):
        await run_lab(chosen, launcher, SilentReporter())
    assert launcher.servers == []


async def test_a_bad_trace_is_refused_before_anything_starts(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,nonsense,3\n")
    launcher = FakeLauncher()
    with pytest.raises(ConfigError, match=r"trace\.csv:2"):
        await run_lab(config(tmp_path, trace=TraceConfig(path)), launcher, SilentReporter())
    assert launcher.servers == []


async def test_a_mooncake_trace_shares_prefixes_and_is_described(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 1100, "output_length": 90, "hash_ids": [0, 1, 2]}\n'
        '{"timestamp": 400, "input_length": 1100, "output_length": 4, "hash_ids": [0, 1, 3]}\n'
    )
    launcher = FakeLauncher()
    trace = TraceConfig(path, time_scale=0.5, max_output_len=20)
    chosen = config(tmp_path, "replicas:1", experiments=("traffic",), trace=trace)
    await run_lab(chosen, launcher, SilentReporter())
    case = read_run(tmp_path / "run").select("traffic", "replicas-1")[-1]
    assert [record.max_tokens for record in case.records] == [20, 4]
    assert not case.info.distinct_prompts
    words = case.info.parameters["workload"]
    assert "trace.jsonl (2 requests, time × 0.5, 1 outputs capped to 20" in words
    long_prompts = [prompt for prompt in launcher.servers[0].prompts if len(prompt) == 1100]
    assert long_prompts[0][:1024] == long_prompts[1][:1024]
    assert long_prompts[0] != long_prompts[1]


async def test_what_does_not_fit_into_the_time_is_left_out_and_named(tmp_path):
    slow = dataclasses.replace(TINY.pace, prefill_s=1000.0)
    scale = dataclasses.replace(TINY, budget_s=500.0, pace=slow, synthetic_trace_s=600.0)
    info = await run_lab(
        config(tmp_path, "replicas:1", scale=scale), FakeLauncher(), SilentReporter()
    )
    assert len(info.notes) == 12
    assert all("left out" in note for note in info.notes)


async def test_a_server_that_cannot_start_in_time_is_left_out_and_named(tmp_path):
    pace = dataclasses.replace(TINY.pace, external_start_s=100.0)
    scale = dataclasses.replace(TINY, budget_s=50.0, pace=pace)
    launcher = FakeLauncher()
    chosen = config(tmp_path, "replicas:1,vllm/replicas:1", scale=scale, experiments=("ttft",))
    info = await run_lab(chosen, launcher, SilentReporter())
    assert [server.topology.name for server in launcher.servers] == ["replicas-1"]
    assert info.notes == ["vLLM 1 replica, repeat 0: left out, its start would pass the time limit"]


async def test_only_the_chosen_cases_run(tmp_path):
    chosen = config(tmp_path, "replicas:1", cases=("fixed", "streams-*"))
    info = await run_lab(chosen, FakeLauncher(), SilentReporter())
    assert info.notes == []
    cases = [case.info.case for case in read_run(tmp_path / "run").cases]
    assert cases == ["streams-1", "streams-3", "fixed", "fixed-idle"]
    summary = build_report(tmp_path / "run").summary
    assert [row.kind for row in summary.traffic] == ["fixed"]
    assert [row.num_streams for row in summary.streams] == [1, 3]


async def test_cases_that_do_not_exist_are_refused_before_anything_starts(tmp_path):
    launcher = FakeLauncher()
    with pytest.raises(ConfigError, match="names no case"):
        await run_lab(config(tmp_path, cases=("fixd",)), launcher, SilentReporter())
    assert launcher.servers == [] and not (tmp_path / "run").exists()


def test_schedule_visits_every_topology_in_every_repeat_in_rotated_order():
    topologies = parse_topologies("replicas:1,tp:2,pd:1:1")
    starts = schedule(topologies, 4)
    assert len(starts) == 12
    for rep in range(4):
        order = [t.name for t, r in starts if r == rep]
        assert sorted(order) == sorted(t.name for t in topologies)
        assert order[0] == topologies[rep % 3].name


def test_budget_shares_time_left_and_learns_from_slow_steps():
    clock = FakeClock()
    budget = Budget(100.0, clock)
    budget.begin_server(1 / 4)
    assert budget.allows(25.0)
    assert not budget.allows(25.1)
    clock.advance(10)
    budget.over(5.0, 10.0)  # twice as slow as planned
    assert budget.allows(7.5)
    assert not budget.allows(7.6)
    budget.begin_server(1 / 3)  # what the first left over is shared
    assert budget.allows(15.0)
    assert not budget.allows(15.1)
    assert budget.has(90.0) and not budget.has(90.1)


def test_capacity_leaves_the_drain_out():
    def record(sent_s, end_s):
        at = round(sent_s * 1e9)
        return ClientRecord(
            request_id="x", intended_ns=at, sent_ns=at, end_ns=round(end_s * 1e9), status="ok"
        )

    # Two at a time, one second each: 2 requests/s, though the last straggles for 100 s.
    records = [record(i // 2, i // 2 + 1) for i in range(20)] + [record(10, 110)]
    result = LoadResult(records, 0, round(110e9), ClosedLoop(2))
    assert steady_rate(result) == pytest.approx(2.0)
