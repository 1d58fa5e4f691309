from __future__ import annotations

import io
import re
import shutil
import statistics
import xml.etree.ElementTree as ET
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console
from synthetic import LAYOUT, write_run

from pdrelay.core.events import EventKind
from pdrelay.lab.report.build import build_report, summarize
from pdrelay.lab.report.figures import Summary
from pdrelay.lab.report.joined import joined
from pdrelay.lab.report.page import render
from pdrelay.lab.report.phases import phases_of
from pdrelay.lab.report.tables import print_summary
from pdrelay.lab.report.transfers import transfer_of
from pdrelay.lab.rundir import read_run


def parse(html: str) -> ET.Element:
    """The report is well-formed XML after its doctype."""
    doctype, _, rest = html.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ET.fromstring(rest)


@pytest.fixture(scope="module")
def page(built):
    return parse(built.report.read_text(encoding="utf-8"))


def text_of(element) -> str:
    return " ".join("".join(element.itertext()).split())


def section(page, anchor):
    (found,) = [element for element in page.iter("section") if element.get("id") == anchor]
    return found


def test_every_section_is_filled(page):
    anchors = [element.get("id") for element in page.iter("section")]
    assert anchors == [
        "verdict", "ttft", "traffic", "interference", "shapes", "phases", "transfers",
        "gpus", "timelines", "validity", "methodology", "environment", "commands",
    ]  # fmt: skip
    assert not [element for element in page.iter() if element.get("class") == "empty"]
    svg = "{http://www.w3.org/2000/svg}svg"
    for anchor in ("ttft", "traffic", "interference", "shapes", "phases", "gpus", "timelines"):
        assert list(section(page, anchor).iter(svg)), anchor


def test_links_lead_somewhere(page):
    anchors = {element.get("id") for element in page.iter("section")}
    for link in page.iter("a"):
        assert link.get("href").removeprefix("#") in anchors


def test_report_is_one_offline_file(built):
    html = built.report.read_text(encoding="utf-8")
    assert "<script" not in html
    outside = re.findall(r'(?:src|href)="(?!#)[^"]*"|url\(|@import', html)
    assert outside == []


def test_drawings_stay_on_their_canvas(page):
    svg = "{http://www.w3.org/2000/svg}"
    for image in page.iter(svg + "svg"):
        _, _, width, height = map(float, image.get("viewBox").split())
        for element in image.iter():
            for name in ("x", "x1", "x2", "cx"):
                if element.get(name) is not None:
                    assert -1 <= float(element.get(name)) <= width + 1, element.attrib
            for name in ("y", "y1", "y2", "cy"):
                if element.get(name) is not None:
                    assert -1 <= float(element.get(name)) <= height + 1, element.attrib
            for pair in (element.get("points") or "").split():
                x, y = map(float, pair.split(","))
                assert -1 <= x <= width + 1
                assert -1 <= y <= height + 1


def test_values_from_outside_are_escaped(page):
    assert "synthetic <CPU> & co" in text_of(section(page, "environment"))


def test_commands_and_commit_are_there(page):
    commands = text_of(section(page, "commands"))
    assert "pdrelay serve tiny --prefill 1 --decode 1" in commands
    assert "0123abc" in commands


def test_summary_file_holds_what_is_rendered(built):
    summary = msgspec.json.decode(built.summary_file.read_bytes(), type=Summary)
    assert render(summary) == built.report.read_text(encoding="utf-8")


def test_rebuilding_changes_nothing(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built.report.parent, copy)
    for name in ("report.html", "summary.json", "trace.json"):
        (copy / name).unlink()
    build_report(copy)
    for name in ("report.html", "summary.json", "trace.json"):
        assert (copy / name).read_bytes() == (built.report.parent / name).read_bytes()


def test_small_samples_show_their_range_and_no_percentile(built):
    rows = [row for row in built.summary.ttft if row.input_len == 8192]
    assert len(rows) == 8
    for row in rows:
        assert row.ttft.value is None
        assert row.ttft.note == "n=3<11"
        assert len(row.samples) == 3
    assert all(not row.samples for row in built.summary.ttft if row.input_len < 8192)


def test_medians_are_those_of_the_raw_records(built):
    run = read_run(built.report.parent)
    for row in built.summary.ttft:
        (case,) = [c for c in run.select("ttft", row.topology) if c.info.case == row.condition]
        times = [
            (record.first_token_ns - record.intended_ns) / 1e6
            for record in case.records
            if record.tag == f"probe-{row.input_len}"
        ]
        if row.ttft.known:
            assert row.ttft.value == pytest.approx(statistics.median(times))


def test_phases_add_up_to_ttft(built):
    run = read_run(built.report.parent)
    checked = 0
    for case in run.cases:
        for request in joined(run, case):
            phases = phases_of(request)
            parts = (phases.route, phases.wait, phases.prefill, phases.transfer, phases.return_)
            assert min(parts) >= 0
            assert sum(parts) == pytest.approx(request.client.ttft_ms)
            checked += 1
    assert checked > 500
    for row in built.summary.phases:
        assert (row.hidden_transfer is None) == (row.topology != "pd-1-1")
        assert row.transfer == 0  # the producer makes the first token


def test_a_hand_over_is_exposed_where_the_consumer_makes_the_first_token(built):
    run = read_run(built.report.parent)
    case = run.select("ttft", "pd-1-1")[0]
    request = next(iter(joined(run, case)))
    event = request.first(EventKind.FIRST_TOKEN)
    before = phases_of(request)
    event.instance = "decode-0"
    after = phases_of(request)
    assert before.transfer == 0
    assert after.transfer == pytest.approx(before.hidden_transfer)
    assert after.hidden_transfer == pytest.approx(0)


def test_hand_over_is_what_the_second_token_waits(built):
    """The model delays P/D's second token by 0.8 ms and the transfer's 0.4 ms tail."""
    for row in built.summary.ttft:
        if row.input_len == 512:
            expected = 1.2 if row.topology == "pd-1-1" else 0.0
            assert row.hand_over.value == pytest.approx(expected, abs=0.15)


def test_transfers_are_described_and_right(built):
    rows = built.summary.transfers
    assert {row.topology for row in rows} == {"pd-1-1"}
    assert sum(row.bytes_wrong for row in rows) == 0
    (row,) = [r for r in rows if (r.experiment, r.input_len) == ("ttft", "2048")]
    assert row.num_bytes == 2048 // 16 * LAYOUT.block_bytes
    assert row.gb_per_s == pytest.approx(6.0, rel=1e-3)
    assert 0.9 < row.overlap < 1.0
    assert row.tail_ms == pytest.approx(0.4, rel=0.2)


def test_wrong_bytes_are_an_error_in_red(tmp_path):
    write_run(tmp_path, wrong_bytes=True, topologies="pd:1:1,replicas:2")
    summary = build_report(tmp_path).summary
    errors = [flag for flag in summary.flags if flag.code == "bytes_moved"]
    assert errors
    assert {(flag.severity, flag.topology) for flag in errors} == {("error", "pd-1-1")}
    page = parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    badges = [
        element.text
        for element in section(page, "transfers").iter("span")
        if element.get("class") == "flag error"
    ]
    assert badges
    assert all("wrong" in text for text in badges)
    assert any(s.rule == "validity" for s in summary.verdict.sentences)


def test_repeats_give_t_intervals(tmp_path):
    write_run(tmp_path, repeats=5, topologies="replicas:2,pd:1:1")
    summary = summarize(read_run(tmp_path))
    row = next(row for row in summary.ttft if row.input_len == 512)
    assert row.ttft.method == "t over 5 repeats"
    assert row.ttft.n == 60
    assert all("paired" in r.ratio.method for r in summary.ratios if r.input_len == 512)
    assert all("5 repeats" in r.goodput.method for r in summary.traffic)


def test_failed_requests_count_against_goodput_and_sustained(tmp_path):
    write_run(tmp_path, topologies="replicas:2,pd:1:1")
    before = summarize(read_run(tmp_path)).traffic
    run = read_run(tmp_path)
    for case in run.select("traffic", "replicas-2"):
        for record in case.records[::4]:
            record.status, record.error = "failed", "HTTP 503: gone"
    after = summarize(run).traffic
    for old, new in zip(before, after, strict=True):
        if new.topology != "replicas-2":
            continue
        assert new.num_failed == 10 or new.kind != "poisson"
        assert new.attainment.value < old.attainment.value
        assert new.goodput.value < old.goodput.value
        assert not new.sustained


def test_a_run_without_some_experiments_still_reports(tmp_path):
    write_run(tmp_path, topologies="replicas:2,pd:1:1")
    shutil.rmtree(tmp_path / "experiments" / "traffic")
    shutil.rmtree(tmp_path / "experiments" / "ttft" / "pd-1-1")
    built = build_report(tmp_path)
    parse(built.report.read_text(encoding="utf-8"))
    assert built.summary.traffic == []
    missing = {(f.experiment, f.topology) for f in built.summary.flags if f.code == "not_run"}
    assert missing == {
        ("traffic", "replicas-2"), ("traffic", "pd-1-1"), ("ttft", "pd-1-1")
    }  # fmt: skip


def test_a_run_cut_short_before_any_case_still_reports(tmp_path):
    write_run(tmp_path, topologies="replicas:2,pd:1:1")
    shutil.rmtree(tmp_path / "experiments")
    shutil.rmtree(tmp_path / "topologies")
    built = build_report(tmp_path)
    parse(built.report.read_text(encoding="utf-8"))
    assert built.summary.verdict.decision == "no-evidence"


def test_terminal_tables_show_the_same_figures(built):
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(built.summary, console)
    printed = console.export_text()
    assert built.summary.verdict.headline in printed
    for title in ("1 TTFT", "2 traffic", "3 interference", "4 shapes"):
        assert title in printed
    assert "[/" not in printed
    assert "n=3<11" in printed


def test_tokens_read_at_once_are_flagged(tmp_path):
    write_run(tmp_path, topologies="replicas:2,pd:1:1")
    run = read_run(tmp_path)
    case = run.select("shapes", "pd-1-1")[0]
    for record in case.records:
        record.chunk_ns = [t for t in record.chunk_ns[::2] for _ in range(2)]
    (flag,) = summarize(run).flags
    assert (flag.code, flag.case) == ("merged_reads", case.info.case)


def test_what_kernels_stored_has_no_copy_rate(built):
    run = read_run(built.report.parent)
    case = run.select("ttft", "pd-1-1")[0]
    transfer = transfer_of(run, next(iter(joined(run, case))))
    assert transfer.was_copied
    assert not replace(transfer, busy_ns=137).was_copied
