"""A fake device's memory with vLLM's pages in it, for tests."""

from __future__ import annotations

import numpy as np
from hand_over_kit import BLOCK_SIZE, LAYERS

from pdrelay.core.kv_layout import KVLayout
from pdrelay.integrations.vllm.page_layout import LayerLayout, PageLayout, Plane
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages

SPLIT, TOGETHER = "split", "together"


class DeviceMemory:
    """`array`: `[layers, blocks, 2, 32]` uint8 (together), or `[layers, 2, blocks, 32]` (split)."""

    def __init__(
        self, fabric: HostFabric, num_blocks: int, form: str, *, manual: bool, name: str = "host:0"
    ) -> None:
        self.device = HostDevice(fabric, name, manual=manual)
        raw = KVLayout(
            num_layers=LAYERS,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=1,
            head_dim=2,
            dtype="float32",
        )
        self.memory = HostPages.create(raw, self.device)
        size = raw.layer_block_bytes // 2  # one of K and V
        layers = []
        for i in range(LAYERS):
            start = i * num_blocks * 2 * size
            if form == SPLIT:
                planes = tuple(Plane(start + k * num_blocks * size, size, size) for k in range(2))
            else:
                planes = (Plane(start, 2 * size, 2 * size),)
            layers.append(LayerLayout(f"l{i}", 0, form, planes))
        self.layout = PageLayout(num_blocks, BLOCK_SIZE, (raw.total_bytes,), tuple(layers))
        self._blocks_first = form == TOGETHER
        flat = self.memory.array.reshape(-1)
        self.array = (
            flat.reshape(LAYERS, num_blocks, 2, size)
            if self._blocks_first
            else flat.reshape(LAYERS, 2, num_blocks, size)
        )

    def blocks(self, layer: int, ids: list[int]) -> np.ndarray:
        chosen = self.array[layer]
        return chosen[ids] if self._blocks_first else chosen[:, ids]

    def write(self, layer: int, ids: list[int], value: int) -> None:
        if self._blocks_first:
            self.array[layer, ids] = value
        else:
            self.array[layer][:, ids] = value
