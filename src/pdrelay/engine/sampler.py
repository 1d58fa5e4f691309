"""From logits to tokens, in the order of vLLM's V1 sampler.

raw log-probabilities -> min_tokens, logit_bias -> penalties -> argmax for greedy rows ->
temperature -> min_p -> top_k, top_p -> draw. A draw uses one uniform number that is a hash of
(seed, output index): it depends on nothing else, neither on the batch nor on earlier draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdrelay.core.messages import TokenLogprobs, TopLogprob
from pdrelay.core.sampling_params import SamplingParams

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
    """One request at one step. `index` counts its output tokens so far."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    index: int


@dataclass(frozen=True)
class SampleResult:
    """One entry a row; `logprobs[i]` is None where row i asked for none."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SampleResult:
    """Choose one token for each row of `logits` [B, vocab], float32, which is left as it is."""
    assert logits.shape[0] == len(rows)
    if all(_is_plain_greedy(row) for row in rows):
        return SampleResult(logits.argmax(dim=-1).tolist(), [None] * len(rows))
    adjusted = _adjust(logits, rows)
    token_ids = adjusted.argmax(dim=-1).tolist()
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        chosen = adjusted if len(drawn) == len(rows) else adjusted[drawn]
        for i, token_id in zip(drawn, _draw(chosen, [rows[i] for i in drawn]), strict=True):
            token_ids[i] = token_id
    return SampleResult(token_ids, _logprobs_of_rows(logits, rows, token_ids))


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """Log-probability and rank of `token_ids[i]` in row i of `logits` [B, vocab], and of the
    `num_top` likeliest tokens.
    """
    if not token_ids:
        return []
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = ((logprobs > chosen).sum(dim=-1) + 1).tolist()
    top = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return [
        TokenLogprobs(
            token_id,
            logprob,
            rank,
            [TopLogprob(i, p, n) for n, (i, p) in enumerate(zip(ids, values, strict=True), 1)],
        )
        for token_id, logprob, rank, ids, values in zip(
            token_ids,
            chosen[:, 0].tolist(),
            ranks,
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
    ]


def uniform(seed: int, index: int) -> float:
    """A number in (0, 1) from a seed and an output index, by the mixer of SplitMix64
    (Steele, Lea & Flood, 2014).
    """
    return ((_mix(_mix(seed) + index) >> 32) + 0.5) / (1 << 32)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def is_host_choice(params: SamplingParams, index: int) -> bool:
    """Whether output token `index` needs more than raw logits, temperature, top_k, top_p, min_p."""
    return (
        params.logprobs is not None
        or bool(params.logit_bias)
        or index < params.min_tokens
        or has_penalties(params)
    )


def _is_plain_greedy(row: SamplingRow) -> bool:
    return row.params.greedy and not is_host_choice(row.params, row.index)


def has_penalties(params: SamplingParams) -> bool:
    return (
        params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.repetition_penalty != 1.0
    )


def _adjust(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Barred ids, biases and penalties, on a copy."""
    adjusted = logits.clone()
    vocab_size = logits.shape[1]
    for row, values in zip(rows, adjusted, strict=True):
        params = row.params
        if row.index < params.min_tokens:
            barred = _known((*params.eos_token_ids, *params.stop_token_ids), vocab_size)
            if barred:
                values[barred] = -torch.inf
        if params.logit_bias:
            ids = _known(tuple(params.logit_bias), vocab_size)
            values[ids] += torch.tensor([params.logit_bias[i] for i in ids], device=values.device)
        if has_penalties(params):
            _penalize(values, row)
    return adjusted


def _known(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    return [i for i in token_ids if 0 <= i < vocab_size]


def _penalize(values: torch.Tensor, row: SamplingRow) -> None:
    """Repetition counts the prompt too; frequency and presence count the output alone."""
    params, device = row.params, values.device
    output = torch.tensor(row.output_token_ids, dtype=torch.int64, device=device)
    if params.repetition_penalty != 1.0:
        prompt = torch.tensor(row.prompt_token_ids, dtype=torch.int64, device=device)
        seen = torch.cat((prompt, output)).unique()
        score, penalty = values[seen], params.repetition_penalty
        values[seen] = torch.where(score > 0, score / penalty, score * penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        counts = torch.bincount(output, minlength=values.shape[0])
        values -= params.frequency_penalty * counts
        values -= params.presence_penalty * (counts > 0)


def draw_columns(rows: Sequence[SamplingRow]) -> list[list[float]]:
    """What `draw` needs of the rows: temperature, top_k, top_p, min_p, point."""
    return [
        [row.params.temperature for row in rows],
        [float(row.params.top_k) for row in rows],
        [row.params.top_p for row in rows],
        [row.params.min_p for row in rows],
        [uniform(row.params.seed, row.index) for row in rows],
    ]


def draw(
    logits: torch.Tensor, columns: torch.Tensor, *, truncates: bool, has_min_p: bool
) -> torch.Tensor:
    """One token a row of `logits` float32 [B, vocab], by inverting the cumulative distribution;
    int64 [B]. `columns`: float64 [5, B] on the same device (see `draw_columns`). A row of
    temperature 0 gets its argmax. Nothing waits for the device.
    """
    temperature, top_k, top_p, min_p, point = columns[:, :, None]
    greedy = temperature == 0.0
    scaled = logits / temperature.masked_fill(greedy, 1.0).float()
    if has_min_p:
        probs = scaled.softmax(dim=-1)
        floor = probs.amax(dim=-1, keepdim=True) * min_p.float()
        scaled = scaled.masked_fill(probs < floor, -torch.inf)
    if truncates:
        scaled = _truncate(scaled, top_k, top_p.float())
    cumulative = scaled.double().softmax(dim=-1).cumsum(dim=-1)
    points = point * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, points, right=True)
    drawn = drawn.clamp_(max=logits.shape[1] - 1)
    return torch.where(greedy, logits.argmax(dim=-1, keepdim=True), drawn)[:, 0]


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    columns = torch.tensor(draw_columns(rows), dtype=torch.float64, device=logits.device)
    token_ids: list[int] = draw(
        logits,
        columns,
        truncates=any(row.params.top_k or row.params.top_p < 1.0 for row in rows),
        has_min_p=any(row.params.min_p for row in rows),
    ).tolist()
    return token_ids


def _truncate(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Bar all but the top_k likeliest tokens, then all but the fewest that hold top_p."""
    vocab_size = logits.shape[1]
    ascending, order = logits.sort(dim=-1)
    # top_k 0 keeps all.
    cut = torch.where(top_k > 0, (vocab_size - top_k).clamp(min=0), 0.0).long()
    ascending = ascending.masked_fill(ascending < ascending.gather(1, cut), -torch.inf)
    outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    outside &= top_p < 1.0
    outside[:, -1] = False
    ascending = ascending.masked_fill(outside, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ascending)


def _logprobs_of_rows(
    logits: torch.Tensor, rows: Sequence[SamplingRow], token_ids: list[int]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(rows)
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows)]
    wanted = [(i, num_top) for i, num_top in asked if num_top is not None]
    if not wanted:
        return result
    indices = [i for i, _ in wanted]
    most = max(num_top for _, num_top in wanted)
    entries = token_logprobs(logits[indices], [token_ids[i] for i in indices], most)
    for (i, num_top), entry in zip(wanted, entries, strict=True):
        result[i] = TokenLogprobs(entry.token_id, entry.logprob, entry.rank, entry.top[:num_top])
    return result
