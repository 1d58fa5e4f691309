from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from pdrelay.cli import main, parse
from pdrelay.cli.lab import lab_config
from pdrelay.lab.scale import FULL, GPU_FULL, GPU_QUICK, QUICK
from pdrelay.lab.topology import label_of, parse_topologies, parse_topology
from pdrelay.launch.host import inspect_host


def read(*argv):
    return lab_config(parse(["lab", *argv]))


def test_defaults():
    quick, full = read("--quick", "--device", "cpu"), read("--device", "cpu")
    assert [t.name for t in quick.topologies] == ["replicas-2", "tp-2", "pd-1-1", "replicas-1"]
    assert quick.baseline.name == "replicas-1"
    assert (quick.scale, quick.repeats, full.scale, full.repeats) == (QUICK, 1, FULL, 5)
    assert (quick.slo.ttft_ms, quick.slo.tpot_ms) == (250, 10)
    other = read("--model", "llama-3.1-8b", "--device", "cpu").slo
    assert (other.ttft_ms, other.tpot_ms) == (500, 30)
    assert quick.out.parent.name == "runs"


def test_servers_on_gpus_get_sizes_rates_and_limits_of_their_own():
    quick = read("--quick", "--model", "llama-3.1-8b", "--device", "cuda")
    assert (quick.scale, quick.slo.ttft_ms, quick.slo.tpot_ms) == (GPU_QUICK, 500, 15)
    assert quick.serve_args == ("--device", "cuda", "--max-model-len", "16384")
    assert read("--scale", "gpu", "--device", "cpu").scale == GPU_FULL
    assert read("--scale", "cpu", "--device", "cuda").scale == FULL
    given = read("--scale", "gpu", "--max-model-len", "9000", "--gpu-memory-utilization", "0.5")
    assert given.serve_args == ("--max-model-len", "9000", "--gpu-memory-utilization", "0.5")
    shared = read("--device", "cpu", "--kv-cache-memory", "2GiB", "--allow-oversubscribe")
    assert shared.serve_args == (
        "--device", "cpu", "--kv-cache-memory", str(2 << 30), "--allow-oversubscribe"
    )  # fmt: skip


def test_the_scale_follows_the_gpus_that_are_there(monkeypatch):
    host = inspect_host()
    for num_gpus, scale in ((0, FULL), (2, GPU_FULL)):
        there = dataclasses.replace(host, num_gpus=num_gpus)
        monkeypatch.setattr("pdrelay.launch.host.inspect_host", lambda there=there: there)
        assert read().scale == scale


def test_a_dry_run_lists_the_cases_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["lab", "--quick", "--scale", "gpu", "--cases", "fixed,streams-*", "--dry-run"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    for word in ("2 replicas, repeat 0", "fixed", "streams-64", "4 server starts", "480 s"):
        assert word in printed
    assert "poisson-0" not in printed
    assert list(tmp_path.iterdir()) == []


def test_everything_at_once(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("")
    chosen = read(
        "--model", "tiny", "--topologies", "pd:2:1", "--experiments", "3,1", "--trace",
        str(trace), "--time-scale", "0.5", "--max-input-len", "100", "--max-output-len", "9",
        "--trace-duration", "60", "--transport", "tcp", "--repeats", "3", "--seed", "7", "--out",
        str(tmp_path / "out"), "--engine", "native", "--device", "cpu", "--dtype", "float32",
        "--time-limit", "99", "--goodput", "ttft:9", "--allow-oversubscribe",
    )  # fmt: skip
    assert chosen.experiments == ("ttft", "interference")
    assert chosen.trace.time_scale == 0.5
    assert (chosen.trace.max_input_len, chosen.trace.max_output_len) == (100, 9)
    assert chosen.args_of(chosen.topologies[0]) == (
        "--device", "cpu", "--dtype", "float32", "--allow-oversubscribe", "--transport", "tcp"
    )  # fmt: skip
    assert (chosen.repeats, chosen.seed, chosen.scale.budget_s) == (3, 7, 99.0)
    assert (chosen.slo.ttft_ms, chosen.slo.tpot_ms) == (9, None)
    json.dumps(chosen.as_json())


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["--topologies", "replicas"], "write replicas:N, tp:N or pd:PREFILL:DECODE"),
        (["--topologies", "pd:1"], "is not known"),
        (["--topologies", "tp:0"], "at least 1"),
        (["--topologies", "tp:-1"], "is not known"),
        (["--topologies", "tp:2,tp:2"], "given twice"),
        (["--topologies", ","], "no topology"),
        (["--experiments", "5"], "--experiments"),
        (["--experiments", ","], "--experiments"),
        (["--cases", "fixd", "--dry-run"], "names no case"),
        (["--scale", "gpus"], "--scale"),
        (["--kv-cache-memory", "0"], "--kv-cache-memory"),
        (["--repeats", "0"], "--repeats"),
        (["--repeats", "two"], "--repeats"),
        (["--seed", "-1"], "--seed"),
        (["--time-scale", "2"], "--time-scale needs --trace"),
        (["--trace", "no-such-file"], "is no file"),
        (["--time-limit", "nan"], "--time-limit"),
        (["--transport", "pigeon"], "--transport"),
        (["--engine", "vlm"], "--engine"),
        (["--dtype", "float16"], "--dtype"),
        (["--goodput", "ttft:-1"], "ttft:-1"),
        (["--qick"], "--quick"),
    ],
)
def test_bad_flags_are_one_line_and_start_nothing(argv, cause, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["lab", *argv])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2
    assert cause in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_topologies_have_names_labels_and_flags():
    pd, tp, one, two = parse_topologies("pd:3:1, tp:4 ,replicas:1,replicas:2")
    assert (pd.name, pd.num_gpus, pd.label) == ("pd-3-1", 4, "P/D 3:1")
    assert pd.serve_args == ["--prefill", "3", "--decode", "1"]
    assert (tp.name, tp.num_gpus, tp.label, tp.serve_args) == ("tp-4", 4, "TP=4", ["--tp", "4"])
    assert (one.label, two.label) == ("1 replica", "2 replicas")
    assert two.serve_args == ["--replicas", "2"]
    assert label_of(parse_topology("replicas:12").name) == "12 replicas"


def test_report_rebuilds_and_prints(run_dir, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    assert main(["report", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "1 TTFT p50" in printed
    assert printed.endswith(f"report: {copy / 'report.html'}\n")
    for name in ("report.html", "summary.json", "summary.txt", "trace.json"):
        assert (copy / name).stat().st_size > 1000
    text = (copy / "summary.txt").read_text()
    assert "1 TTFT p50" in text and "\x1b" not in text and "…" not in text
    assert max(map(len, text.splitlines())) > 160  # the verdict's sentences are not folded
    (copy / "report.html").unlink()
    assert main(["report", "--quiet", str(copy)]) == 0
    assert "1 TTFT p50" not in capsys.readouterr().out


def test_report_of_no_run_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is not a run directory" in error


def test_an_export_holds_what_documents_quote(run_dir, tmp_path, capsys):
    copy, to = tmp_path / "run", tmp_path / "results" / "2030-01-01-lab"
    shutil.copytree(run_dir, copy)
    assert main(["report", "--quiet", "--export", str(to), str(copy)]) == 0
    assert f"exported: {to}" in capsys.readouterr().out
    assert sorted(path.name for path in to.iterdir()) == [
        "environment.json", "run.json", "summary.json"
    ]  # fmt: skip
    summary = json.loads((to / "summary.json").read_bytes())
    assert summary["verdict"]["headline"]
    assert main(["report", "--quiet", "--export", str(to), str(copy)]) == 2
    assert "not empty" in capsys.readouterr().err
