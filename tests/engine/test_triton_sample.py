"""Sampling on the device, against torch.argmax and the engine's sampler."""

import pytest
import torch
from triton_harness import DEVICE, ON_GPU, randn

from pdrelay.core.sampling_params import SamplingParams
from pdrelay.engine.kernels.triton.sample import ArgmaxWorkspace, argmax_rows, draw_rows
from pdrelay.engine.sampler import SamplingRow, sample, uniform


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


@pytest.mark.parametrize("index", range(6))
def test_draw_rows_is_the_samplers_draw(index):
    rows = [
        SamplingRow(SamplingParams(max_tokens=9, seed=1000 + i, **p), [], [], index)
        for i, p in enumerate(PARAMS)
    ]
    logits = randn(len(rows), 1000, dtype=torch.float32, seed=index) * 3
    assert draw(logits, rows).tolist() == sample(logits, rows).token_ids


def draw(logits, rows, **options):
    def column(name, dtype):
        values = [getattr(row.params, name) for row in rows]
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    uniforms = [uniform(row.params.seed, row.index) for row in rows]
    return draw_rows(
        logits,
        column("temperature", torch.float32),
        column("top_k", torch.int64),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        torch.tensor(uniforms, dtype=torch.float64, device=DEVICE),
        **options,
    )


def test_without_truncation_nothing_else_changes():
    rows = [
        SamplingRow(SamplingParams(max_tokens=9, seed=i, temperature=1.0), [], [], 3)
        for i in range(8)
    ]
    logits = randn(8, 1000, dtype=torch.float32)
    assert torch.equal(draw(logits, rows, truncate=False), draw(logits, rows))


@pytest.mark.skipif(not ON_GPU, reason="only a GPU can be waited for")
def test_drawing_never_waits_for_the_device():
    rows = [SamplingRow(SamplingParams(max_tokens=9, seed=1, **p), [], [], 0) for p in PARAMS]
    logits = randn(len(rows), 1000, dtype=torch.float32)
    arguments = []
    for name, dtype in (("temperature", torch.float32), ("top_k", torch.int64)):
        values = [getattr(row.params, name) for row in rows]
        arguments.append(torch.tensor(values, dtype=dtype, device=DEVICE))
    arguments += [torch.full((len(rows),), value, device=DEVICE) for value in (0.9, 0.1, 0.5)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_rows(logits, *arguments)
        argmax_rows(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
