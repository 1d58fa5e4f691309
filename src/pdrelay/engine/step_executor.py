"""Runs packed steps on one rank's device: upload, forward, sampling. Every rank runs the same.

All work goes to the device's current stream in launch order. So a step may read what the step
before it sampled (`sampled`), and the device copy of a step's inputs is overwritten only when the
step that reads them is over. The pinned host copies are the caller's: one must stay untouched
until its step is done.

Decode batches replay CUDA graphs at bucket sizes, and so do single short prompts
(`prefill_graphs.py`). Inputs lie at addresses fixed by the bucket; padding rows have length 0 and
slot -1. Block tables travel as wide as the step needs and are spread on the device into static ones
as wide as the longest request may need.

The gather of token ids is a kernel without PDL, behind the uploads, the tables and `decode_cut` and
in front of the forward pass: decode attention may read those before it waits (`triton/launch.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pdrelay.engine.accelerator import Accelerator
from pdrelay.engine.attention.context import DecodeSegment, ForwardContext, PrefillSegment
from pdrelay.engine.decode_buckets import bucket_of, decode_buckets
from pdrelay.engine.kernels.gpu import GpuKernels
from pdrelay.engine.models.registry import CausalLM
from pdrelay.engine.prefill_graphs import PrefillGraphs, StepBuffers
from pdrelay.engine.remote_store import RemoteStore
from pdrelay.engine.sampler import draw
from pdrelay.engine.step import LayerHook
from pdrelay.engine.step_input import DRAW_COLUMNS, StepHeader, max_words


@dataclass(frozen=True)
class StepLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int

    @property
    def table_width(self) -> int:
        """Blocks of the longest request."""
        return -(-self.max_model_len // self.block_size)

    @property
    def first_host_token(self) -> int:
        """Index of the step's first uploaded token id; sampled tokens lie before (aligned)."""
        return -(-self.max_num_seqs // 2) * 2

    @property
    def max_words(self) -> int:
        max_rows = max(self.max_num_batched_tokens, self.max_num_seqs)
        return max_words(max_rows, self.max_num_seqs, self.table_width)


@dataclass(frozen=True)
class _DecodeGraph:
    replay: Callable[[], None]
    results: list[torch.Tensor]  # one

    @property
    def logits(self) -> torch.Tensor:
        """[bucket, vocab], valid until the next graph."""
        return self.results[0]


class StepExecutor:
    def __init__(
        self,
        model: CausalLM,
        kv_pool: torch.Tensor,
        accelerator: Accelerator,
        limits: StepLimits,
    ) -> None:
        """`kv_pool`: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]."""
        assert model.backend.kernels is not None
        self._model = model
        self._kernels: GpuKernels = model.backend.kernels
        self._kv_pool = kv_pool
        self._accelerator = accelerator
        self._limits = limits
        self._num_kv_heads = kv_pool.shape[4]
        device, num_seqs = accelerator.device, limits.max_num_seqs
        # Sampled tokens, then the uploaded words, which begin with the host's token ids: one
        # gather serves both (`sources`).
        first = limits.first_host_token
        self._words = torch.zeros(first + limits.max_words, dtype=torch.int64, device=device)
        self.sampled = self._words[:num_seqs]
        self._uploaded = self._words[first:]
        self._tables = torch.zeros((num_seqs, limits.table_width), dtype=torch.int32, device=device)
        self.buckets = decode_buckets(num_seqs)
        self._graphs: dict[int, _DecodeGraph] = {}
        self.prefill_graphs = PrefillGraphs(
            model,
            kv_pool,
            accelerator,
            StepBuffers(self._words, self._uploaded, self.sampled, first),
            min(limits.max_num_batched_tokens, limits.max_model_len),
        )
        self.replays = True  # False: graph steps run eagerly, to compare with

    def bucket_of(self, num_decodes: int) -> int | None:
        bucket = bucket_of(self.buckets, num_decodes)
        return bucket if bucket in self._graphs else None

    @torch.inference_mode()
    def capture_prefill_graphs(self) -> None:
        self.prefill_graphs.capture_own()

    @torch.inference_mode()
    def capture_graphs(self, buckets: Sequence[int] | None = None) -> None:
        """Of all buckets unless named. Largest first: the smaller ones fit into its memory."""
        for bucket in sorted(self.buckets if buckets is None else buckets, reverse=True):
            self._load_padding(bucket)
            logits = self._decode(bucket)  # compiles, allocates, picks algorithms
            self._accelerator.synchronize()
            del logits
            captured: list[torch.Tensor] = []
            replay = self._accelerator.capture(partial(self._decode_into, bucket, captured))
            if not captured:  # a device without graphs
                self._decode_into(bucket, captured)
            self._graphs[bucket] = _DecodeGraph(replay, captured)

    @torch.inference_mode()
    def run(
        self,
        header: StepHeader,
        host_words: torch.Tensor,
        after_layer: LayerHook | None = None,
        remote_pool: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Queue the step. `sampled[i]` will be the token of sampled row i; where the host is to
        choose, returns the logits [num_logits or bucket, vocab] instead.
        """
        end = header.words().end
        self._uploaded[:end].copy_(host_words[:end], non_blocking=True)
        if header.is_graph:
            logits = self._run_graph(header, remote_pool)
            if after_layer is not None:
                # Every layer's writes are queued now, with the graph.
                for layer in range(self._kv_pool.shape[0]):
                    after_layer(layer)
            if header.greedy:
                return None  # the graph has chosen
        else:
            eager = self._eager(header, after_layer, remote_pool)
            if eager is None:
                return None
            logits = eager
        if header.greedy:
            self._kernels.argmax_rows(logits, self.sampled[: logits.shape[0]])
            return None
        if header.num_draws:
            self._draw(header, logits[: header.num_draws])
            return None
        return logits

    def _run_graph(self, header: StepHeader, remote_pool: torch.Tensor | None) -> torch.Tensor:
        if header.prefills:
            pool = remote_pool if header.has_remote else None
            return self.prefill_graphs.run(header.rows, pool, replays=self.replays)
        self._spread_tables(header)
        return self._run_decode(header.rows)

    # ---- decode graphs

    def _run_decode(self, bucket: int) -> torch.Tensor:
        if not self.replays:
            return self._decode(bucket)
        graph = self._graphs[bucket]
        graph.replay()
        return graph.logits

    def _load_padding(self, bucket: int) -> None:
        """Inputs of a step of padding rows alone."""
        header = _graph_header(bucket)
        at = header.words()
        self._uploaded[: at.end] = 0
        self._uploaded[at.slots : at.seq_lens] = -1
        self._uploaded[at.sources : at.positions] = self._limits.first_host_token

    def _decode(self, bucket: int) -> torch.Tensor:
        """Forward, logits and argmax of `bucket` rows, from and to static addresses."""
        at = _graph_header(bucket).words()
        seq_lens = self._uploaded[at.seq_lens : at.logits_rows].view(torch.int32)[:bucket]
        context = ForwardContext(
            kv_pool=self._kv_pool,
            slot_mapping=self._uploaded[at.slots : at.slots + bucket],
            decode=self._decode_of(bucket, self._tables[:bucket], seq_lens),
        )
        hidden = self._model.forward(
            self._words.index_select(0, self._uploaded[at.sources : at.sources + bucket]),
            self._uploaded[at.positions : at.positions + bucket],
            context,
        )
        logits = self._model.raw_logits(hidden)
        self._kernels.argmax_rows(logits, self.sampled[:bucket])
        return logits

    def _decode_into(self, bucket: int, results: list[torch.Tensor]) -> None:
        results[:] = [self._decode(bucket)]

    def _decode_of(
        self, bucket: int, tables: torch.Tensor, seq_lens: torch.Tensor
    ) -> DecodeSegment:
        """Rows of the flat batch from its first on, cut as the graph of `bucket` cuts them."""
        cut = self._kernels.decode_cut(
            seq_lens, bucket, self._num_kv_heads, self._limits.max_model_len
        )
        return DecodeSegment(0, tables, seq_lens, cut)

    def _spread_tables(self, header: StepHeader) -> None:
        count, width = header.num_decodes, header.table_width
        entries = self._entries(header)[: count * width]
        self._tables[:count, :width].copy_(entries.view(count, width))

    def _entries(self, header: StepHeader) -> torch.Tensor:
        at = header.words()
        return self._uploaded[at.tables : at.end].view(torch.int32)

    # ---- steps with prompts

    def _eager(
        self,
        header: StepHeader,
        after_layer: LayerHook | None,
        remote_pool: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Logits of the rows asked for, or None when there are none."""
        words, at, rows = self._uploaded, header.words(), header.rows
        remote = None
        if header.has_remote:
            assert remote_pool is not None
            remote = RemoteStore(remote_pool, words[at.remote : at.remote + rows])
        context = ForwardContext(
            kv_pool=self._kv_pool,
            slot_mapping=words[at.slots : at.slots + rows],
            prefills=[
                PrefillSegment(s.start, s.length, s.context_len, ()) for s in header.prefills
            ],
            decode=self._decode_segment(header),
            after_layer=after_layer,
            remote=remote,
            tables=self._prefill_tables(header),
        )
        hidden = self._model.forward(
            self._words.index_select(0, words[at.sources : at.sources + rows]),
            words[at.positions : at.positions + rows],
            context,
        )
        if header.num_logits == 0:
            return None
        if header.num_logits < hidden.shape[0]:
            hidden = hidden.index_select(
                0, words[at.logits_rows : at.logits_rows + header.num_logits]
            )
        return self._model.raw_logits(hidden)

    def _decode_segment(self, header: StepHeader) -> DecodeSegment | None:
        count, width = header.num_decodes, header.table_width
        if count == 0:
            return None
        at = header.words()
        # Split as the graph of this batch size splits: the same bits in a mixed step.
        bucket = bucket_of(self.buckets, count)
        assert bucket is not None
        tables = self._entries(header)[: count * width].view(count, width)
        seq_lens = self._uploaded[at.seq_lens : at.logits_rows].view(torch.int32)[:count]
        return self._decode_of(bucket, tables, seq_lens)

    def _prefill_tables(self, header: StepHeader) -> list[torch.Tensor]:
        entries = self._entries(header)
        return [
            entries[first : first + segment.table_len]
            for first, segment in zip(header.words().table_at, header.prefills, strict=True)
        ]

    # ---- sampling

    def _draw(self, header: StepHeader, logits: torch.Tensor) -> None:
        at = header.words()
        size = DRAW_COLUMNS * header.num_draws
        columns = self._uploaded[at.draws : at.draws + size].view(torch.float64)
        tokens = draw(
            logits.float(),
            columns.view(DRAW_COLUMNS, header.num_draws),
            truncates=header.truncates,
            has_min_p=header.has_min_p,
        )
        self.sampled[: header.num_draws].copy_(tokens)


def _graph_header(bucket: int) -> StepHeader:
    return StepHeader(
        rows=bucket,
        num_decodes=0,
        table_width=0,
        prefills=(),
        num_logits=0,
        is_graph=True,
        greedy=True,
        num_draws=0,
        truncates=False,
        has_min_p=False,
        has_remote=False,
    )
