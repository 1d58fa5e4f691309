"""What of the CUDA modules runs without a GPU: tensors over foreign memory, and page sums."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport.checksum import sampled, summed
from pdrelay.transport.pages import SharedPages

torch = pytest.importorskip("torch")
from pdrelay.transport.cuda.driver import Driver  # noqa: E402
from pdrelay.transport.cuda.page_sums import PageSums  # noqa: E402
from pdrelay.transport.cuda.tensors import tensor_at  # noqa: E402


def make_layout(**changes):
    base = dict(
        num_layers=3, num_blocks=12, block_size=4, num_kv_heads=2, head_dim=4, dtype="float32"
    )
    return KVLayout(**{**base, **changes})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tensor_over_foreign_memory_is_that_memory(dtype):
    memory = np.zeros(2 * 3 * 4 * 4, np.uint8)
    tensor = tensor_at(memory.ctypes.data, (2, 3, 4), dtype, None)
    assert (tensor.shape, tensor.dtype) == ((2, 3, 4), getattr(torch, dtype))
    assert tensor.is_contiguous() and tensor.data_ptr() == memory.ctypes.data
    tensor[1, 2, 3] = 1.0
    size = tensor.element_size()
    assert memory[: 23 * size].sum() == 0 and memory[23 * size : 24 * size].any()
    view = tensor[1]
    del tensor
    gc.collect()
    view[2, 3] = 0.0  # the memory is ours: a tensor that goes does not free it
    assert not memory.any()


def test_many_tensors_come_and_go():
    memory = (ctypes.c_uint8 * 4096)()
    for _ in range(1000):
        tensor_at(ctypes.addressof(memory), (32, 32), "float32", None)
    gc.collect()


LAYOUTS = [
    make_layout(),
    make_layout(dtype="bfloat16"),
    make_layout(dtype="bfloat16", num_kv_heads=1, head_dim=3),
    make_layout(dtype="float16", num_kv_heads=1, head_dim=1, block_size=1),
    make_layout(num_kv_heads=1, head_dim=3, block_size=1),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.dtype}-{x.layer_block_bytes}")
@given(blocks=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
@settings(max_examples=15)
def test_page_sums_equal_those_of_host_pages(layout, blocks):
    pages = SharedPages.create(layout)
    rng = np.random.default_rng(len(blocks))
    pages.array[:] = rng.integers(0, 256, pages.array.shape, np.uint8)
    dtype = getattr(torch, layout.dtype)
    pool = torch.frombuffer(pages.buffer, dtype=dtype).view(layout.shape)
    sums = PageSums(pool, layout)
    assert np.array_equal(sums.sampled(blocks).wait(), sampled(pages, blocks))
    assert np.array_equal(sums.summed(blocks).wait(), summed(pages, blocks))
    del pool, sums
    pages.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_error_says_so():
    with pytest.raises(TransportError, match="CUDA"):
        Driver()
