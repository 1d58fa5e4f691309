"""The columns of `pdrelay kv`'s tables, the same on its page and in the terminal."""

from __future__ import annotations

from pdrelay.lab import fmt
from pdrelay.lab.kv.figures import ServeRow, SideBySideRow, TransferRow
from pdrelay.lab.table import Column

TRANSFERS: tuple[Column[TransferRow], ...] = (
    Column("transport", lambda row: row.transport, text=True),
    Column("pages", lambda row: str(row.block_size), text=True),
    Column("placement", lambda row: row.placement, text=True),
    Column("tokens", lambda row: fmt.tokens(row.tokens), only="page"),
    Column("bytes", lambda row: fmt.num_bytes(row.num_bytes), only="page"),
    Column("pieces", lambda row: fmt.number(row.num_pieces)),
    Column("a piece", lambda row: fmt.num_bytes(_piece_bytes(row))),
    Column("at once, ms", lambda row: fmt.estimate(row.bulk)),
    Column("busy, ms", lambda row: fmt.estimate(row.busy), only="page"),
    Column("GB/s", lambda row: fmt.estimate(row.gb_per_s)),
    Column("of a plain copy", lambda row: fmt.share(row.copy_share)),
    Column("layer by layer: left after, ms", lambda row: fmt.estimate(row.exposed), only="page"),
    Column("computation longer by, ms", lambda row: fmt.estimate(row.added)),
    Column("of it alone", lambda row: fmt.times(row.slowed)),
)

SIDE_BY_SIDE: tuple[Column[SideBySideRow], ...] = (
    Column("tokens", lambda row: fmt.tokens(row.tokens), text=True),
    Column("pairs", lambda row: str(row.prefill_ratio.n)),
    Column("prefill P/D, ms", lambda row: fmt.estimate(row.prefill)),
    Column("1 replica", lambda row: fmt.estimate(row.prefill_alone)),
    Column("ratio", lambda row: fmt.times(row.prefill_ratio)),
    Column("TTFT P/D, ms", lambda row: fmt.estimate(row.ttft)),
    Column("1 replica", lambda row: fmt.estimate(row.ttft_alone)),
    Column("ratio", lambda row: fmt.times(row.ttft_ratio)),
)

SERVE: tuple[Column[ServeRow], ...] = (
    Column("tokens", lambda row: fmt.tokens(row.tokens), text=True),
    Column("n", lambda row: f"{row.ttft.n} / {row.ttft_alone.n}", only="page"),
    Column("TTFT P/D, ms", lambda row: fmt.estimate(row.ttft)),
    Column("TTFT 1 replica", lambda row: fmt.estimate(row.ttft_alone)),
    Column("ratio", lambda row: fmt.times(row.ttft_ratio)),
    Column("prefill P/D, ms", lambda row: fmt.estimate(row.prefill)),
    Column("prefill 1 replica", lambda row: fmt.estimate(row.prefill_alone)),
    Column("ratio", lambda row: fmt.times(row.prefill_ratio)),
    Column("TTST − TTFT − ITL, P/D", lambda row: fmt.estimate(row.hand_over)),
    Column("the same, 1 replica", lambda row: fmt.estimate(row.hand_over_alone)),
    Column("transfer busy, ms", lambda row: fmt.estimate(row.transfer_busy)),
    Column("after prefill, ms", lambda row: fmt.estimate(row.transfer_tail)),
    Column("bytes", lambda row: fmt.num_bytes(row.num_bytes), only="page"),
    Column("pieces", lambda row: fmt.number(row.num_pieces), only="page"),
)


def _piece_bytes(row: TransferRow) -> float | None:
    return row.num_bytes / row.num_pieces if row.num_pieces else None
