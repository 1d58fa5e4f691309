"""Layouts of all attention backends' caches, and copies through shared memory between them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from pdrelay.errors import ConfigError, TransportError
from pdrelay.integrations.vllm.page_layout import (
    LayerLayout,
    PageLayout,
    Plane,
    check_inside,
    check_same_pages,
    layer_layout,
)
from pdrelay.integrations.vllm.pages import Move

torch = pytest.importorskip("torch")

from pdrelay.integrations.vllm.registered import cpu_pages, create_pages, describe  # noqa: E402

BLOCKS, SIZE, HEADS, DIM, LAYERS = 64, 16, 4, 32, 3
NUM_BYTES = BLOCKS * 2 * SIZE * HEADS * DIM * 4


def split(num_blocks):
    """[2, blocks, tokens, heads, dim]: K and V apart."""
    return {f"l{i}": torch.zeros(2, num_blocks, SIZE, HEADS, DIM) for i in range(LAYERS)}


def together(num_blocks):
    """[blocks, 2, tokens, heads, dim]"""
    return {f"l{i}": torch.zeros(num_blocks, 2, SIZE, HEADS, DIM) for i in range(LAYERS)}


def heads_first(num_blocks):
    """[2, blocks, tokens, heads, dim] that lies in memory as [2, blocks, heads, tokens, dim]."""
    return {
        f"l{i}": torch.zeros(2, num_blocks, HEADS, SIZE, DIM).transpose(2, 3) for i in range(LAYERS)
    }


def one_allocation(num_blocks):
    """[blocks, heads, tokens, 2 * dim], all layers one after the other in one storage."""
    whole = torch.zeros(LAYERS, num_blocks, HEADS, SIZE, 2 * DIM)
    return {f"l{i}": whole[i] for i in range(LAYERS)}


def block_major(num_blocks):
    """All layers of a block together."""
    whole = torch.zeros(num_blocks, LAYERS, 2, SIZE, HEADS, DIM)
    return {f"l{i}": whole[:, i] for i in range(LAYERS)}


def heads_outside_layers(num_blocks):
    """[blocks, heads, layers, tokens, 2 * dim]: a layer of a block is one piece a head."""
    whole = torch.zeros(num_blocks, HEADS, LAYERS, SIZE, 2 * DIM)
    return {f"l{i}": whole[:, :, i] for i in range(LAYERS)}


def kernel_blocks(num_blocks):
    """Two kernel blocks of half the tokens make one block."""
    return {f"l{i}": torch.zeros(2, num_blocks * 2, SIZE // 2, HEADS, DIM) for i in range(LAYERS)}


CACHES = {
    make.__name__: (make, planes)
    for make, planes in [
        (split, 2),
        (together, 1),
        (heads_first, 2),
        (one_allocation, 1),
        (block_major, 1),
        (heads_outside_layers, HEADS),
        (kernel_blocks, 2),
    ]
}


@pytest.mark.parametrize("name", CACHES)
def test_planes_cover_every_block_once(name):
    make, num_planes = CACHES[name]
    layout, storages, index = describe(make(BLOCKS), num_blocks=BLOCKS, block_size=SIZE)
    assert index == {f"l{i}": i for i in range(LAYERS)}
    seen = [np.zeros(storage.nbytes(), np.int32) for storage in storages]
    for layer in layout.layers:
        assert len(layer.planes) == num_planes
        assert layer.block_bytes * BLOCKS == NUM_BYTES
        for plane in layer.planes:
            for block in range(BLOCKS):
                at = plane.offset + block * plane.block_stride
                seen[layer.region][at : at + plane.num_bytes] += 1
    assert all((counts == 1).all() for counts in seen)
    check_inside(layout)


def fill(caches, seed):
    for i, cache in enumerate(caches.values()):
        generator = torch.Generator().manual_seed(seed + i)
        cache.copy_(torch.rand(cache.shape, generator=generator))


@pytest.mark.parametrize("name", CACHES)
def test_pages_move_through_shared_memory(name):
    """Producer and consumer with pools of different sizes; scattered and consecutive blocks."""
    make, _ = CACHES[name]
    mine, theirs = make(BLOCKS), make(2 * BLOCKS)
    p_layout, p_storages, _ = describe(mine, num_blocks=BLOCKS, block_size=SIZE)
    d_layout, d_storages, _ = describe(theirs, num_blocks=2 * BLOCKS, block_size=SIZE)
    check_same_pages(p_layout, d_layout)
    consumer = cpu_pages(d_layout, d_storages, share=True)
    producer = cpu_pages(p_layout, p_storages, share=False)
    fill(mine, 1)
    fill(theirs, 100)
    before = {key: cache.clone() for key, cache in theirs.items()}
    offer = consumer.offer()
    handles, fds = offer.handles, offer.fds
    writer = producer.open(d_layout, handles, [os.dup(fd) for fd in fds])
    src, dst = [5, 6, 7, 0, 63], [100, 101, 9, 10, 127]
    for layer in range(LAYERS):
        writer.write([Move(layer, src, dst)])
    assert writer.fence().done()
    writer.close()
    for key, cache in theirs.items():
        axis = 1 if name in ("split", "heads_first", "kernel_blocks") else 0
        ratio = 2 if name == "kernel_blocks" else 1
        expected = before[key]
        for a, b in zip(src, dst, strict=True):
            for k in range(ratio):
                expected.select(axis, b * ratio + k).copy_(mine[key].select(axis, a * ratio + k))
        assert torch.equal(cache, expected), key
    consumer.close()


def test_runs_are_copied_at_once():
    make, _ = CACHES["one_allocation"]
    layout, storages, _ = describe(make(BLOCKS), num_blocks=BLOCKS, block_size=SIZE)
    consumer = cpu_pages(layout, storages, share=True)
    offer = consumer.offer()
    handles, fds = offer.handles, offer.fds
    writer = consumer.open(layout, handles, [os.dup(fds[0])])
    assert writer.write([Move(0, [1, 2, 3, 9], [11, 12, 13, 14])]) == 2
    writer.close()
    consumer.close()


def test_shared_in_place_keeps_the_neighbours():
    """In a process of its own: a wrong page would be a crash."""
    code = """
import torch, os
from pdrelay.integrations.vllm.registered import share_in_place
before = [bytearray(os.urandom(1 << 20)) for _ in range(8)]
copies = [bytes(b) for b in before]
caches = [torch.zeros(3 << 20, dtype=torch.uint8) for _ in range(4)]
after = [bytearray(b) for b in before]
at = [c.data_ptr() for c in caches]
fd, starts = share_in_place([c.untyped_storage() for c in caches])
assert [c.data_ptr() for c in caches] == at
for i, (cache, start) in enumerate(zip(caches, starts)):
    assert not cache.any()
    cache.fill_(i + 1)
    assert os.pread(fd, 3 << 20, start) == bytes([i + 1]) * (3 << 20)
    os.pwrite(fd, b"\\7", start + 100)
    assert cache[100] == 7
assert [bytes(b) for b in before] == copies == [bytes(b) for b in after]
del caches, cache
print("fine", torch.ones(1 << 22).sum().item())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("fine")


def test_layers_that_share_a_cache_are_moved_once():
    cache = torch.zeros(BLOCKS, 2, SIZE, HEADS, DIM)
    other = torch.zeros(BLOCKS, 2, SIZE, HEADS, DIM)
    layout, _, index = describe(
        {"a": cache, "b": other, "c": cache}, num_blocks=BLOCKS, block_size=SIZE
    )
    assert index == {"a": 0, "b": 1, "c": 0}
    assert len(layout.layers) == 2


def test_forms_that_differ_are_refused():
    layouts = {
        name: describe(make(BLOCKS), num_blocks=BLOCKS, block_size=SIZE)[0]
        for name, (make, _) in CACHES.items()
    }
    for a, mine in layouts.items():
        for b, theirs in layouts.items():
            # The same bytes in a block's pieces: only where its pieces lie differs.
            same = {a, b} <= {"together", "block_major"} or a == b
            if same:
                check_same_pages(mine, theirs)
            else:
                with pytest.raises(ConfigError, match="same model"):
                    check_same_pages(mine, theirs)


def test_other_dtype_or_block_size_is_refused():
    mine = describe({"l": torch.zeros(8, 2, 16, 32)}, num_blocks=8, block_size=2)[0]
    half = describe({"l": torch.zeros(8, 2, 16, 32).half()}, num_blocks=8, block_size=2)[0]
    tall = describe({"l": torch.zeros(8, 2, 16, 32)}, num_blocks=8, block_size=4)[0]
    for theirs in (half, tall):
        with pytest.raises(ConfigError, match="at the peer"):
            check_same_pages(mine, theirs)


def test_caches_that_cannot_be_moved():
    with pytest.raises(ConfigError, match="no axis"):
        describe({"l": torch.zeros(7, 5)}, num_blocks=64, block_size=16)
    with pytest.raises(ConfigError, match="no tensor"):
        describe({"l": [torch.zeros(7, 5)]}, num_blocks=64, block_size=16)
    with pytest.raises(ConfigError, match="scattered"):
        layer_layout(
            "l",
            region=0,
            offset=0,
            dtype="float32",
            itemsize=4,
            shape=(4, 1000, 8),
            strides=(8, 100, 1),
            num_blocks=4,
        )
    with pytest.raises(ConfigError, match="too small"):
        cpu_pages(*describe({"l": torch.zeros(4, 8)}, num_blocks=4, block_size=1)[:2], share=True)


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
def test_transport_that_does_not_fit_the_device(transport):
    layout, storages, _ = describe(together(BLOCKS), num_blocks=BLOCKS, block_size=SIZE)
    with pytest.raises(ConfigError, match=transport):
        create_pages(transport, layout, storages, share=True)


@pytest.mark.parametrize(
    "plane",
    [Plane(-1, 8, 8), Plane(0, 8, 9), Plane(0, -8, 8), Plane(64, 8, 8), Plane(0, 1 << 60, 8)],
)
def test_pages_outside_their_region_are_refused(plane):
    layer = LayerLayout("l", 0, "f", (plane,))
    with pytest.raises(ConfigError, match="outside"):
        check_inside(PageLayout(8, 1, (64,), (layer,)))


def test_a_layer_of_no_region_is_refused():
    layer = LayerLayout("l", 1, "f", (Plane(0, 8, 8),))
    with pytest.raises(ConfigError, match="no region"):
        check_inside(PageLayout(8, 1, (64,), (layer,)))


@pytest.mark.parametrize("handles", [[], [b"0", b"0"], [b"x"], [b"-5"], [b"4096"]])
def test_a_mapping_that_does_not_hold_the_regions_is_refused(handles):
    layout, storages, _ = describe(together(BLOCKS), num_blocks=BLOCKS, block_size=SIZE)
    pages = cpu_pages(layout, storages, share=False)
    fd = os.memfd_create("small")
    os.ftruncate(fd, NUM_BYTES)
    with pytest.raises(TransportError, match="cannot be mapped"):
        pages.open(layout, handles, [fd])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
