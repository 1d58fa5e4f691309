from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, full_answer, scripted, text_chunk

from pdrelay.bench.record import read_records
from pdrelay.cli import bench


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pdrelay")
    bench.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["bench", *argv])


def run(*argv: str) -> int:
    args = parse(list(argv))
    code = args.func(args)
    assert isinstance(code, int)
    return code


def fixed(server: FakeServer, *more: str) -> list[str]:
    return ["--url", server.url, "--input-len", "32", "--output-len", "4", *more]


def test_open_loop_writes_records_and_summary(
    threaded_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "run"
    flags = ["--rate", "200", "--num-prompts", "20", "--goodput", "ttft:60000", "tpot:60000"]
    assert run(*fixed(threaded_server, *flags, "--out", str(out), "--num-gpus", "2")) == 0
    records = read_records(out / "requests.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    assert len(records) == 20 and all(r.ok for r in records)
    assert len(threaded_server.bodies) == 24  # four warm-ups
    assert summary["completed"] == summary["num_prompts"] == 20
    assert summary["total_input_tokens"] == 640 and summary["total_output_tokens"] == 80
    assert summary["request_rate"] == 200 and summary["max_concurrency"] is None
    assert summary["model_id"] == "fake" and summary["tokenizer_id"] == "fake-root"
    assert summary["attainment"] == 1 and summary["request_goodput"] > 0
    assert summary["config"]["input_len"] == 32 and summary["config"]["slo"]["ttft_ms"] == 60000
    assert records[-1].intended_ns - records[0].intended_ns < 100_000_000
    printed = capsys.readouterr().out
    assert " Serving Benchmark Result " in printed and "Request goodput (req/s):" in printed
    assert run(*fixed(threaded_server, *flags, "--out", str(out))) == 2
    assert "exists: remove it or choose another --out" in capsys.readouterr().err


def test_closed_loop_and_infinite_rate(threaded_server: FakeServer, tmp_path: Path) -> None:
    flags = ["--num-prompts", "9", "--num-warmups", "0"]
    assert run(*fixed(threaded_server, "--concurrency", "2", *flags, "--out", str(tmp_path))) == 0
    assert threaded_server.max_running <= 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["max_concurrency"] == 2 and summary["request_rate"] == "inf"
    assert summary["mode"] == "closed loop"
    assert run(*fixed(threaded_server, "--rate", "inf", *flags)) == 0


def test_chat_sends_text(threaded_server: FakeServer) -> None:
    flags = ["--rate", "inf", "--num-prompts", "5", "--endpoint", "chat"]
    assert run(*fixed(threaded_server, *flags)) == 0
    contents = [body["messages"][0]["content"] for body in threaded_server.bodies]
    assert len(set(contents)) == 9 and all(len(c) <= 32 and "\ufffd" not in c for c in contents)


def test_chat_needs_detokenize(
    threaded_server: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    threaded_server.detokenize = False
    assert run(*fixed(threaded_server, "--rate", "1", "--endpoint", "chat")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--endpoint completions" in error
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt": "hello", "max_tokens": 2}\n')
    workload = ["--workload", str(path), "--rate", "inf", "--endpoint", "chat"]
    assert run("--url", threaded_server.url, *workload) == 0


def test_a_trace_keeps_its_times_and_sharing(
    threaded_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mooncake.jsonl"
    row = {"input_length": 600, "output_length": 3}
    rows = [{**row, "timestamp": 100 * i, "hash_ids": [7, i + 10]} for i in range(6)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    out = tmp_path / "out"
    flags = ["--trace", str(path), "--time-scale", "0.1", "--max-output-len", "2"]
    window = ["--trace-start", "0.1", "--trace-duration", "0.4", "--num-prompts", "3"]
    assert run("--url", threaded_server.url, *flags, *window, "--out", str(out)) == 0
    records = read_records(out / "requests.jsonl")
    offsets = [r.intended_ns - records[0].intended_ns for r in records]
    assert offsets == [0, 10_000_000, 20_000_000]
    prompts = [b["prompt"] for b in threaded_server.bodies if len(b["prompt"]) == 600][-3:]
    assert len({tuple(p[:512]) for p in prompts}) == 1 and len({tuple(p) for p in prompts}) == 3
    info = json.loads((out / "summary.json").read_text())["trace"]
    assert info["num_output_capped"] == 3 and info["num_shared_tokens"] == 1024
    assert "mooncake trace: 3 of 6 requests" in capsys.readouterr().out
    # The trace's lengths under Poisson arrivals.
    assert run("--url", threaded_server.url, "--trace", str(path), "--rate", "inf") == 0


def test_vocabulary_comes_from_the_server_or_the_flag(threaded_server: FakeServer) -> None:
    flags = ["--rate", "inf", "--num-prompts", "30"]
    assert run(*fixed(threaded_server, *flags)) == 0
    assert 200 < max(max(b["prompt"]) for b in threaded_server.bodies) < 256
    threaded_server.models[0]["vocab_size"] = 128_256
    threaded_server.bodies.clear()
    assert run(*fixed(threaded_server, *flags)) == 0
    assert 100_000 < max(max(b["prompt"]) for b in threaded_server.bodies) < 128_256
    threaded_server.bodies.clear()
    assert run(*fixed(threaded_server, *flags, "--vocab-size", "50")) == 0
    assert max(max(b["prompt"]) for b in threaded_server.bodies) < 50


def test_api_key_and_model(
    threaded_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threaded_server.api_key = "secret"
    flags = ["--rate", "inf", "--num-prompts", "2"]
    assert run(*fixed(threaded_server, *flags)) == 2
    assert "--api-key" in capsys.readouterr().err
    keyed = [*flags, "--api-key", "secret", "--model", "other", "--out", str(tmp_path)]
    assert run(*fixed(threaded_server, *keyed)) == 0
    assert {b["model"] for b in threaded_server.bodies} == {"other"}
    assert "secret" not in (tmp_path / "summary.json").read_text()


def test_exit_codes_for_refusals_and_failures(
    threaded_server: FakeServer, unused_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    threaded_server.reply = scripted(429, b'{"error": {"message": "full"}}')
    assert run(*fixed(threaded_server, "--rate", "inf", "--num-prompts", "3")) == 2
    assert "every warm-up request failed (HTTP 429: full)" in capsys.readouterr().err
    few = ["--rate", "inf", "--num-prompts", "3", "--num-warmups", "0"]
    assert run(*fixed(threaded_server, *few)) == 1
    assert "INVALID: no request was completed" in capsys.readouterr().out
    assert run("--url", unused_url, "--input-len", "1", "--output-len", "1", "--rate", "1") == 2
    assert "start the server or check --url" in capsys.readouterr().err
    threaded_server.models.clear()
    assert run(*fixed(threaded_server, *few)) == 2
    assert "lists no model" in capsys.readouterr().err


LENGTHS = ["--input-len", "8", "--output-len", "2"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "0 traffic sources"),
        ([*LENGTHS, "--trace", "x", "--rate", "1"], "2 traffic sources"),
        (["--input-len", "8", "--rate", "1"], "give both"),
        (LENGTHS, "--rate R"),
        ([*LENGTHS, "--rate", "1", "--concurrency", "1"], "exclude each other"),
        ([*LENGTHS, "--rate", "0"], "--rate is '0'"),
        ([*LENGTHS, "--rate", "-3"], "--rate is '-3'"),
        ([*LENGTHS, "--rate", "nan"], "--rate is 'nan'"),
        ([*LENGTHS, "--rate", "1e30"], "--rate is '1e30'"),
        ([*LENGTHS, "--rate", "fast"], "--rate is 'fast'"),
        ([*LENGTHS, "--concurrency", "0"], "--concurrency is '0'"),
        ([*LENGTHS, "--concurrency", "1.5"], "--concurrency is '1.5'"),
        ([*LENGTHS, "--concurrency", "9" * 5000], "--concurrency is '999"),
        ([*LENGTHS, "--rate", "1", "--num-prompts", "-1"], "--num-prompts is '-1'"),
        ([*LENGTHS, "--rate", "1", "--seed", "x"], "--seed is 'x'"),
        ([*LENGTHS, "--rate", "1", "--timeout", "inf"], "--timeout is 'inf'"),
        ([*LENGTHS, "--rate", "1", "--burstiness", "0"], "--burstiness is '0'"),
        ([*LENGTHS, "--concurrency", "1", "--burstiness", "2"], "--burstiness belongs to --rate"),
        ([*LENGTHS, "--rate", "1", "--time-scale", "2"], "--time-scale belongs to --trace"),
        ([*LENGTHS, "--rate", "1", "--vocab-size", "1"], "fewer than two"),
        ([*LENGTHS, "--rate", "1", "--slo", "gpt"], "unknown service level"),
        ([*LENGTHS, "--rate", "1", "--goodput", "itl:1"], "service level 'itl:1'"),
        ([*LENGTHS, "--rate", "1", "--goodput", "ttft:1", "--slo", "x"], "exclude"),
        (["--trace", "t", "--rate", "1", "--time-scale", "2"], "only one"),
        (["--trace", "t", "--shared-prefix-len", "2"], "belongs to --input-len"),
        (["--input-len", "0", "--output-len", "2", "--rate", "1"], "--input-len is '0'"),
        ([*LENGTHS, "--rate", "1", "--ramp-up", "-1"], "--ramp-up is '-1'"),
    ],
)
def test_bad_flags_are_one_line_with_a_fix(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--url", "http://127.0.0.1:1", *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("pdrelay bench: error: ") and words in captured.err


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "http://", "http://a?b"])
def test_bad_urls(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--url", url, *LENGTHS, "--rate", "1") == 2
    assert "http://HOST:PORT" in capsys.readouterr().err


def test_unknown_flags_and_abbreviations_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--colour", "--conc", "--num-prompt"):
        with pytest.raises(SystemExit) as caught:
            parse(["--url", "http://x", *LENGTHS, flag, "1"])
        assert caught.value.code == 2
    capsys.readouterr()


def test_files_that_do_not_fit_the_server(
    threaded_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", threaded_server.url]
    assert run(*url, "--input-len", "4096", "--output-len", "1", "--rate", "1") == 2
    assert "exceed the model's 4096 tokens" in capsys.readouterr().err
    path = tmp_path / "w.jsonl"
    path.write_text('{"input_len": 3, "max_tokens": 2}\n')
    assert run(*url, "--workload", str(path)) == 2
    assert "no arrival times" in capsys.readouterr().err
    assert run(*url, "--trace", str(tmp_path / "none")) == 2
    assert "cannot read" in capsys.readouterr().err
    occupied = str(path / "out")
    assert run(*url, "--workload", str(path), "--rate", "1", "--out", occupied) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert threaded_server.bodies == []


MAIN = """
import argparse, sys
from pdrelay.cli import bench
parser = argparse.ArgumentParser()
bench.add_parser(parser.add_subparsers())
args = parser.parse_args()
code = args.func(args)
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_ctrl_c_keeps_what_was_measured(threaded_server: FakeServer, tmp_path: Path) -> None:
    child: list[subprocess.Popen[str]] = []

    async def interrupt_at_the_third(body: dict[str, Any]) -> AsyncIterator[Any]:
        if len(threaded_server.bodies) < 3:
            async for item in full_answer(body):
                yield item
            return
        yield text_chunk("a")
        os.kill(child[0].pid, signal.SIGINT)

    threaded_server.reply = interrupt_at_the_third
    flags = ["--concurrency", "1", "--num-prompts", "50", "--num-warmups", "0"]
    argv = ["bench", *fixed(threaded_server, *flags, "--out", str(tmp_path))]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.append(process)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["completed"] == 2
    assert summary["unsent"] + summary["failed"] + summary["cancelled"] == 48
    assert len(read_records(tmp_path / "requests.jsonl")) == 50 - summary["unsent"]
    assert "stopped early" in out
