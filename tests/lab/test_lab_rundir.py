from __future__ import annotations

import json

import pytest
from synthetic import LAYOUT, write_run

from pdrelay.errors import ConfigError
from pdrelay.lab.rundir import read_run


@pytest.fixture
def small(tmp_path):
    write_run(tmp_path, topologies="pd:1:1")
    return tmp_path


def a_file(root, name):
    return sorted(root.rglob(name))[0]


def test_reads_what_was_written(run_dir):
    run = read_run(run_dir)
    assert list(run.topologies) == ["replicas-2", "tp-2", "pd-1-1", "replicas-1"]
    assert len(run.cases) == 4 * 14
    case = run.select("ttft", "pd-1-1")[-1]
    assert (case.info.case, case.info.rep, len(case.measured)) == ("idle", 0, 39)
    assert run.topologies["pd-1-1"].layout_of("decode-0") == LAYOUT
    assert all(
        record.request_id in run.topologies[case.info.topology].by_client_id
        for case in run.cases
        for record in case.records
    )


def test_streams_are_not_measured_traffic(run_dir):
    (case,) = read_run(run_dir).select("interference", "replicas-1")
    assert {record.tag for record in case.measured} == {"long"}
    assert len(case.streams) == 4


def test_a_line_cut_short_by_a_crash_is_dropped(small):
    path = a_file(small, "events.jsonl")
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    known = read_run(small).topologies["pd-1-1"].by_client_id
    assert len(known) == data.count(b"\n") - 1


@pytest.mark.parametrize("name", ["events.jsonl", "requests.jsonl"])
def test_a_damaged_line_is_named(small, name):
    path = a_file(small, name)
    lines = path.read_bytes().split(b"\n")
    lines[2] = b'{"broken": '
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match=rf"{name}:3 is damaged"):
        read_run(small)


@pytest.mark.parametrize("name", ["run.json", "case.json", "launch.json", "workers.json"])
def test_a_damaged_file_is_named(small, name):
    a_file(small, name).write_text("[1, 2", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{name} is damaged"):
        read_run(small)


def test_missing_requests_are_named(small):
    a_file(small, "requests.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"requests\.jsonl cannot be read"):
        read_run(small)


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        read_run(tmp_path / "nothing")


def test_another_schema_is_refused(small):
    path = small / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"schema_version": 99}))
    with pytest.raises(ConfigError, match="schema_version 99"):
        read_run(small)


def test_a_later_start_adds_its_events(small):
    first = a_file(small, "events.jsonl")
    lines = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join(lines[:10]))
    (first.parent / "events-1.jsonl").write_bytes(b"".join(lines[10:]))
    assert len(read_run(small).topologies["pd-1-1"].by_client_id) == len(lines)
