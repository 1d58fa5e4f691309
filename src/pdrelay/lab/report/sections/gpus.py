"""The report's section on GPUs, drawn from the summary alone."""

from __future__ import annotations

from pdrelay.lab import fmt, plots
from pdrelay.lab.blocks import empty, note, plot_row
from pdrelay.lab.html import Markup, el, join
from pdrelay.lab.report import columns
from pdrelay.lab.report.figures import GpuRow, GpuTrack, Summary
from pdrelay.lab.report.sections.common import EXPERIMENT_TITLES
from pdrelay.lab.table import page_table


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
            page_table(columns.gpus(summary), headline(gpu.rows)),
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
