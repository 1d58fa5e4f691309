"""`pdrelay kv` on a real pair of processes, and its report rebuilt from the raw files."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from pdrelay.cli import main, parse
from pdrelay.cli.kv import kv_config
from pdrelay.lab.kv.config import KvConfig
from pdrelay.lab.kv.measure import Measurement, cells_of, rounds_of
from pdrelay.lab.kv.rundir import read_kv_run
from pdrelay.lab.kv.wire import Up
from pdrelay.launch.host import inspect_host
from pdrelay.model.config import BUILT_IN

KV_CONFIG = KvConfig(
    model="tiny",
    dtype="float32",
    tp=1,
    device="cpu",
    out=Path("unused"),
    transports=("mapped",),
    lengths=(64, 256),
    block_sizes=(16, 64),
    repeats=5,
)


@pytest.fixture(scope="module")
def kv_dir(tmp_path_factory):
    """A small measured run. Not to be changed."""
    out = tmp_path_factory.mktemp("kv") / "run"
    argv = ["kv", "tiny", "--lengths", "64,256", "--block-sizes", "16,64", "--no-serve"]
    assert main([*argv, "--repeats", "11", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def summary(kv_dir):
    return json.loads((kv_dir / "summary.json").read_bytes())


def test_every_combination_is_measured_and_complete(kv_dir):
    run = read_kv_run(kv_dir)
    assert run.info.notes == []
    assert run.info.git_commit and run.info.ended and run.environment["cpu"]
    groups = {}
    for sample in run.samples:
        key = (sample.transport, sample.mode, sample.placement, sample.block_size, sample.tokens)
        groups.setdefault(key, []).append(sample)
    transfers = 3 * 2 * 2 * 2 * 2  # transports, modes, placements, page sizes, lengths
    assert len(groups) == transfers + 2 * 2 * 2  # plain copies and computation alone
    for (transport, mode, placement, block_size, tokens), samples in groups.items():
        assert [sample.rep for sample in samples] == list(range(11))
        for sample in samples:
            assert not sample.damaged
            if mode == "compute":
                assert sample.computed_ns > sample.start_ns and sample.num_bytes == 0
                continue
            assert sample.num_bytes == tokens * 4096
            assert sample.start_ns < sample.sent_ns and sample.start_ns < sample.landed_ns
            if transport == "mapped":
                one_run = placement == "contiguous" or tokens == block_size
                most = 4 if one_run else 4 * tokens // block_size
                assert sample.num_pieces == most or (not one_run and sample.num_pieces < most)
            if mode == "layerwise":
                assert sample.start_ns < sample.computed_ns < sample.landed_ns


def test_figures_follow_from_the_samples(kv_dir, summary):
    run = read_kv_run(kv_dir)
    assert summary["kv"]["per_token"] == 4096
    assert [row["tokens"] for row in summary["copies"]] == [64, 256]
    row = next(
        row
        for row in summary["transfers"]
        if (row["transport"], row["placement"], row["block_size"], row["tokens"])
        == ("tcp", "scattered", 64, 256)
    )
    walls = sorted(
        (sample.landed_ns - sample.start_ns) / 1e6
        for sample in run.samples
        if (sample.transport, sample.placement, sample.block_size, sample.tokens, sample.mode)
        == ("tcp", "scattered", 64, 256, "bulk")
    )
    assert row["bulk"]["value"] == pytest.approx(walls[5])
    assert row["bulk"]["lo"] < row["bulk"]["value"] < row["bulk"]["hi"]
    assert row["gb_per_s"]["value"] == pytest.approx(256 * 4096 / walls[5] / 1e6)
    assert [row["transport"] for row in summary["transfers"][::8]] == ["mapped", "tcp", "pool"]


def test_the_page_is_rebuilt_from_the_raw_files(kv_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(kv_dir, copy)
    page = (copy / "report.html").read_text()
    for made in ("report.html", "summary.json"):
        (copy / made).unlink()
    assert main(["report", str(copy)]) == 0
    assert "4,096 B a token" in capsys.readouterr().out
    assert (copy / "report.html").read_text() == page
    tree = ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert len(tree.findall(".//{http://www.w3.org/2000/svg}svg")) >= 6
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_damaged_file_is_named(kv_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(kv_dir, copy)
    with (copy / "samples.jsonl").open("a") as file:
        file.write("{}\n")
    assert main(["report", str(copy)]) == 2
    assert "samples.jsonl:" in capsys.readouterr().err


def test_prediction_alone_starts_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["kv", "llama-3.1-8b", "--predict-only", "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "131,072 B a token" in printed
    assert "counts 32 KV heads where Llama-3.1-8B has 8" in printed
    summary = json.loads((out / "summary.json").read_bytes())
    assert summary["transfers"] == []
    links = [(row["model"], row["tp"], row["link"]) for row in summary["predictions"]]
    assert ("llama-3.1-70b", 4, "100 Gb/s") in links and len(links) == 8
    assert not (out / "samples.jsonl").exists()


def test_given_rates_are_labelled(tmp_path):
    out = tmp_path / "run"
    argv = ["kv", "tiny", "--predict-only", "--out", str(out), "--links", "ib=25,nvl=390/rank"]
    assert main([*argv, "--tp", "2", "--tflops", "1"]) == 0
    rows = json.loads((out / "summary.json").read_bytes())["predictions"]
    assert [(row["link"], row["link_gb_per_s"], row["shared"]) for row in rows] == [
        ("ib", 25.0, True),
        ("nvl", 390.0, False),
    ]
    assert "given: --tflops" in rows[0]["compute_source"]
    assert rows[0]["points"][0]["bulk"] == pytest.approx(64 * 4096 / 25e9 * 1e3, rel=1e-6)


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["nothing-here"], "unknown model"),
        (["tiny", "--tp", "3"], "do not divide among 3 ranks"),
        (["tiny", "--transport", "nccl"], "cannot be measured on cpu"),
        (["tiny", "--transport", ","], "--transport"),
        (["tiny", "--lengths", "64,x"], "--lengths is '64,x'"),
        (["tiny", "--lengths", "0"], "--lengths"),
        (["tiny", "--lengths", "999999"], "the model's context is 16384"),
        (["tiny", "--block-sizes", ","], "name at least one"),
        (["tiny", "--device", "cuda"], "--device cuda needs a GPU"),
        (["tiny", "--links", "ib"], "write NAME=GB/s"),
        (["tiny", "--links", "ib=-1"], "write NAME=GB/s"),
        (["tiny", "--tflops", "fast"], "--tflops"),
        (["llama-3.1-70b", "--lengths", "131072"], "lower --lengths"),
    ],
)
def test_bad_input_is_one_line(argv, cause, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["kv", *argv, "--no-serve"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and cause in shown
    assert list(tmp_path.iterdir()) == []


def test_without_a_plain_copy_the_rest_is_measured():
    cells = cells_of(KV_CONFIG, with_copy=False)
    assert not [cell for cell in cells if cell.mode == "copy"]
    assert len(cells_of(KV_CONFIG)) == len(cells) + len(KV_CONFIG.lengths)


def test_page_sizes_are_visited_forth_and_back():
    assert rounds_of(KV_CONFIG) == [
        (16, range(0, 3)), (64, range(0, 3)), (64, range(3, 5)), (16, range(3, 5))
    ]  # fmt: skip
    one = replace(KV_CONFIG, repeats=1)
    assert rounds_of(one) == [(16, range(0, 1)), (64, range(0, 1))]


@pytest.mark.parametrize(("num_gpus", "second"), [(1, "cuda:0"), (2, "cuda:1")])
def test_devices_by_the_number_of_gpus(num_gpus, second, tmp_path, monkeypatch):
    host = replace(inspect_host(), num_gpus=num_gpus)
    monkeypatch.setattr("pdrelay.launch.host.inspect_host", lambda: host)
    config, _ = kv_config(parse(["kv", "tiny", "--device", "cuda", "--out", str(tmp_path)]))
    assert config.devices == ("cuda:0", second) and config.dtype == "bfloat16"
    assert ("nccl" in config.transports) == (num_gpus == 2)
    assert ("--allow-oversubscribe" in config.serve.args) == (num_gpus == 1)
    assert ("own memory" in config.remark) == (num_gpus == 1)


@pytest.mark.parametrize(("tokens", "seconds"), [(512, 0.0110), (2048, 0.0449), (8192, 0.202)])
def test_on_a_gpu_the_stand_in_takes_as_long_as_prefill(tokens, seconds):
    config = replace(KV_CONFIG, device="cuda", dtype="bfloat16", num_gpus=1)
    shape = BUILT_IN["llama-3.1-8b"]
    measurement = Measurement(config, shape, lambda *_: None, lambda _: None)
    up = Up(unit_ns=25_000.0, flops_per_s=660e12)
    layers = measurement._units(tokens, up) * shape.num_layers
    assert layers * 25e-6 == pytest.approx(seconds, rel=0.05)
