"""Topologies by name, on one engine or several, and what servers are told."""

from __future__ import annotations

import argparse

import pytest

from pdrelay.cli import lab as cli_lab
from pdrelay.errors import ConfigError
from pdrelay.lab.topology import engine_of, is_pd, label_of, on_engines, parse_topologies

SHAPES = "replicas:2,tp:2,pd:1:1,vllm+nixl/pd:1:2,sglang/tp:4"


def parsed(*argv):
    parser = argparse.ArgumentParser()
    cli_lab.add_parser(parser.add_subparsers())
    return cli_lab.lab_config(parser.parse_args(["lab", *argv]))


def test_names_labels_and_flags():
    topologies = on_engines(parse_topologies(SHAPES), ["native", "vllm"])
    assert [t.name for t in topologies] == [
        "replicas-2",
        "vllm.replicas-2",
        "tp-2",
        "vllm.tp-2",
        "pd-1-1",
        "vllm.pd-1-1",
        "vllm.nixl.pd-1-2",
        "sglang.tp-4",
    ]
    assert [t.label for t in topologies] == [
        "2 replicas",
        "vLLM 2 replicas",
        "TP=2",
        "vLLM TP=2",
        "P/D 1:1",
        "vLLM P/D 1:1",
        "vLLM P/D 1:2 (nixl)",
        "SGLang TP=4",
    ]
    assert [is_pd(t.name) for t in topologies] == [False] * 4 + [True] * 3 + [False]
    assert [engine_of(t.name) for t in topologies][-3:] == ["vllm", "vllm", "sglang"]
    assert topologies[0].serve_args == ["--replicas", "2"]
    assert topologies[6].serve_args == [
        *("--engine", "vllm", "--connector", "nixl", "--prefill", "1", "--decode", "2"),
    ]
    assert topologies[6].num_gpus == 3
    assert label_of("replicas-1") == "1 replica"


@pytest.mark.parametrize(
    "text",
    [
        "vllm/",
        "vlm/pd:1:1",
        "vllm+/pd:1:1",
        "vllm+nixl/tp:2",
        "native+nixl/pd:1:1",
        "pd:0:1",
        "pd:1",
    ],
)
def test_bad_topologies(text):
    with pytest.raises(ConfigError):
        parse_topologies(text)


def test_duplicates_are_found_after_engines_are_known():
    with pytest.raises(ConfigError, match="twice"):
        on_engines(parse_topologies("vllm/pd:1:1,pd:1:1"), ["vllm"])
    assert len(on_engines(parse_topologies("vllm/pd:1:1,pd:1:1"), ["native"])) == 2


def test_servers_of_each_engine_get_their_own_flags():
    config = parsed(
        *("--topologies", "pd:1:1,vllm/pd:1:1,sglang/pd:1:1", "--transport", "tcp"),
        *("--dtype", "float32", "--engine-python", "vllm=/v/python"),
        *("--engine-python", "sglang=/s/python", "--engine-args=--enforce-eager"),
        "--engine-args=sglang=--mem-fraction-static 0.8",
    )
    native, vllm, sglang = config.topologies
    assert config.args_of(native) == ("--dtype", "float32", "--transport", "tcp")
    assert config.args_of(vllm) == (
        *("--dtype", "float32"),
        "--engine-python=/v/python",
        "--engine-args=--enforce-eager",
    )
    assert config.args_of(sglang) == (
        *("--dtype", "float32"),
        "--engine-python=/s/python",
        "--engine-args=--mem-fraction-static 0.8",
    )


def test_engine_and_engines():
    (one,) = parsed("--topologies", "pd:1:1", "--engine", "vllm").topologies
    assert one.name == "vllm.pd-1-1"
    both = parsed("--topologies", "pd:1:1", "--engines", "native, sglang").topologies
    assert [t.name for t in both] == ["pd-1-1", "sglang.pd-1-1"]
    for bad in (
        ["--engine", "vllm", "--engines", "native"],
        ["--engines", "vlm"],
        ["--engines", ","],
    ):
        with pytest.raises(ConfigError):
            parsed(*bad)
