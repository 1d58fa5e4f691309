"""Sampling on the device, against torch.argmax and the engine's sampler."""

import pytest
import torch
from triton_harness import DEVICE, ON_GPU, randn

from pdrelay.core.sampling_params import SamplingParams
from pdrelay.engine.kernels.triton.sample import ArgmaxWorkspace, argmax_rows
from pdrelay.engine.sampler import SamplingRow, draw, draw_columns, sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [1, 100, 4096, 9000])
def test_argmax_rows(vocab_size, dtype):
    logits = randn(3, vocab_size + 8, dtype=dtype)[:, :vocab_size]
    out = torch.full((3,), -1, device=DEVICE)
    assert argmax_rows(logits, out, ArgmaxWorkspace(4, vocab_size, DEVICE)) is out
    wanted = [row.index(max(row)) for row in logits.tolist()]  # the lowest id of equals
    assert out.tolist() == wanted


def test_argmax_rows_of_equals_and_infinities():
    logits = torch.full((4, 5000), -torch.inf, device=DEVICE)
    logits[1] = 2.0
    logits[2, [4096, 4999]] = 7.0
    logits[3, [17, 4500]] = torch.inf
    assert argmax_rows(logits).tolist() == [0, 0, 4096, 17]


PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.7},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 100_000, "top_p": 0.999},
]


def rows_of(params, index):
    return [
        SamplingRow(SamplingParams(max_tokens=9, seed=1000 + i, **p), [], [], index)
        for i, p in enumerate(params)
    ]


def columns_of(rows):
    return torch.tensor(draw_columns(rows), dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("index", range(6))
def test_a_row_is_drawn_among_others_as_alone(index):
    """Alone, it is neither truncated nor cut at min_p unless it asks for it."""
    rows = rows_of(PARAMS, index)
    logits = randn(len(rows), 1000, dtype=torch.float32, seed=index) * 3
    together = draw(logits, columns_of(rows), truncates=True, has_min_p=True).tolist()
    alone = [sample(logits[i : i + 1], [row]).token_ids[0] for i, row in enumerate(rows)]
    assert together == alone


@pytest.mark.skipif(not ON_GPU, reason="only a GPU can be waited for")
def test_choosing_never_waits_for_the_device():
    columns = columns_of(rows_of(PARAMS, 0))
    logits = randn(len(PARAMS), 1000, dtype=torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(logits, columns, truncates=True, has_min_p=True)
        argmax_rows(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
