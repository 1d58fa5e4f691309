"""Buffers that are used again step after step, so that no step pays for fresh pages."""

from __future__ import annotations

import torch

_MAX_VIEWS = 4096


class Workspace:
    """Uninitialised float32 matrices by name. A name's buffer is one and the same at every take."""

    def __init__(self) -> None:
        self._storage: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, int, int], torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns], contiguous; what `name` held before is lost."""
        key = (name, rows, columns)
        view = self._views.get(key)
        if view is None:
            view = self._make(name, rows, columns)
        return view

    def _make(self, name: str, rows: int, columns: int) -> torch.Tensor:
        size = rows * columns
        storage = self._storage.get(name)
        if storage is None or storage.numel() < size or len(self._views) >= _MAX_VIEWS:
            self._views = {k: v for k, v in self._views.items() if k[0] != name}
        if storage is None or storage.numel() < size:
            storage = self._storage[name] = torch.empty(size, dtype=torch.float32)
        view = self._views[name, rows, columns] = storage[:size].view(rows, columns)
        return view
