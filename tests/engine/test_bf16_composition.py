"""How far apart bfloat16's log-probabilities are when the same tokens are computed in steps of
other sizes: what `docs/methodology.md` allows between co-located and P/D under load."""

from __future__ import annotations

import random

import torch
from model_harness import Batcher

from pdrelay.engine.models import build_model
from pdrelay.model.config import load_model_config

BOUND = 0.125  # nats, of `tiny`
LENGTH, DECODED, NUM_TOP = 420, 20, 5


def logprobs(model, config, token_ids, chunks):
    """[DECODED, vocab] of the last tokens, computed in chunks of these lengths."""
    batcher = Batcher(config, model, block_size=64, num_blocks=16, dtype="bfloat16")
    sequence = batcher.sequence(token_ids)
    for length in chunks:
        batcher.step(chunks=[(sequence, length)])
    return torch.stack(sequence.logits[-DECODED:]).float().log_softmax(dim=-1)


def test_other_compositions_stay_within_the_bound():
    config = load_model_config("tiny")
    model = build_model("tiny", config, dtype=torch.bfloat16, use_kernels=False)
    worst = 0.0
    for seed in range(3):
        rng = random.Random(seed)
        token_ids = [rng.randrange(256) for _ in range(LENGTH)]
        whole = logprobs(model, config, token_ids, [LENGTH])
        prompt = LENGTH - DECODED
        for chunks in ([prompt], [96] * (prompt // 96) + [prompt % 96], [1] * 3 + [prompt - 3]):
            other = logprobs(model, config, token_ids, [*chunks, *[1] * DECODED])
            top = whole.topk(NUM_TOP).indices
            worst = max(worst, float((whole - other).gather(1, top).abs().max()))
    assert 0 < worst <= BOUND, worst
