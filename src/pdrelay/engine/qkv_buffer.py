"""Where the QKV projection of the layer that runs now lies, for the projection and attention."""

from __future__ import annotations

import torch


class QkvBuffer:
    """[rows, (Hq + 2 * Hkv) * D], used by every layer in turn.

    Rows behind the batch hold what earlier batches left, finite numbers in any case: attention may
    read them as padding.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._data = torch.zeros((0, width), dtype=dtype, device=device)

    @property
    def num_rows(self) -> int:
        return self._data.shape[0]

    def reserve(self, num_rows: int) -> None:
        """Hold `num_rows` from now on. Not after CUDA graphs were captured: they keep addresses."""
        if num_rows > self.num_rows:
            self._data = self._data.new_zeros((num_rows, self._data.shape[1]))

    def rows(self, num_rows: int) -> torch.Tensor:
        assert num_rows <= self.num_rows, "reserve the largest step's rows first"
        return self._data[:num_rows]

    def clear(self) -> None:
        self._data.zero_()
