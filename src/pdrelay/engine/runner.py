"""Runs a planned step on one rank: arrays in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pdrelay.core.messages import TokenLogprobs
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.engine.attention.context import DecodeSegment, ForwardContext, PrefillSegment
from pdrelay.engine.batch import BatchInput, build_batch, wants_prompt_logprobs
from pdrelay.engine.models.registry import CausalLM
from pdrelay.engine.sampler import SamplingRow, has_penalties, sample, token_logprobs
from pdrelay.engine.step import DoneStep, LayerHook, RemoteSlots, StepTokens


def _int64(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.int64).copy())


def forward(
    model: CausalLM, kv_pool: torch.Tensor, batch: BatchInput, after_layer: LayerHook | None
) -> torch.Tensor:
    """Run the batch on this rank. Returns logits `[len(logits_rows), vocab]`, float32.

    Every rank of an instance calls this with the same batch; collectives inside keep them in step.
    """
    decode = None
    if batch.num_decodes:
        seq_lens = np.frombuffer(batch.decode_seq_lens, dtype=np.int32).copy()
        tables = np.frombuffer(batch.decode_block_tables, dtype=np.int32).copy()
        decode = DecodeSegment(
            start=0,
            block_tables=torch.from_numpy(tables.reshape(batch.num_decodes, -1)),
            seq_lens=torch.from_numpy(seq_lens),
        )
    context = ForwardContext(
        kv_pool=kv_pool,
        slot_mapping=_int64(batch.slot_mapping),
        prefills=[
            PrefillSegment(s.start, s.length, s.context_len, s.block_table) for s in batch.prefills
        ],
        decode=decode,
        after_layer=after_layer,
    )
    hidden = model.forward(_int64(batch.token_ids), _int64(batch.positions), context)
    rows = batch.logits_rows
    if len(rows) < hidden.shape[0]:
        hidden = hidden[rows]
    return model.logits(hidden)


class ModelRunner:
    """Rank 0's synchronous runner.

    `broadcast` hands the batch to the other ranks before computing.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_pool: torch.Tensor,
        block_size: int,
        broadcast: Callable[[BatchInput], None] | None = None,
    ) -> None:
        self._model = model
        self._kv_pool = kv_pool
        self._block_size = block_size
        self._broadcast = broadcast

    @property
    def depth(self) -> int:
        return 1

    def fileno(self) -> int | None:
        return None

    def drain_news(self) -> None:
        pass

    @property
    def has_idle_work(self) -> bool:
        return False

    def do_idle_work(self) -> None:
        pass

    @torch.inference_mode()
    def launch(
        self, plan: StepPlan, after_layer: LayerHook | None, remote: RemoteSlots | None
    ) -> DoneStep:
        assert remote is None, "peers' pages are stored into by the transport here"
        batch = build_batch(plan, self._block_size)
        if self._broadcast is not None:
            self._broadcast(batch)
        logits = forward(self._model, self._kv_pool, batch, after_layer)
        return DoneStep(sample_on_host(plan, logits))


def sample_on_host(plan: StepPlan, logits: torch.Tensor) -> StepTokens:
    """Tokens and log-probabilities of a plan from its `logits` (rows as `build_batch` lists
    them, padding rows behind), float32; waits for them."""
    prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
    sampling_rows: list[int] = []
    row = 0
    for chunk in plan.chunks:
        if wants_prompt_logprobs(chunk):
            chunk_logits = logits[row : row + chunk.length]
            prompt_logprobs[chunk.request.request_id] = _of_prompt(chunk, chunk_logits)
            row += chunk.length
        elif chunk.samples:
            row += 1
        if chunk.samples:
            sampling_rows.append(row - 1)
    sampling = [chunk for chunk in plan.chunks if chunk.samples]
    if not sampling:
        return StepTokens([], [], prompt_logprobs)
    chosen = logits if len(sampling_rows) == logits.shape[0] else logits[sampling_rows]
    result = sample(chosen, [sampling_row(chunk) for chunk in sampling])
    return StepTokens(result.token_ids, result.logprobs, prompt_logprobs)


def sampling_row(chunk: Chunk) -> SamplingRow:
    request = chunk.request
    return SamplingRow(
        params=request.params,
        prompt_token_ids=request.source.prompt_token_ids,
        output_token_ids=request.output_token_ids if has_penalties(request.params) else (),
        index=output_index(chunk),
    )


def output_index(chunk: Chunk) -> int:
    """Output tokens before the one that a sampling chunk chooses, those in flight included."""
    return chunk.start + chunk.length - chunk.request.num_prompt_tokens


def _of_prompt(chunk: Chunk, logits: torch.Tensor) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens `start + 1 ..`: row i predicts token start + i + 1."""
    request = chunk.request
    stop = min(chunk.start + chunk.length + 1, request.num_prompt_tokens)
    targets = request.token_ids[chunk.start + 1 : stop].tolist()
    assert request.params.prompt_logprobs is not None
    return token_logprobs(logits[: len(targets)], targets, request.params.prompt_logprobs)
