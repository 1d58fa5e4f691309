"""The report's section on GPUs, drawn from the summary alone."""

from __future__ import annotations

from pdrelay.lab import fmt, plots
from pdrelay.lab.blocks import empty, note, plot_row
from pdrelay.lab.html import Markup, el, join, table
from pdrelay.lab.report.figures import GpuRow, GpuTrack, Summary
from pdrelay.lab.report.sections.common import EXPERIMENT_TITLES


def gpu_section(summary: Summary) -> Markup:
    """A table and curves over time, or one line that says why there are none."""
    gpu = summary.gpu
    if not gpu.rows:
        reason = "; ".join(gpu.missing) or "this run has no samples"
        return empty(f"No GPU was sampled: {reason}.")
    return join(
        [
            note(
                "NVML's GPM counters, averaged over each sample's 100 ms. Means over the "
                "experiment's traffic, idle gaps included; “at work” takes only samples in which "
                "the instance prefilled or decoded throughout. Instances have their GPUs "
                + "; ".join(gpu.assignment)
                + "."
            ),
            plot_row(*_charts(summary)),
            _table(summary),
            el("ul", *(el("li", text) for text in _devices(summary))),
        ]
    )


def _devices(summary: Summary) -> list[str]:
    lines = []
    for info in summary.gpu.gpus:
        peak = "unknown" if info.peak_bytes_per_s is None else f"{info.peak_bytes_per_s / 1e12:.2f}"
        counters = "" if info.gpm else "; no GPM counters, so plain utilisation only"
        lines.append(
            f"GPU {info.index}: {info.name}, {fmt.num_bytes(info.memory_bytes)}, DRAM peak {peak} "
            f"TB/s (bus width × 2 × highest memory clock){counters}"
        )
    return lines


def _charts(summary: Summary) -> list[Markup]:
    by_topology: dict[str, list[GpuTrack]] = {}
    for track in summary.gpu.tracks:
        by_topology.setdefault(track.topology, []).append(track)
    return [
        plots.time_chart(
            f"{summary.label(name)}, {tracks[0].case}: SMs busy (solid), DRAM bandwidth (dashed)",
            [
                curve
                for index, track in enumerate(tracks)
                for curve in _curves(track, index)
                if curve.points
            ],
            y_label="share of peak",
        )
        for name, tracks in by_topology.items()
    ]


def _curves(track: GpuTrack, index: int) -> list[plots.Curve]:
    name = f"{track.instance}, GPU {track.gpu}"
    sms = [(at, sm) for at, sm, _ in track.points if sm is not None]
    dram = [(at, share) for at, _, share in track.points if share is not None]
    return [
        plots.Curve(name, index, sms),
        plots.Curve(f"{name}, DRAM", index, dram, dashed=True),
    ]


def _table(summary: Summary) -> Markup:
    head = ["topology", "experiment", "instance", "GPU", "n", "SMs busy", "tensor cores"]
    head += ["DRAM, TB/s", "of peak", "most", "NVLink out / in, GB/s", "plain utilisation"]
    head += ["memory, GB", "power, W", "n at work", "SMs at work", "DRAM at work, TB/s", "of peak"]
    rows = [
        [
            summary.label(row.topology),
            EXPERIMENT_TITLES.get(row.experiment, row.experiment),
            row.instance,
            ", ".join(map(str, row.gpus)),
            row.n,
            fmt.percent(row.sm),
            fmt.percent(row.tensor),
            fmt.number(row.dram_tb_per_s),
            fmt.percent(row.dram),
            fmt.number(row.dram_tb_per_s_max),
            f"{fmt.number(row.nvlink_tx_gb_per_s)} / {fmt.number(row.nvlink_rx_gb_per_s)}",
            fmt.percent(row.utilization),
            fmt.number(row.memory_gb),
            fmt.number(row.power_w),
            row.working_n,
            fmt.percent(row.working_sm),
            fmt.number(row.working_dram_tb_per_s),
            fmt.percent(row.working_dram),
        ]
        for row in summary.gpu.rows
    ]
    return table(head, rows, text_columns=4, caption=headline(summary.gpu.rows))


def headline(rows: list[GpuRow]) -> str:
    """Two of the exercise's six metrics, where there is a P/D topology."""
    words = []
    for row in rows:
        where = EXPERIMENT_TITLES.get(row.experiment, row.experiment)
        if row.instance.startswith("prefill") and row.sm is not None:
            words.append(f"P GPU utilisation in {where}: {row.sm:.0%}")
        if row.instance.startswith("decode") and row.dram_tb_per_s is not None:
            at_work = row.working_dram_tb_per_s
            more = "" if at_work is None else f" ({at_work:.2f} while it decodes)"
            words.append(f"D GPU memory bandwidth in {where}: {row.dram_tb_per_s:.2f} TB/s{more}")
    return "; ".join(words)
