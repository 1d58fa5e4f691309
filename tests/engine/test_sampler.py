"""The sampler against one written with Python numbers, and against statistics."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.core.sampling_params import SamplingParams
from pdrelay.engine.sampler import SamplingRow, sample, token_logprobs, uniform

torch.set_num_threads(1)
VOCAB = 23
EOS = 5


def row(index=0, prompt=(), output=(), **params):
    return SamplingRow(
        SamplingParams(**({"max_tokens": 8, "seed": 0} | params)), prompt, output, index
    )


def slow_distribution(logits, row):
    """Probabilities after every rule, one token at a time, in float64; {token: probability}."""
    p, scores = row.params, [float(x) for x in logits]
    if row.index < p.min_tokens:
        for token in (*p.eos_token_ids, *p.stop_token_ids):
            scores[token] = -math.inf
    for token, bias in p.logit_bias.items():
        scores[token] += bias
    output = Counter(row.output_token_ids)
    for token in range(len(scores)):
        if token in output or token in row.prompt_token_ids:
            scores[token] *= 1 / p.repetition_penalty if scores[token] > 0 else p.repetition_penalty
        scores[token] -= p.frequency_penalty * output[token]
        scores[token] -= p.presence_penalty * (output[token] > 0)
    if p.temperature == 0:
        return {max(range(len(scores)), key=lambda t: scores[t]): 1.0}
    kept = {t: s / p.temperature for t, s in enumerate(scores) if s > -math.inf}

    def normalized(scores):
        top = max(scores.values())
        weights = {t: math.exp(s - top) for t, s in scores.items()}
        return {t: w / sum(weights.values()) for t, w in weights.items()}

    probs = normalized(kept)
    floor = p.min_p * max(probs.values())
    kept = {t: s for t, s in kept.items() if probs[t] >= floor}
    by_score = sorted(kept, key=lambda t: -kept[t])
    kept = {t: kept[t] for t in by_score[: p.top_k or len(by_score)]}
    probs, mass, nucleus = normalized(kept), 0.0, {}
    for token in by_score[: len(kept)]:
        if mass >= p.top_p:
            break
        nucleus[token] = kept[token]
        mass += probs[token]
    return normalized(nucleus)


def slow_draw(distribution, u):
    mass = 0.0
    for token in sorted(distribution):
        mass += distribution[token]
        if u < mass:
            return token
    return max(distribution)


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 4, 50]),
        "top_p": st.sampled_from([1.0, 0.9, 0.37, 0.01]),
        "min_p": st.sampled_from([0.0, 0.1, 0.6]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "repetition_penalty": st.sampled_from([1.0, 1.4, 0.8]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
        "min_tokens": st.sampled_from([0, 3]),
        "eos_token_ids": st.just((EOS,)),
        "stop_token_ids": st.sampled_from([(), (7, 8)]),
        "seed": st.integers(-(2**63), 2**64),
    }
)
HISTORY = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(PARAMS, HISTORY, HISTORY, st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(0, 10_000),
)
def test_against_the_slow_sampler(specs, seed):
    logits = torch.randn(len(specs), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    rows = [row(i, prompt, output, **params) for params, prompt, output, i in specs]
    result = sample(logits, rows)
    assert torch.equal(logits, before)
    for values, r, token_id in zip(logits, rows, result.token_ids, strict=True):
        distribution = slow_distribution(values, r)
        u = uniform(r.params.seed, r.index)
        near = {slow_draw(distribution, min(max(u + d, 0), 1)) for d in (-1e-5, 0.0, 1e-5)}
        assert token_id in near


def test_greedy_fast_path_agrees_with_the_general_one():
    logits = torch.randn(4, VOCAB)
    greedy = row(temperature=0.0)
    fast = sample(logits, [greedy] * 4)
    mixed = sample(logits, [greedy] * 3 + [row(temperature=0.0, logprobs=0)])
    assert fast.token_ids == mixed.token_ids == logits.argmax(dim=-1).tolist()
    assert fast.logprobs == [None] * 4


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}]
)
def test_frequencies_follow_the_distribution(params):
    """Chi-square over many (seed, index) pairs; the bound is exceeded once in 10^6 runs by chance,
    and the draws are fixed."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
    rows = [row(index=i % 50, seed=i // 50, **params) for i in range(20_000)]
    counts = Counter(sample(logits.expand(len(rows), -1), rows).token_ids)
    distribution = slow_distribution(logits, rows[0])
    assert set(counts) <= set(distribution)
    cells = {t: p * len(rows) for t, p in distribution.items() if p * len(rows) >= 5}
    chi2 = sum((counts[t] - n) ** 2 / n for t, n in cells.items())
    degrees = len(cells)
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees) + 10


def test_a_draw_depends_on_seed_and_index_alone():
    logits = torch.randn(VOCAB)
    alone = sample(logits[None], [row(index=3, seed=11)]).token_ids[0]
    crowd = [row(index=i, seed=s) for s in range(20) for i in range(5)]
    crowd.insert(40, row(index=3, seed=11))
    assert sample(logits.expand(len(crowd), -1), crowd).token_ids[40] == alone
    assert len({uniform(seed, index) for seed in range(100) for index in range(100)}) == 10_000
    assert uniform(1, 2) != uniform(2, 1)


def test_uniform_numbers_are_uniform():
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert min(numbers) > 0 and max(numbers) < 1
    bins = Counter(int(u * 20) for u in numbers)
    assert sum((n - 500) ** 2 / 500 for n in bins.values()) < 60
    lagged = [(a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers)]
    assert abs(sum(lagged) / len(lagged)) < 0.004


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(3, VOCAB)
    rows = [
        row(temperature=0.0, logprobs=2, logit_bias={3: 100.0}),
        row(temperature=0.0),
        row(temperature=0.7, logprobs=0, top_k=3),
    ]
    result = sample(logits, rows)
    assert result.token_ids[0] == 3 and result.logprobs[1] is None
    raw = logits.log_softmax(dim=-1)
    first, last = result.logprobs[0], result.logprobs[2]
    assert first.logprob == pytest.approx(raw[0, 3].item(), abs=1e-6)
    assert first.rank == 1 + sum(x > raw[0, 3] for x in raw[0])
    order = raw[0].argsort(descending=True).tolist()
    assert [t.token_id for t in first.top] == order[:2]
    assert [t.rank for t in first.top] == [1, 2]
    assert last.token_id == result.token_ids[2] and last.top == [] and last.rank <= 3


def test_token_logprobs_of_a_prompt():
    logits = torch.randn(4, VOCAB)
    targets = [1, 22, 0, 9]
    entries = token_logprobs(logits, targets, 100)
    for values, target, entry in zip(logits.log_softmax(-1), targets, entries, strict=True):
        assert len(entry.top) == VOCAB
        assert entry.top[entry.rank - 1].token_id == target == entry.token_id
        assert entry.logprob == pytest.approx(values[target].item(), abs=1e-6)
    assert token_logprobs(logits[:0], [], 2) == []


def test_ids_outside_the_vocabulary_do_not_matter():
    logits = torch.randn(1, VOCAB)
    r = row(temperature=0.0, min_tokens=2, stop_token_ids=(999,), logit_bias={1000: 5.0})
    assert sample(logits, [r]).token_ids == [logits.argmax().item()]
