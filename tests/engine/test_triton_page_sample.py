"""The kernel that makes checksums of device pages against the host's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_harness import ON_GPU

from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.checksum import checksum
from pdrelay.transport.cuda.page_sample import CHUNK, ENDS, MOST_PROGRAMS, PageSampler, takes
from pdrelay.transport.host_device import HostMemory
from pdrelay.transport.pages import SharedPages

pytestmark = pytest.mark.skipif(ON_GPU, reason="test_cuda_ipc.py has a GPU's")


def make_layout(num_blocks=12, **changes):
    base = dict(num_layers=3, block_size=4, num_kv_heads=2, head_dim=4, dtype="float32")
    return KVLayout(num_blocks=num_blocks, **{**base, **changes})


LAYOUTS = [
    make_layout(),
    make_layout(num_layers=1, dtype="bfloat16"),
    make_layout(block_size=1, num_kv_heads=1, head_dim=2),  # K of a page is one word
    make_layout(dtype="float16", num_kv_heads=3),
]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout.dtype}-{layout.layer_block_bytes}")
def pages(request):
    pages = SharedPages.create(request.param)
    pages.array[:] = np.random.default_rng(1).integers(0, 256, pages.array.shape, np.uint8)
    yield pages
    pages.close()


@pytest.fixture
def sampler(pages):
    sampler = PageSampler(pages.array.ctypes.data, pages.layout, None)
    yield sampler
    sampler.close()


@given(blocks=st.lists(st.integers(0, 11), min_size=1, max_size=12))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_sum_is_the_hosts(pages, blocks):
    sampler = PageSampler(pages.array.ctypes.data, pages.layout, None)
    assert sampler.prepare(blocks, 0).begin().result() == checksum(pages, blocks, "sample")
    sampler.close()


def test_more_words_than_all_programs_read_at_once():
    layout = make_layout(num_layers=2, num_blocks=5000)
    pages = SharedPages.create(layout)
    pages.array[:] = np.random.default_rng(2).integers(0, 256, pages.array.shape, np.uint8)
    blocks = np.random.default_rng(3).permutation(5000).tolist()
    assert layout.num_layers * ENDS * len(blocks) > MOST_PROGRAMS * CHUNK
    sampler = PageSampler(pages.array.ctypes.data, layout, None)
    assert sampler.prepare(blocks, 0).begin().result() == checksum(pages, blocks, "sample")
    sampler.close()
    pages.close()


def test_a_word_that_changes_is_found(pages, sampler):
    before = sampler.prepare([1, 7], 0).begin().result()
    pages.array[-1, 7, -1] ^= 1
    assert sampler.prepare([1, 7], 0).begin().result() != before


def test_several_at_a_time_have_memory_of_their_own(pages, sampler):
    prepared = [sampler.prepare([block], 0) for block in range(12)]
    assert len({one._slot.address for one in prepared}) == 12
    found = [one.begin() for one in prepared]
    assert [one.result() for one in found] == [checksum(pages, [b], "sample") for b in range(12)]


def test_memory_of_what_is_over_is_used_again(pages, sampler):
    free = len(sampler._slots)
    for _ in range(3 * free):
        sampler.prepare([2], 0).begin().result()
    prepared = sampler.prepare([2], 0)
    del prepared  # given up before it began
    assert len(sampler._slots) == free


class Device:
    """Of the host, with events that are over when they are told to be."""

    ordinal = None

    def __init__(self):
        self.events = []

    def pinned(self, num_bytes):
        return HostMemory(num_bytes)

    def make_current(self):
        pass

    def behind(self, stream):
        self.events.append(Event())
        return self.events[-1]


class Event:
    over = False

    def done(self):
        return self.over

    def wait(self):
        self.over = True


def test_memory_that_a_kernel_may_still_use_is_not_given_away(pages):
    device = Device()
    sampler = PageSampler(pages.array.ctypes.data, pages.layout, device)
    first = sampler.prepare([3], 0)
    slot = first._slot
    first.begin()
    assert not first.done()
    del first  # given up while the kernel runs
    taken = [sampler.prepare([1], 0) for _ in range(len(sampler._slots) - 1)]
    assert all(one._slot is not slot for one in taken)
    device.events[0].over = True
    assert sampler.prepare([1], 0)._slot is slot
    sampler.close()


def test_pages_of_odd_sizes_are_not_for_this_kernel():
    assert not takes(make_layout(dtype="bfloat16", num_kv_heads=1, head_dim=3, block_size=1))
    assert all(map(takes, LAYOUTS))
