"""How the keys of a decode batch's rows are cut into parts, for programs to share the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DecodeCut:
    """Of one step, for all its layers; made by `GpuKernels.decode_cut`.

    `num_splits`: parts of every row, a power of two, by the batch bucket alone. `extra_parts`: the
    parts that rows too long get beyond these, by the lengths at hand, int32 on the device
    (`triton/decode_parts.py`); None: none.
    """

    num_splits: int = 1
    extra_parts: torch.Tensor | None = None
