"""Keep Python's collector from walking a large, settled heap in the middle of a latency path.

A full collection visits every container alive: with aiohttp, tokenizers or torch imported that
takes 30 to 90 ms, and the request or chunk that triggers it waits (docs/LOG.md).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


def settle_heap() -> None:
    """Collect now; what is alive is not looked at again. For a process that starts to serve."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """The same for the time of a measurement; afterwards everything is looked at again."""
    settle_heap()
    try:
        yield
    finally:
        gc.unfreeze()
