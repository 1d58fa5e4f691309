"""Flags on every case: what voids its figures or qualifies them."""

from __future__ import annotations

from collections.abc import Iterator

from pdrelay.bench.validity import check_run
from pdrelay.lab.report.figures import CaseFlag, Severity
from pdrelay.lab.report.joined import joined
from pdrelay.lab.report.traffic import completed_rate, is_sustained
from pdrelay.lab.report.transfers import transfer_of
from pdrelay.lab.rundir import EXPERIMENTS, Case, Run

# More than this many cores busy with other work, on average over a case, shows in its latencies.
MAX_FOREIGN_CORES = 0.1
# A larger share of gaps without length, and the median of the others is no longer the ITL's.
MAX_MERGED_SHARE = 0.02


def case_flags(run: Run) -> list[CaseFlag]:
    """All flags, by experiment, topology and case; notes of the run last."""
    flags = []
    for experiment in EXPERIMENTS:
        for name in run.topologies:
            for case in run.select(experiment, name):
                flags += [
                    *_client_flags(case),
                    *_load_flags(case),
                    *_host_flags(case),
                    *_gap_flags(case),
                    *_record_flags(run, case),
                ]
            if not run.select(experiment, name) and experiment in run.info.experiments:
                flags.append(_missing(name, experiment))
    return flags


def _flag(case: Case, code: str, severity: Severity, message: str) -> CaseFlag:
    info = case.info
    return CaseFlag(
        topology=info.topology,
        experiment=info.experiment,
        case=info.case,
        rep=info.rep,
        code=code,
        severity=severity,
        message=message,
    )


def _client_flags(case: Case) -> Iterator[CaseFlag]:
    """Send lag, failures, short outputs, coalesced chunks, cached prompts: bench's rules."""
    verdict = check_run(case.measured, sharing_expected=not case.info.distinct_prompts)
    for flag in verdict.flags:
        yield _flag(case, flag.code, flag.severity, flag.message)
    failed = [record for record in case.streams if record.status == "failed"]
    if failed:
        yield _flag(
            case,
            "stream_failures",
            "error",
            f"{len(failed)} background streams failed, the load was lighter than stated: "
            f"{failed[0].error[:160]}",
        )


def _load_flags(case: Case) -> Iterator[CaseFlag]:
    if case.info.experiment != "traffic" or is_sustained(case):
        return
    yield _flag(
        case,
        "not_sustained",
        "warning",
        f"completed {completed_rate(case):.2f} of {case.info.rate or 0:.2f} req/s offered: past "
        "saturation, latencies depend on how long it is offered",
    )


def _gap_flags(case: Case) -> Iterator[CaseFlag]:
    """Tokens that the client took from its socket in one read have no gap between them."""
    gaps = [gap for record in case.records for gap in record.itls_ms]
    merged = sum(gap == 0 for gap in gaps)
    if merged > MAX_MERGED_SHARE * len(gaps):
        yield _flag(
            case,
            "merged_reads",
            "warning",
            f"{merged / len(gaps):.0%} of the ITL gaps are 0: the client or the front door was "
            "late and took several tokens at once, so low percentiles of ITL are too low; free a "
            "core for the client",
        )


def _host_flags(case: Case) -> Iterator[CaseFlag]:
    foreign = case.info.foreign_cores
    if foreign is not None and foreign > MAX_FOREIGN_CORES:
        yield _flag(
            case,
            "busy_host",
            "warning",
            f"other processes kept {foreign:.2f} cores busy meanwhile: latencies hold their noise; "
            "run again on a quiet host",
        )


def _record_flags(run: Run, case: Case) -> Iterator[CaseFlag]:
    """Whether the server's records are there, and the bytes-moved check."""
    requests = list(joined(run, case))
    complete = sum(record.ok for record in case.measured)
    if complete and len(requests) < complete:
        yield _flag(
            case,
            "events_missing",
            "warning",
            f"the server recorded {len(requests)} of {complete} complete requests: phases and "
            "transfers are of those only",
        )
    transfers = [transfer for request in requests if (transfer := transfer_of(run, request))]
    wrong = [transfer for transfer in transfers if transfer.check == "wrong"]
    if wrong:
        yield _flag(
            case,
            "bytes_moved",
            "error",
            f"{len(wrong)} of {len(transfers)} hand-overs moved another number of bytes than their "
            f"prompts need: {wrong[0].num_bytes:,} instead of {wrong[0].expected_bytes:,}",
        )


def _missing(topology: str, experiment: str) -> CaseFlag:
    return CaseFlag(
        topology=topology,
        experiment=experiment,
        case="",
        rep=0,
        code="not_run",
        severity="warning",
        message="nothing was measured",
    )
