"""Block tables of the requests that decode, as rows of one array that follows them.

Most steps change nothing: only what a request's table grew by is copied, and a step's tables are
gathered in one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pdrelay.core.request import Request


@dataclass
class _Row:
    index: int
    source: list[int]  # the request's table: another list after preemption
    length: int
    used_at: int  # number of the step that last asked


class BlockTableRows:
    """`table[row]`: int32 block ids of one request, `width` at most; stale behind its length."""

    def __init__(self, num_rows: int, width: int) -> None:
        """At least as many rows as requests in one step."""
        self.table = np.zeros((num_rows, width), dtype=np.int32)
        self._rows: dict[str, _Row] = {}
        self._free = list(range(num_rows))
        self._step = 0

    def begin_step(self) -> None:
        self._step += 1

    def row(self, request: Request) -> int:
        """The request's row, up to date."""
        blocks = request.block_table
        row = self._rows.get(request.request_id)
        if row is None or row.source is not blocks:
            index = self._take() if row is None else row.index
            row = self._rows[request.request_id] = _Row(index, blocks, 0, self._step)
        row.used_at = self._step
        if row.length != len(blocks):
            self.table[row.index, row.length : len(blocks)] = blocks[row.length :]
            row.length = len(blocks)
        return row.index

    def _take(self) -> int:
        if not self._free:
            for request_id, row in list(self._rows.items()):
                if row.used_at != self._step:
                    self._free.append(row.index)
                    del self._rows[request_id]
        return self._free.pop()
