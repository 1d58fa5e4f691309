"""The shared pool as a prefix cache, and how its slots get into pages."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pdrelay.errors import TransportError
from pdrelay.transport.copying import Pages, check_blocks, copy_layer
from pdrelay.transport.device import DevicePages, page_runs
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool_store import PoolStore


class PoolPrefixStore:
    """The pool as a prefix cache of one instance. Trouble with the pool is a miss."""

    def __init__(
        self, pages: SharedPages | DevicePages, store: PoolStore, instance_index: int
    ) -> None:
        self._pages = pages
        self._store = store
        self._index = instance_index
        self._num_loads = 0

    def match(self, keys: Sequence[bytes]) -> int:
        try:
            return self._store.match(keys)
        except TransportError:
            return 0

    def load(self, keys: Sequence[bytes], dst_blocks: Sequence[int]) -> int:
        check_blocks(dst_blocks, self._pages.layout, "local")
        wanted = keys[: len(dst_blocks)]
        self._num_loads += 1
        name = f"prefix:{self._index}:{self._num_loads}"
        try:
            slots = self._store.pin_prefix(name, wanted, self._index)
        except TransportError:
            return 0
        if not slots:
            return 0
        try:
            for layer in range(self._pages.layout.num_layers):
                load_layer(self._store.slots, self._pages, layer, slots, dst_blocks[: len(slots)])
        finally:
            self._store.release(name)
        return len(slots)


def load_layer(
    slots: Pages,
    pages: SharedPages | DevicePages,
    layer: int,
    src_slots: Sequence[int],
    dst_blocks: Sequence[int],
) -> int:
    """Copy one layer from the pool's slots into pages; a device's copy is waited for. Returns the
    number of copies."""
    if isinstance(pages, SharedPages):
        return copy_layer(slots, pages.array, layer, src_slots, dst_blocks)
    layout = msgspec.structs.replace(pages.layout, num_blocks=slots.shape[1])
    runs = page_runs(
        layout, slots.ctypes.data, pages.layout, pages.address, layer, src_slots, dst_blocks
    )
    pages.device.copy(runs, None).wait()
    return len(runs)
