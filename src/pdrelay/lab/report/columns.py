"""The tables that the page and the terminal both show. All times are in ms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdrelay.lab import fmt
from pdrelay.lab.report.figures import (
    GpuRow,
    InterferenceRow,
    Percentiles,
    QueueRow,
    ShapeRow,
    StreamsRow,
    Summary,
    TrafficRow,
)
from pdrelay.lab.report.sections.common import EXPERIMENT_TITLES
from pdrelay.lab.stats import Estimate
from pdrelay.lab.table import Column, Row, Table


def traffic(summary: Summary, rows: Sequence[TrafficRow]) -> Table[TrafficRow]:
    """Of some of the summary's loads; the page has a table a workload."""
    return Table(
        (
            Column("topology", lambda row: summary.label(row.topology), text=True),
            Column("case", lambda row: row.case, text=True, only="terminal"),
            Column("req/s", lambda row: fmt.number(row.rate)),
            Column("n", _requests, only="page"),
            Column("TTFT p50, ms", lambda row: fmt.estimate(row.ttft)),
            Column("TTFT p90", lambda row: fmt.known(row.ttft_p90), only="page"),
            _p99("TTFT p99", lambda row: row.ttft_p99),
            Column("ITL p50, ms", lambda r: fmt.estimate(r.itl), brief=lambda r: fmt.value(r.itl)),
            _p99("ITL p99", lambda row: row.itl_p99),
            Column("TPOT p50", lambda row: fmt.estimate(row.tpot), only="page"),
            Column("within SLO", lambda row: fmt.share(row.attainment)),
            Column(f"goodput, req/s/{summary.unit}", lambda row: fmt.estimate(row.goodput)),
            Column("completed, req/s", lambda row: fmt.estimate(row.completed_rate), only="page"),
            Column("tok/s", lambda row: fmt.estimate(row.output_rate), only="page"),
            Column("sustained", lambda row: "yes" if row.sustained else "no"),
        ),
        rows,
    )


def _requests(row: TrafficRow) -> str:
    return f"{row.num_requests}" + (f" ({row.num_failed} failed)" if row.num_failed else "")


def queues(summary: Summary) -> Table[QueueRow]:
    """The fixed load beside its prediction."""
    return Table(
        (
            Column("topology", lambda row: summary.label(row.topology), text=True),
            Column("queue", lambda row: row.model, text=True),
            Column("service, ms", lambda r: f"{fmt.number(r.service_ms)} ({r.service_source})"),
            Column("utilisation", lambda row: f"{row.utilisation:.0%}"),
            Column("idle TTFT p50", lambda row: fmt.estimate(row.idle_ttft)),
            Column("mean wait", _mean_wait),
            Column("predicted p50 / p90 / p99", lambda row: _percentiles(row.steady)),
            Column("this run's arrivals", lambda row: _percentiles(row.replayed)),
            Column("measured p50", lambda row: fmt.estimate(row.ttft)),
            Column("p90", lambda row: fmt.known(row.ttft_p90)),
            Column("p99", lambda row: fmt.known(row.ttft_p99)),
        ),
        summary.queues,
    )


def _mean_wait(row: QueueRow) -> str:
    return "grows" if row.mean_wait_ms is None else fmt.number(row.mean_wait_ms)


def _percentiles(found: Percentiles) -> str:
    values = (found.p50, found.p90, found.p99)
    if None in values:
        return fmt.NONE
    return " / ".join(map(fmt.number, values))


def interference(summary: Summary) -> Table[InterferenceRow]:
    """ITL of the running streams."""
    return Table(
        (
            Column("topology", lambda row: summary.label(row.topology), text=True),
            Column("quiet gaps", lambda row: str(row.quiet.n), only="page"),
            Column("quiet p50, ms", lambda row: fmt.estimate(row.quiet.p50)),
            Column("quiet p99", lambda row: fmt.known(row.quiet.p99), only="page"),
            Column("busy gaps", lambda row: str(row.busy.n), only="page"),
            Column("busy p50, ms", lambda row: fmt.estimate(row.busy.p50)),
            Column("busy p99", lambda row: fmt.known(row.busy.p99)),
            Column("worst gap", lambda row: fmt.number(row.busy.worst)),
            Column("busy p99 / quiet p50", _factor),
            Column("stalled time", lambda row: fmt.share(row.stalled)),
            Column("period p99", lambda row: fmt.known(row.period.p99), only="page"),
            Column("long prompt's TTFT p50", lambda row: fmt.estimate(row.long_ttft)),
        ),
        summary.interference,
    )


def _factor(row: InterferenceRow) -> str:
    least = "" if row.factor_percentile in (99.0, None) else "≥ "
    return f"{least}{fmt.number(row.factor)}×" if row.factor else fmt.NONE


def shapes(summary: Summary) -> Table[ShapeRow]:
    """Topologies side by side within a shape."""
    cases = list(dict.fromkeys(row.case for row in summary.shapes))
    return Table(
        (
            Column("shape (in/out)", lambda row: f"{row.case} ({_lengths(row)})", text=True),
            Column("topology", lambda row: summary.label(row.topology), text=True),
            Column("n", lambda row: str(row.ttft.n), only="page"),
            Column("req/s", lambda row: fmt.number(row.rate), only="page"),
            Column("TTFT p50, ms", lambda row: fmt.estimate(row.ttft)),
            Column("ITL p50", lambda row: fmt.estimate(row.itl)),
            Column("E2E p50", lambda row: fmt.estimate(row.e2e)),
            Column("tok/s", lambda row: fmt.estimate(row.output_rate)),
        ),
        sorted(summary.shapes, key=lambda row: cases.index(row.case)),
    )


def streams(summary: Summary) -> Table[StreamsRow]:
    """Many equal streams at once."""
    return Table(
        (
            Column("topology", lambda row: summary.label(row.topology), text=True),
            Column("streams", lambda row: str(row.num_streams)),
            Column("in/out", _lengths),
            Column("gaps", lambda row: str(row.itl.n), only="page"),
            Column("ITL p50, ms", lambda row: fmt.estimate(row.itl)),
            _p99("ITL p99", lambda row: row.itl_p99),
            Column("hand-over, ms", lambda row: fmt.estimate(row.hand_over)),
            Column("tok/s", lambda row: fmt.estimate(row.output_rate)),
            Column("TTFT p50, ms", lambda row: fmt.estimate(row.ttft), only="page"),
        ),
        summary.streams,
    )


def _lengths(row: ShapeRow | StreamsRow) -> str:
    return f"{row.input_len:,}/{row.output_len:,}"


def gpus(summary: Summary) -> Table[GpuRow]:
    """The terminal has what an instance does at work in brackets, the page in columns."""
    return Table(
        (
            Column("topology", lambda row: summary.label(row.topology), text=True),
            Column("experiment", _experiment, text=True),
            Column("instance", lambda row: row.instance, text=True),
            Column("GPU", lambda row: ", ".join(map(str, row.gpus)), text=True, only="page"),
            Column("n", lambda row: str(row.n), only="page"),
            Column("SMs busy", lambda row: fmt.percent(row.sm), brief=_sms),
            Column("tensor cores", lambda row: fmt.percent(row.tensor)),
            Column("DRAM, TB/s", lambda row: fmt.number(row.dram_tb_per_s), brief=_dram),
            Column("of peak", lambda row: fmt.percent(row.dram)),
            Column("most", lambda row: fmt.number(row.dram_tb_per_s_max), only="page"),
            Column("NVLink out / in, GB/s", _nvlink),
            Column("plain utilisation", lambda row: fmt.percent(row.utilization), only="page"),
            Column("memory, GB", lambda row: fmt.number(row.memory_gb)),
            Column("power, W", lambda row: fmt.number(row.power_w), only="page"),
            Column("n at work", lambda row: str(row.working_n), only="page"),
            Column("SMs at work", lambda row: fmt.percent(row.working_sm), only="page"),
            Column("DRAM at work, TB/s", _working_dram, only="page"),
            Column("of peak", lambda row: fmt.percent(row.working_dram), only="page"),
        ),
        summary.gpu.rows,
    )


def _experiment(row: GpuRow) -> str:
    return EXPERIMENT_TITLES.get(row.experiment, row.experiment)


def _sms(row: GpuRow) -> str:
    return f"{fmt.percent(row.sm)} ({fmt.percent(row.working_sm)})"


def _dram(row: GpuRow) -> str:
    return f"{fmt.number(row.dram_tb_per_s)} ({_working_dram(row)})"


def _working_dram(row: GpuRow) -> str:
    return fmt.number(row.working_dram_tb_per_s)


def _nvlink(row: GpuRow) -> str:
    return f"{fmt.number(row.nvlink_tx_gb_per_s)} / {fmt.number(row.nvlink_rx_gb_per_s)}"


def _p99(head: str, pick: Callable[[Row], Estimate]) -> Column[Row]:
    """Without its interval in the terminal."""
    return Column(head, lambda row: fmt.known(pick(row)), brief=lambda row: fmt.value(pick(row)))
