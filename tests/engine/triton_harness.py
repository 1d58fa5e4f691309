"""Where the Triton kernels' tests run: on the GPU where there is one, else in the interpreter.

Import this before anything that imports triton: triton reads the variable when it is imported.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the Triton kernels need the triton package (Linux)")

from pdrelay.engine.kernels.triton.launch import interpreting  # noqa: E402

assert ON_GPU or interpreting(), "triton was imported before tests/engine/triton_harness.py"

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
EPS = 1e-5


def randn(
    *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, std: float = 1.0
) -> torch.Tensor:
    """The same values on any device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
    return values.to(dtype).to(DEVICE)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """||actual - wanted|| / ||wanted||; NaN counts as infinitely wrong."""
    a, w = actual.double().cpu(), wanted.double().cpu()
    error = ((a - w).norm() / w.norm()).item()
    return error if error == error else float("inf")


def equal_but_for_rounding(actual: torch.Tensor, wanted: torch.Tensor, steps: int = 0) -> bool:
    """Within `steps` bfloat16 steps on a GPU; one more in the interpreter, which cuts off where
    hardware rounds.
    """
    return ulp_apart(actual, wanted) <= steps + (0 if ON_GPU else 1)


def ulp_apart(actual: torch.Tensor, wanted: torch.Tensor) -> int:
    """The most bfloat16 steps between two tensors of the same shape."""

    def ordered(t: torch.Tensor) -> torch.Tensor:
        bits = t.to(torch.bfloat16).cpu().view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    return int((ordered(actual) - ordered(wanted)).abs().max())
