"""The command: exit status, JSON, and what is read."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from pdrelay.cli import main

LOGS = Path(__file__).parent / "logs"


def test_a_log_with_a_cause(capsys):
    status = main(["doctor", "--log", str(LOGS / "p2pnccl_removed.log")])
    shown = capsys.readouterr().out
    assert status == 1
    assert "removed in vLLM 0.24" in shown and "NixlConnector" in shown
    assert "Unsupported connector type: P2pNcclConnector" in shown


def test_a_directory_of_logs_as_json(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "prefill.log").write_text("KeyError: 'http_port'\n")
    (tmp_path / "decode.out").write_text("all is well\n")
    (tmp_path / "weights.bin").write_text("KeyError: 'http_port'\n")
    assert main(["doctor", "--json", "--engine", "vllm", "--log", str(tmp_path)]) == 1
    logs = json.loads(capsys.readouterr().out)["logs"]
    assert [Path(log["path"]).name for log in logs] == ["decode.out", "prefill.log"]
    assert logs[0]["findings"] == []
    assert logs[1]["findings"][0]["id"] == "http_port_missing"
    assert logs[1]["findings"][0]["line_number"] == 1


def test_a_healthy_log_is_status_0(capsys):
    assert main(["doctor", "--log", str(LOGS / "healthy.log")]) == 0
    assert "no known cause" in capsys.readouterr().out


def test_what_cannot_be_read_is_bad_usage(tmp_path, capsys):
    assert main(["doctor", "--log", str(tmp_path / "none.log")]) == 2
    assert "--log" in capsys.readouterr().err
    assert main(["doctor", "--log", str(tmp_path)]) == 2
    assert "name the files" in capsys.readouterr().err
    assert main(["doctor", "--engine", "trt"]) == 2
    log = ["--log", str(LOGS / "healthy.log")]
    assert main(["doctor", "--engine", "trt", *log]) == 2
    assert "--engine" in capsys.readouterr().err


def test_a_large_log_is_read_at_both_ends(tmp_path):
    from pdrelay.doctor.logs import read_logs

    path = tmp_path / "large.log"
    path.write_bytes(b"first\n" + b"x" * (17 << 20) + b"\nlast")
    (log,) = read_logs([str(path)])
    assert log.text.startswith("first") and log.text.endswith("last")
    assert len(log.text) == 16 << 20


def test_preflight_of_the_native_engine(capsys):
    flags = ["--prefill", "1", "--decode", "1", "--port", "0", "--allow-oversubscribe"]
    assert main(["doctor", "tiny", *flags, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {"what", "level", "cause", "fix"} == set(checks[0])
    assert "topology" in {check["what"] for check in checks}


def test_a_port_in_use_stops_the_launch(capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        assert main(["doctor", "tiny", "--port", port]) == 1
    assert "in use" in " ".join(capsys.readouterr().out.split())


def test_an_engine_python_without_the_engine(tmp_path, capsys):
    flags = ["--engine", "vllm", "--engine-python", str(tmp_path / "python"), "--port", "0"]
    assert main(["doctor", *flags, "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    (engine,) = [check for check in checks if check["what"] == "engine"]
    assert engine["level"] == "failure"


@pytest.mark.parametrize("flag", ["--replicas", "--tp", "--transport", "--max-model-len"])
def test_serve_flags_are_accepted(flag, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert flag in capsys.readouterr().out
