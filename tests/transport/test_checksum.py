"""The checksum against damage it must find, and against a slow computation of itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.checksum import checksum
from pdrelay.transport.pages import SharedPages

MASK = 2**64 - 1
GOLDEN, MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def layout(**changes):
    base = dict(
        num_layers=3, num_blocks=12, block_size=4, num_kv_heads=2, head_dim=4, dtype="float32"
    )
    return KVLayout(**{**base, **changes})


@pytest.fixture
def pages():
    pages = SharedPages.create(layout())
    rng = np.random.default_rng(0)
    pages.array[:] = rng.integers(0, 256, pages.array.shape, np.uint8)
    yield pages
    pages.close()


def slow_mix(x):
    x = x * GOLDEN & MASK
    x ^= x >> 32
    x = x * MIX & MASK
    return x ^ x >> 29


def slow_checksum(pages, blocks, mode):
    """Word by word, with Python's integers."""
    values = []
    for layer in range(pages.layout.num_layers):
        rows = [words_of(pages, layer, block) for block in blocks]
        half = len(rows[0]) // 2
        if mode == "sample":
            values += [row[i] for i in (0, half - 1, half, 2 * half - 1) for row in rows]
        else:
            weights = [slow_mix(i + 1) | 1 for i in range(2 * half)]
            values += [sum(a * b for a, b in zip(row, weights, strict=True)) & MASK for row in rows]
    return sum(slow_mix(v ^ (i * GOLDEN & MASK)) for i, v in enumerate(values, 1)) & MASK


def words_of(pages, layer, block):
    page = pages.array[layer, block].tobytes()
    return [int.from_bytes(page[i : i + 8], "little") for i in range(0, len(page), 8)]


@pytest.mark.parametrize("mode", ["sample", "full"])
@given(blocks=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
@settings(max_examples=20, deadline=None)
def test_equals_the_slow_way(mode, blocks):
    pages = SharedPages.create(layout())
    rng = np.random.default_rng(sum(blocks))
    pages.array[:] = rng.integers(0, 256, pages.array.shape, np.uint8)
    assert checksum(pages, blocks, mode) == slow_checksum(pages, blocks, mode)
    pages.close()


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_block_ids_do_not_matter_but_order_does(pages, mode):
    other = SharedPages.create(layout(num_blocks=30))
    src, dst = [3, 4, 9, 0], [29, 2, 7, 8]
    other.array[:, dst] = pages.array[:, src]
    value = checksum(pages, src, mode)
    assert value == checksum(other, dst, mode)
    assert 0 < value <= MASK
    assert value != checksum(pages, [4, 3, 9, 0], mode)
    assert value != checksum(pages, src[:3], mode)
    other.array[[0, 1]] = other.array[[1, 0]]
    assert value != checksum(other, dst, mode)
    other.close()


def test_full_finds_every_flipped_bit(pages):
    blocks = [2, 3, 7]
    seen = {checksum(pages, blocks, "full")}
    rng = np.random.default_rng(1)
    for _ in range(300):
        layer, block = rng.integers(3), blocks[rng.integers(3)]
        where, bit = rng.integers(pages.layout.layer_block_bytes), np.uint8(1 << rng.integers(8))
        pages.array[layer, block, where] ^= bit
        assert checksum(pages, blocks, "full") not in seen
        pages.array[layer, block, where] ^= bit
    assert checksum(pages, blocks, "full") in seen


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_finds_a_page_that_never_came(pages, mode):
    blocks = list(range(12))
    value = checksum(pages, blocks, mode)
    for layer in range(3):
        for block in blocks:
            kept = pages.array[layer, block].copy()
            pages.array[layer, block] = 0
            assert checksum(pages, blocks, mode) != value
            pages.array[layer, block] = kept


def test_pages_that_were_not_asked_for_do_not_matter(pages):
    value = checksum(pages, [1, 2], "full")
    pages.array[:, 3:] = 0
    assert checksum(pages, [1, 2], "full") == value


def test_off_and_nothing_are_zero(pages):
    assert checksum(pages, [1, 2, 3], "off") == 0
    assert checksum(pages, [], "full") == checksum(pages, [], "sample") == 0


@pytest.mark.parametrize(
    "odd", [{"head_dim": 1, "num_kv_heads": 1, "block_size": 1}, {"head_dim": 3, "num_kv_heads": 1}]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pages_that_are_no_whole_words(odd, dtype):
    pages = SharedPages.create(layout(dtype=dtype, **odd))
    pages.array[:] = np.arange(pages.array.size).reshape(pages.array.shape) % 251
    for mode in ("sample", "full"):
        value = checksum(pages, [1, 2], mode)
        assert value != checksum(pages, [2, 1], mode)
        pages.array[2, 2, -1] ^= 1
        assert value != checksum(pages, [1, 2], mode)
        pages.array[2, 2, -1] ^= 1
    pages.close()
