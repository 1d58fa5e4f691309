"""Ranks of one process, a thread each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor


def together(world_size, function):
    """function(rank) on a thread a rank; their results by rank."""
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(function, rank) for rank in range(world_size)]
        return [future.result(timeout=60) for future in futures]
