"""From a run of `pdrelay kv` in memory to its figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from pdrelay.lab.kv.config import GPU, LINKS
from pdrelay.lab.kv.exercise import ABOUT_MODEL, BYTES_A_TOKEN, LARGE_MODEL
from pdrelay.lab.kv.figures import (
    BytesFigures,
    CopyRow,
    KvSummary,
    LinkFigures,
    PredictedPoint,
    TransferRow,
)
from pdrelay.lab.kv.model import Compute, Link, Roofline, kv_bytes
from pdrelay.lab.kv.rundir import KvRun, KvRunInfo, SampleRecord
from pdrelay.lab.kv.serve_figures import serve_rows
from pdrelay.lab.kv.side_by_side_figures import side_by_side_rows
from pdrelay.lab.stats import Estimate, missing, percentile_estimate
from pdrelay.model.config import BUILT_IN, ModelConfig

PREDICTED_LENGTHS = (128, 512, 2048, 8192, 32_768, 131_072)
Value = Callable[[SampleRecord], float]


def summarize_kv(run: KvRun) -> KvSummary:
    """Every figure of the report."""
    info = run.info
    kv = kv_bytes(info.shape, info.dtype, info.tp)
    copies = copy_rows(run.samples)
    transfers = transfer_rows(run.samples, info.config.get("transports", ()))
    known = [row.gb_per_s.value for row in copies if row.gb_per_s.value is not None]
    return KvSummary(
        run=info,
        environment=run.environment,
        kv=BytesFigures(
            per_token=kv.per_token,
            per_token_rank=kv.per_token_rank,
            arithmetic=kv.arithmetic,
            remark=BYTES_A_TOKEN if info.model == ABOUT_MODEL else "",
        ),
        copies=copies,
        peak_gb_per_s=max(known, default=None),
        transfers=transfers,
        side_by_side=side_by_side_rows(run.pairs),
        predictions=predictions(info, transfers),
        serve=serve_rows(run.serve) if run.serve else [],
        serve_notes=run.serve.info.notes if run.serve else [],
    )


# ---- measured


def wall_ms(sample: SampleRecord) -> float:
    return (sample.landed_ns - sample.start_ns) / 1e6


def _busy_ms(sample: SampleRecord) -> float:
    return sample.busy_ns / 1e6


def _gb_per_s(sample: SampleRecord) -> float:
    return sample.num_bytes / (sample.landed_ns - sample.start_ns)


def _exposed_ms(sample: SampleRecord) -> float:
    return (sample.landed_ns - sample.computed_ns) / 1e6


def _computed_ms(sample: SampleRecord) -> float:
    return (sample.computed_ns - sample.start_ns) / 1e6


def _estimate(samples: Sequence[SampleRecord], value: Value) -> Estimate:
    """Median; the samples of one run are one repeat each way of the pages."""
    return percentile_estimate([[value(sample) for sample in samples]])


def copy_rows(samples: Sequence[SampleRecord]) -> list[CopyRow]:
    """By length; page sizes pooled, as a plain copy has none."""
    rows = []
    copies = [sample for sample in samples if sample.mode == "copy"]
    for tokens in sorted({sample.tokens for sample in copies}):
        own = [sample for sample in copies if sample.tokens == tokens]
        rows.append(
            CopyRow(
                tokens=tokens,
                num_bytes=round(statistics.median(sample.num_bytes for sample in own)),
                time=_estimate(own, wall_ms),
                gb_per_s=_estimate(own, _gb_per_s),
            )
        )
    return rows


def transfer_rows(samples: Sequence[SampleRecord], order: Sequence[str]) -> list[TransferRow]:
    """By transport (in `order`), placement, page size, and length."""
    groups: dict[tuple[str, str, int, int], list[SampleRecord]] = {}
    for sample in samples:
        if sample.mode in ("bulk", "layerwise"):
            key = (sample.transport, sample.placement, sample.block_size, sample.tokens)
            groups.setdefault(key, []).append(sample)
    alone = _Alone(samples)
    place = {name: index for index, name in enumerate(order)}
    keys = sorted(groups, key=lambda key: (place.get(key[0], len(place)), key))
    return [_transfer_row(key, groups[key], alone) for key in keys]


class _Alone:
    """Plain copies and computation without a transfer, by page size and length."""

    def __init__(self, samples: Iterable[SampleRecord]) -> None:
        self._groups: dict[tuple[str, int, int], list[SampleRecord]] = {}
        for sample in samples:
            key = (sample.mode, sample.block_size, sample.tokens)
            self._groups.setdefault(key, []).append(sample)

    def of(self, mode: str, block_size: int, tokens: int) -> list[SampleRecord]:
        return self._groups.get((mode, block_size, tokens), [])


def _transfer_row(
    key: tuple[str, str, int, int], samples: list[SampleRecord], alone: _Alone
) -> TransferRow:
    transport, placement, block_size, tokens = key
    bulk = [sample for sample in samples if sample.mode == "bulk"]
    layerwise = [sample for sample in samples if sample.mode == "layerwise"]
    copies = alone.of("copy", block_size, tokens)
    computed = {s.rep: _computed_ms(s) for s in alone.of("compute", block_size, tokens)}
    base = statistics.median(computed.values()) if computed else None
    return TransferRow(
        transport=transport,
        placement=placement,
        block_size=block_size,
        tokens=tokens,
        num_bytes=round(statistics.median(sample.num_bytes for sample in samples)),
        num_pieces=statistics.median(sample.num_pieces for sample in samples),
        bulk=_estimate(bulk, wall_ms),
        busy=_estimate(bulk, _busy_ms),
        gb_per_s=_estimate(bulk, _gb_per_s),
        copy_share=_copy_share(copies, bulk),
        exposed=_estimate(layerwise, _exposed_ms),
        added=missing("no computation alone")
        if base is None
        else percentile_estimate([[_computed_ms(s) - base for s in layerwise]]),
        slowed=percentile_estimate(
            [[_computed_ms(s) / computed[s.rep] for s in layerwise if s.rep in computed]]
        ),
    )


def _copy_share(copies: Sequence[SampleRecord], bulk: Sequence[SampleRecord]) -> Estimate:
    """Median of the repeats' ratios: both were measured in turn, so drift cancels."""
    by_rep = {sample.rep: wall_ms(sample) for sample in copies}
    ratios = [by_rep[sample.rep] / wall_ms(sample) for sample in bulk if sample.rep in by_rep]
    return percentile_estimate([ratios])


# ---- predicted


def predictions(info: KvRunInfo, transfers: Sequence[TransferRow]) -> list[LinkFigures]:
    """The model on the assumed links; on the measured ones with the measured rate.

    The exercise also asks for 70B at TP=4: its model brings it along.
    """
    compute, links = _assumed(info)
    rows = [_predicted(info, info.model, info.shape, info.tp, compute, link) for link in links]
    if info.model == ABOUT_MODEL:
        name, tp = LARGE_MODEL
        rows += [_predicted(info, name, BUILT_IN[name], tp, compute, link) for link in links]
    if info.measured_flops_per_s:
        here = Compute(
            "this machine",
            info.measured_flops_per_s,
            float("inf"),
            f"measured in this run: {info.measured_how}; the floor of reading weights left out",
        )
        rows += [
            _predicted(info, info.model, info.shape, info.tp, here, link)
            for link in _measured_links(transfers)
        ]
    return rows


def _assumed(info: KvRunInfo) -> tuple[Compute, list[Link]]:
    """As the configuration of the run had them."""
    compute, links = info.config.get("compute"), info.config.get("links")
    if not isinstance(compute, dict) or not isinstance(links, list):
        return GPU, list(LINKS)
    return Compute(**compute), [Link(**link) for link in links]


def _measured_links(transfers: Sequence[TransferRow]) -> list[Link]:
    """Each transport at the best median of its whole-prompt transfers."""
    best: dict[str, float] = {}
    for row in transfers:
        if row.gb_per_s.value is not None:
            best[row.transport] = max(best.get(row.transport, 0.0), row.gb_per_s.value)
    return [
        Link(name, rate * 1e9, True, "measured in this run: best median of whole prompts")
        for name, rate in best.items()
    ]


def _predicted(
    info: KvRunInfo, name: str, shape: ModelConfig, tp: int, compute: Compute, link: Link
) -> LinkFigures:
    model = Roofline(shape, info.dtype, tp, compute, link)
    bulk, layerwise = model.crossover(), model.layerwise_crossover()
    lengths = sorted({*PREDICTED_LENGTHS, *info.config.get("lengths", ())})
    return LinkFigures(
        model=name,
        tp=tp,
        compute=compute.name,
        compute_source=compute.source,
        link=link.name,
        link_source=link.source,
        link_gb_per_s=link.bytes_per_s / 1e9,
        shared=not link.per_rank,
        points=[
            PredictedPoint(
                tokens=tokens,
                num_bytes=model.transfer_bytes(tokens),
                prefill=model.prefill_s(tokens) * 1e3,
                bulk=model.transfer_s(tokens) * 1e3,
                exposed=model.exposed_s(tokens) * 1e3,
                kv_gb_per_s=model.kv_production(tokens) / 1e9,
            )
            for tokens in lengths
        ],
        bulk_above=bulk.above,
        bulk_below=bulk.below,
        layerwise_above=layerwise.above,
        layerwise_below=layerwise.below,
    )
