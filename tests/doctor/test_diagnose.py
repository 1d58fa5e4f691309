"""Every rule against a log: captured from a real engine where the first line says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pdrelay.doctor import diagnose, explain
from pdrelay.doctor.rules import LAST_RESORT, RULES

LOGS = Path(__file__).parent / "logs"
FAILED = "Engine core initialization failed"

EXPECTED = {
    "address_space": "host_memory",
    "bfloat16": "bfloat16",
    "connector_class": "connector_module",
    "connector_hma": "connector_hma",
    "connector_too_new": "connector_too_new",
    "connector_unknown": "connector_unknown",
    "constructor_typeerror": "connector_constructor",
    "context_too_long": "context_too_long",
    "core_killed": "engine_vanished",
    "cuda_out_of_memory": "cuda_out_of_memory",
    "custom_code": "custom_code",
    "disk_full": "disk_full",
    "driver_too_old": "driver_too_old",
    "duplicate_gpu": "duplicate_gpu",
    "few_open_files": "too_many_open_files",
    "flashinfer_missing": "flashinfer_missing",
    "flashinfer_missing_pd": "flashinfer_missing",
    "gated_model": "gated_model",
    "gloo_interface": "gloo_interface",
    "gpu_exclusive": "gpu_taken",
    "gpu_taken": "gpu_taken",
    "heads_not_divisible": "heads_not_divisible",
    "host_memory": "host_memory",
    "host_name_unknown": "no_loopback",
    "http_port_keyerror": "http_port_missing",
    "http_port_required": "http_port_missing",
    "hub_offline": "hub_offline",
    "kv_cache_over_memory": "cpu_kv_space",
    "kv_cache_too_small": "kv_too_small",
    "kv_config_not_json": "kv_config_not_json",
    "kv_port_default": "kv_port_in_use",
    "kv_port_same": "kv_port_in_use",
    "kv_role_missing": "kv_role_missing",
    "kv_role_wrong": "kv_role_wrong",
    "lfs_pointer": "damaged_weights",
    "model_dir_missing": "no_such_model",
    "module_path_wrong": "connector_module",
    "native_torch_missing": "torch_missing",
    "nccl_interface": "nccl_interface",
    "nccl_shm": "nccl_shm",
    "nccl_unhandled": "nccl",
    "nixl_backend": "nixl_backend",
    "nixl_handshake": "nixl_handshake",
    "nixl_block_size": "nixl_handshake",
    "nixl_missing": "nixl_missing",
    "nixl_prefill_gone": "nixl_transfer",
    "nixl_wrong_peer": "nixl_wrong_peer",
    "sglang_crashed": "engine_vanished",
    "sglang_other_rank": "sglang_rank_failed",
    "vllm_old_prefix": "cuda_out_of_memory",
    "nixl_port": "nixl_port_in_use",
    "nixl_port_old": "nixl_port_in_use",
    "no_compiler": "no_compiler",
    "no_config": "no_config",
    "no_cuda": "no_cuda",
    "no_kernel_image": "no_kernel_image",
    "no_kv_memory": "no_kv_memory",
    "no_loopback": "no_loopback",
    "no_lscpu": "program_missing",
    "no_python_headers": "no_compiler",
    "no_tokenizer": "no_tokenizer",
    "no_weights": "no_weights",
    "old_constructor": "connector_constructor",
    "p2pnccl_removed": "connector_removed",
    "peer_access": "peer_access",
    "pinned_pool_limit": "pinned_pool",
    "pinned_pool_memory": "pinned_pool",
    "port_in_use": "port_in_use",
    "proxy_port_number": "proxy_port_number",
    "pynccl_connector": "v0_connector",
    "request_id_format": "request_id_format",
    "request_id_randomised": "request_id_randomised",
    "sglang_bootstrap": "sglang_bootstrap",
    "sglang_cpu_host_pool": "sglang_cpu_host_pool",
    "sglang_cpu_overlap": "sglang_cpu_overlap",
    "sglang_killed": "oom_killed",
    "sglang_memory": "sglang_memory",
    "sglang_no_cpu_engine": "sglang_cpu_engine",
    "sglang_no_ibverbs": "sglang_mooncake_library",
    "sglang_no_mooncake": "sglang_backend_missing",
    "sglang_no_nixl": "nixl_missing",
    "sglang_port": "port_in_use",
    "sglang_transfer": "sglang_transfer",
    "sglang_unbalanced": "sglang_memory",
    "shm_bus_error": "shm_too_small",
    "small_shm": "shm_too_small",
    "ucx_no_cuda": "ucx_transport",
    "ucx_unreachable": "ucx_transport",
    "unknown_flag": "unknown_flag",
    "unknown_model_type": "unknown_model_type",
    "unsupported_architecture": "unsupported_architecture",
    "v0_keys": "kv_config_key",
    "v1_connector_on_v0": "v0_connector",
    "weights_do_not_fit": "weights_do_not_fit",
    "wrong_shape": "weights_do_not_fit",
    "wrong_torch_build": "wrong_torch_build",
}


HEALTHY = {"healthy": "Application startup complete", "sglang_healthy": "ready to roll"}
FROM = ("# captured: vllm", "# captured: sglang", "# assembled, not captured: ")


def read(name: str) -> tuple[str, str]:
    """(header, log)"""
    header, _, text = (LOGS / f"{name}.log").read_text(encoding="utf-8").partition("\n")
    return header, text


def engine_of(name: str) -> str:
    return name.split("_")[0] if name.startswith(("sglang_", "native_")) else "vllm"


@pytest.mark.parametrize("name", EXPECTED)
def test_names_the_cause_and_quotes_its_line(name):
    _, text = read(name)
    first = diagnose(text, engine_of(name))[0]
    assert first.id == EXPECTED[name]
    assert first.line[:100] in text.splitlines()[first.line_number - 1]
    assert first.fix and "{" not in first.cause
    assert [first.id, first.cause] == [diagnose(text)[0].id, diagnose(text)[0].cause]


def test_each_log_has_its_cause_and_says_where_it_is_from():
    names = {path.stem for path in LOGS.glob("*.log")} - set(HEALTHY)
    assert names == set(EXPECTED)
    for name in names:
        header, _ = read(name)
        assert header.startswith(FROM), name


def test_each_rule_has_a_log():
    assert {rule.id for rule in (*RULES, *LAST_RESORT)} == set(EXPECTED.values())


@pytest.mark.parametrize("name", HEALTHY)
def test_a_log_of_a_server_that_served_names_nothing(name):
    header, text = read(name)
    assert header.startswith("# captured: ") and HEALTHY[name] in text
    assert diagnose(text, engine_of(name)) == []


def test_logs_hold_no_paths_of_the_machine_that_captured_them():
    for path in LOGS.glob("*.log"):
        found = re.findall(r"(?<![\w/])/(?:work|home|root)/(?!user\b)\S*", path.read_text())
        assert not found, f"{path.name}: {found[:3]}"


def test_the_final_message_is_not_the_cause():
    for name in EXPECTED:
        _, text = read(name)
        if FAILED in text and name != "core_killed":
            assert FAILED not in diagnose(text)[0].line, name


def test_the_earliest_root_cause_comes_first_and_symptoms_last():
    text = "\n".join(
        [
            "RuntimeError: NCCL error: unhandled cuda error",
            "KeyError: 'http_port'",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ]
    )
    ids = [finding.id for finding in diagnose(text, "vllm")]
    assert ids == ["http_port_missing", "cuda_out_of_memory", "nccl"]


def test_a_rule_outside_its_versions_stays_silent():
    text = "ValueError: Unsupported connector type: P2pNcclConnector"
    assert diagnose(text, "vllm", "0.26.0")[0].id == "connector_removed"
    assert diagnose(text, "vllm", "0.8.5")[0].id == "connector_too_new"
    _, hang = read("request_id_randomised")
    hang = re.sub(r".*API server version.*\n", "", hang)
    assert [f.id for f in diagnose(hang, "vllm", "0.20.1")] == ["request_id_randomised"]
    assert diagnose(hang, "vllm", "0.13.0") == []


def test_the_version_is_read_from_the_log():
    text = (
        "INFO 10-09 00:53:40 [api_server.py:1] vLLM API server version 0.9.1\n"
        "ValueError: Unsupported connector type: P2pNcclConnector"
    )
    assert diagnose(text, "vllm")[0].id == "connector_too_new"


def test_a_rule_of_another_engine_stays_silent():
    text = "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."
    assert diagnose(text, "sglang")[0].id == "sglang_memory"
    assert diagnose(text, "vllm")[0].id == "unrecognised"


def test_an_unknown_exception_before_a_symptom_is_the_cause():
    text = "ValueError: never seen before\nRuntimeError: NCCL error: unhandled cuda error"
    assert [f.id for f in diagnose(text)] == ["unrecognised", "nccl"]
    assert diagnose(text)[0].line == "ValueError: never seen before"


def test_information_and_quoted_source_are_no_errors():
    info = "(Worker pid=3) INFO 11-24 11:18:58 [x.py:1] retrying after CUDA out of memory"
    torch = (
        "[W1009 00:53:58.1 socket.cpp:755] [c10d] The IPv6 network addresses of (a, 2) cannot be "
        "retrieved (gai error: -2 - Name or service not known)."
    )
    source = '  File "a.py", line 3\n    raise RuntimeError("CUDA out of memory")'
    assert [diagnose(text) for text in (info, torch, source)] == [[], [], []]
    assert diagnose("torch.OutOfMemoryError: CUDA out of memory")[0].id == "cuda_out_of_memory"


def test_a_traceback_that_was_only_warned_of_is_no_cause():
    _, text = read("flashinfer_missing")
    warned, failed, _ = text.partition("EngineCore failed to start.")
    assert "ModuleNotFoundError: No module named 'nixl_ep_cu13'" in warned and failed
    assert diagnose(warned, "vllm") == []
    assert [finding.id for finding in diagnose(text, "vllm")] == ["flashinfer_missing"]
    said = "pdrelay: error: worker replica-0 did not start: its log says: No module named 'nixl'"
    assert diagnose(text + said, "vllm") == diagnose(text, "vllm")
    unknown = "(EngineCore pid=1368) ERROR 11-24 19:31:32 [core.py:1] ValueError: never seen"
    assert diagnose(warned + "\n" + unknown, "vllm")[0].line == "ValueError: never seen"
    as_error = warned.replace("WARNING", "ERROR")
    assert diagnose(as_error, "vllm")[0].id == "nixl_missing"


def test_a_warned_traceback_among_lines_of_others_is_left_out_and_theirs_are_not():
    warning = "(Worker pid=3) WARNING 11-24 11:18:58 [import_utils.py:408] "
    text = "\n".join(
        [
            warning + "Traceback (most recent call last):",
            "(Worker pid=4) ERROR 11-24 11:18:58 [worker.py:1] KeyError: 'http_port'",
            warning + "ModuleNotFoundError: No module named 'nixl'",
        ]
    )
    assert [finding.id for finding in diagnose(text, "vllm")] == ["http_port_missing"]


@pytest.mark.parametrize(
    "before",
    [
        "\x1b[0;36m(EngineCore_DP0 pid=7)\x1b[0;0m ERROR 10-09 00:54:01 [core.py:718] ",
        "prefill-1  | (EngineCore_DP0 pid=7) ERROR 10-09 00:54:01 [core.py:718] ",
        "[2026-09-17 16:23:13.816 DP0 TP0] ",
        "[replica-0.0] ",
        "[replica-0] ",
        "[decode-0] (EngineCore pid=7) ",
        "",
    ],
)
def test_what_loggers_put_before_a_message_is_left_out(before):
    assert diagnose(before + "KeyError: 'http_port'")[0].line == "KeyError: 'http_port'"
    assert diagnose(before + "ValueError: never seen")[0].line == "ValueError: never seen"


def test_explain_gives_cause_fix_and_line():
    text = "x\nKeyError: 'http_port'"
    cause, fix, seen = explain(diagnose(text))
    assert cause.startswith("cause: ") and "http_port" in fix and seen.endswith("'http_port'")
    assert explain([]) == [] and diagnose("") == []


def test_the_manual_lists_each_cause():
    manual = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", manual, flags=re.MULTILINE))
    assert listed == {rule.id for rule in (*RULES, *LAST_RESORT)}
