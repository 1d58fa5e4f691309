"""vLLM's tensors as pages of one pool."""

from __future__ import annotations

import numpy as np
import pytest

from pdrelay.integrations.vllm.page_grid import page_grid
from pdrelay.integrations.vllm.page_layout import LayerLayout, PageLayout, Plane
from pdrelay.transport.device import BlockPairs, PageMove

NUM_BLOCKS, PAGE = 6, 64


def layout_of(form: str) -> PageLayout:
    """Two layers, a region each, of two planes (K and V apart) or of one piece of twice as much."""
    size = PAGE if form == "split" else 2 * PAGE
    far = NUM_BLOCKS * PAGE
    planes = (Plane(0, size, size), Plane(far, size, size)) if form == "split" else None
    layers = tuple(
        LayerLayout(f"l{i}", i, form, planes or (Plane(0, size, size),)) for i in range(2)
    )
    region = 2 * NUM_BLOCKS * PAGE
    return PageLayout(NUM_BLOCKS, 16, (region, region), layers)


@pytest.mark.parametrize(("form", "expected"), [
    ("split", [66, 64, 72, 70]), ("together", [34, 32]),
])  # fmt: skip
def test_pages_count_from_the_lowest_region(form, expected):
    grid = page_grid(layout_of(form), [0x10000 + 64 * PAGE, 0x10000])
    assert grid is not None
    assert grid.pool.address == 0x10000
    assert grid.pages(0, np.array([2, 0])).tolist() == expected


@pytest.mark.parametrize("form", ["split", "together", "uneven strides"])
def test_pages_of_several_layers_are_those_of_each(form):
    layout = layout_of("split" if form == "uneven strides" else form)
    if form == "uneven strides":
        planes = (Plane(0, PAGE, PAGE), Plane(6 * PAGE, 2 * PAGE, PAGE))
        other = LayerLayout("l1", 1, form, planes)
        region = 20 * PAGE
        layout = PageLayout(NUM_BLOCKS, 16, (region, region), (layout.layers[0], other))
    grid = page_grid(layout, [0, 1 << 20])
    assert grid is not None
    assert (grid.stride is None) == (form == "uneven strides")
    blocks = np.array([4, 0, 5], np.int32)
    for layers in ([0, 1], [1, 0], slice(0, 2)):
        order = [0, 1] if isinstance(layers, slice) else layers
        each = [grid.pages(layer, blocks).tolist() for layer in order]
        assert grid.pages(layers, blocks).tolist() == [*each[0], *each[1]]
        assert grid.pages(layers, blocks).dtype == np.int32


def test_layers_of_different_numbers_of_planes_have_no_grid():
    one, two = layout_of("together").layers[0], layout_of("split").layers[1]
    halves = (Plane(0, PAGE, PAGE),)
    mixed = (LayerLayout("l0", 0, "f", halves), two)
    assert page_grid(PageLayout(NUM_BLOCKS, 16, (4096, 4096), mixed), [0, 1 << 20]) is None
    assert page_grid(PageLayout(NUM_BLOCKS, 16, (4096, 4096), (one, two)), [0, 1 << 20]) is None


def test_what_lies_in_no_grid_has_none():
    layout = layout_of("split")
    assert page_grid(layout, [0, 1 << 20]) is not None
    assert page_grid(layout, [0, (1 << 20) + 32]) is None  # half a page off
    assert page_grid(layout, [0, 1 << 40]) is None  # too far for int32
    uneven = (LayerLayout("l", 0, "f", (Plane(0, PAGE, PAGE), Plane(640, 128, 128))),)
    assert page_grid(PageLayout(NUM_BLOCKS, 16, (4096,), uneven), [0]) is None


@pytest.mark.parametrize("form", ["split", "together"])
def test_the_kernel_copies_between_separate_tensors(form, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU test_vllm_device_pages moves pages by this kernel")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from pdrelay.transport.cuda.page_copy import PageCopier, _copy_pages

    if type(_copy_pages).__name__ != "InterpretedFunction":
        pytest.skip("Triton was imported without its interpreter")
    layout = layout_of(form)
    size = layout.region_bytes[0]
    backing = np.zeros((2, 8 * size), np.uint8)  # each side's tensors lie apart in it
    sides = [[backing[i, start : start + size] for start in (4 * size, size)] for i in range(2)]
    for tensor in sides[0]:
        tensor[:] = np.random.default_rng(0).integers(1, 255, size)
    grids = [page_grid(layout, [t.ctypes.data for t in side]) for side in sides]
    assert grids[0] is not None and grids[1] is not None
    src, dst = np.array([1, 5, 0]), np.array([4, 2, 3])
    pairs = BlockPairs(
        np.concatenate([grids[0].pages(layer, src) for layer in range(2)]).tolist(),
        np.concatenate([grids[1].pages(layer, dst) for layer in range(2)]).tolist(),
    )
    PageCopier(None).prepare(grids[0].pool, grids[1].pool, [PageMove(0, pairs)]).enqueue()
    shape = (2, NUM_BLOCKS, PAGE) if form == "split" else (1, NUM_BLOCKS, 2 * PAGE)
    expected = np.zeros_like(backing)
    for layer, start in enumerate((4 * size, size)):
        there = expected[1, start : start + size].reshape(shape)
        there[:, dst] = sides[0][layer].reshape(shape)[:, src]
    assert (backing[1] == expected[1]).all()
