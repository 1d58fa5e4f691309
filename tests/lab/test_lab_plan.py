"""The plans that the four scales make, before anything starts."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from test_lab_run import config

from pdrelay.errors import ConfigError
from pdrelay.lab.experiments.base import STREAM_WAVES, stream_lengths
from pdrelay.lab.experiments.interference import long_times
from pdrelay.lab.plan import plan
from pdrelay.lab.scale import FULL, GPU_FULL, GPU_QUICK, QUICK, choose_scale

FOUR = "replicas:2,tp:2,pd:1:1,replicas:1"


@pytest.mark.parametrize("scale", [QUICK, GPU_QUICK])
def test_a_quick_plan_fits_its_budget(tmp_path, scale):
    """By the plan's own estimates, on the four topologies of the native engine."""
    planned = plan(config(tmp_path, FOUR, scale=scale))
    assert len(planned) == 4
    assert sum(server.total_s for server in planned) < scale.budget_s


def test_a_production_engine_on_two_topologies_fits_too(tmp_path):
    planned = plan(config(tmp_path, "vllm/replicas:2,vllm/pd:1:1", scale=GPU_QUICK))
    assert sum(server.total_s for server in planned) < GPU_QUICK.budget_s
    pace = GPU_QUICK.pace
    assert [server.start_s for server in planned] == [pace.external_start_s] * 2


def test_what_vllm_compiles_anew_takes_longer_to_start(tmp_path):
    names = "pd:1:1,vllm/pd:1:1,vllm/replicas:1,vllm+nixl/pd:1:1,tp:2,vllm/tp:2,vllm/replicas:2"
    planned = plan(config(tmp_path, names, scale=GPU_QUICK))
    assert [server.topology.name for server in planned] == [
        "pd-1-1", "vllm.pd-1-1", "vllm.replicas-1", "vllm.nixl.pd-1-1", "tp-2", "vllm.tp-2",
        "vllm.replicas-2",
    ]  # fmt: skip
    pace = GPU_QUICK.pace
    anew, again = pace.external_start_s, pace.external_again_s
    expected = [pace.start_s, anew, anew, anew, pace.start_s, anew, again]
    assert [server.start_s for server in planned] == expected


def test_the_baseline_comes_first_only_where_its_capacity_sets_the_rates(tmp_path):
    for scale, first in ((QUICK, "replicas-1"), (GPU_QUICK, "pd-1-1")):
        planned = plan(config(tmp_path, "pd:1:1,replicas:1", scale=scale))
        assert planned[0].topology.name == first


def test_cases_can_be_asked_of_some_topologies(tmp_path):
    chosen = config(
        tmp_path, "pd:1:1,vllm/pd:1:1,replicas:1", scale=GPU_QUICK, cases=("idle", "*pd-1-1/fixed")
    )
    found = {server.topology.name: [s.case for s in server.steps] for server in plan(chosen)}
    both = ["idle", "fixed"]
    assert found == {"pd-1-1": both, "vllm.pd-1-1": both, "replicas-1": ["idle"]}


@pytest.mark.parametrize("scale", [QUICK, FULL, GPU_QUICK, GPU_FULL])
def test_every_case_has_a_name_of_its_own_and_takes_time(tmp_path, scale):
    for server in plan(config(tmp_path, FOUR, scale=scale)):
        names = [step.case for step in server.steps]
        assert len(set(names)) == len(names)
        assert all(step.estimate_s > 0 for step in server.steps)


def test_cases_are_chosen_by_pattern(tmp_path):
    chosen = config(tmp_path, "replicas:1", scale=GPU_QUICK, cases=("fixed", "poisson-[01]"))
    (server,) = plan(chosen)
    assert [step.case for step in server.steps] == ["poisson-0", "poisson-1", "fixed"]
    with pytest.raises(ConfigError, match="names no case"):
        plan(dataclasses.replace(chosen, experiments=("ttft",)))


def test_the_gpu_scale_offers_what_the_published_figures_were_measured_with():
    full = choose_scale("gpu", quick=False)
    lengths = {length for length, _ in full.probes}
    assert lengths >= {128, 512, 1024, 2048, 4096, 8192}
    assert (full.fixed.input_len, full.fixed.output_len, full.fixed.rate) == (4096, 128, 7.0)
    assert full.fixed.num_requests >= 662  # p99's floor
    assert (full.num_streams, full.long_input_len, full.long_gap_s) == (16, 8192, 0.5)
    assert {1, 32, 64} <= set(full.stream_counts) and full.stream_shape[0] == 512
    assert choose_scale("cpu", quick=True) is QUICK


def test_long_prompts_come_in_groups_with_pauses():
    times = long_times(GPU_QUICK)
    assert len(times) == GPU_QUICK.num_long
    gaps = [round(b - a, 6) for a, b in pairwise(times)]
    group, gap, pause = GPU_QUICK.long_group, GPU_QUICK.long_gap_s, GPU_QUICK.long_pause_s
    longer = [index for index, each in enumerate(gaps, 1) if each == gap + pause]
    assert longer == [group]
    assert gaps.count(gap) == len(gaps) - len(longer)


def test_streams_of_the_first_wave_end_one_after_the_other():
    lengths = stream_lengths(4, 400)
    assert [output for _, output in lengths[:5]] == [100, 200, 300, 400, 400]
    assert len(lengths) == 4 * STREAM_WAVES
    assert all(output >= 2 for _, output in stream_lengths(64, 8))
