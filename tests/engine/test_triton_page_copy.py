"""The page-copy kernel against a slow copy, and transport `mapped` over it."""

from __future__ import annotations

import select
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_harness import DEVICE, ON_GPU

from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.base import Descriptor, Sent
from pdrelay.transport.cuda.page_copy import (
    PageCopier,
    chunk_plan,
    copy_pages,
    page_ids,
    page_list,
    word_bytes,
)
from pdrelay.transport.device import BlockPairs, PageMove, PagePool
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.registry import TransportOptions, create_transport


def make_layout(num_blocks=8, **changes):
    base = dict(num_layers=3, block_size=4, num_kv_heads=2, head_dim=4, dtype="float32")
    return KVLayout(num_blocks=num_blocks, **{**base, **changes})


def random_words(num_words, size, seed):
    data = torch.randint(0, 256, (num_words * size,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view({8: torch.int64, 4: torch.int32}[size]).to(DEVICE)


def launched(copier, source, target, moves, **options):
    """Enqueue, and the list of pages that the launch reads."""
    launch = copier.prepare(source, target, moves, **options)
    launch.enqueue()
    return launch.ids


@pytest.mark.parametrize("page_bytes", [4, 8, 12, 96, 1000, 1024, 4096, 33 * 1024, 65536])
@pytest.mark.parametrize(("num_ctas", "chunk_bytes"), [(1, 1024), (3, 1024), (16, 32 << 10)])
def test_pages_are_copied_and_nothing_else_changes(page_bytes, num_ctas, chunk_bytes):
    size = word_bytes(page_bytes)
    source = random_words(7 * page_bytes // size, size, 1)
    target = random_words(9 * page_bytes // size, size, 2)
    wanted = target.clone().view(9, -1)
    pairs = [(6, 0), (0, 8), (3, 5), (2, 2), (6, 7)]
    for a, b in pairs:
        wanted[b] = source.view(7, -1)[a]
    numbers = torch.tensor([0, *(a for a, _ in pairs), *(b for _, b in pairs)], dtype=torch.int32)
    plan = chunk_plan(page_bytes, chunk_bytes)
    copy_pages(source, target, numbers.to(DEVICE), 1, 5, 7, 9, plan, num_ctas=num_ctas)
    assert torch.equal(target.view(9, -1), wanted)


@pytest.mark.parametrize("num_ctas", [1, 3, 64])
def test_layers_share_their_pairs_of_blocks(num_ctas):
    page_bytes, layers, pairs = 96, [2, 0, 3], [(4, 1), (0, 5), (1, 0)]
    source = random_words(4 * 5 * page_bytes // 8, 8, 1)
    target = random_words(4 * 6 * page_bytes // 8, 8, 2)
    wanted = target.clone().view(4, 6, -1)
    for layer in layers:
        for a, b in pairs:
            wanted[layer, b] = source.view(4, 5, -1)[layer, a]
    numbers = [*layers, *(a for a, _ in pairs), *(b for _, b in pairs)]
    on_device = torch.tensor(numbers, dtype=torch.int32).to(DEVICE)
    plan = chunk_plan(page_bytes, 64)  # the last of two chunks is half empty
    copy_pages(source, target, on_device, 3, 3, 5, 6, plan, num_ctas=num_ctas)
    assert torch.equal(target.view(4, 6, -1), wanted)


@st.composite
def all_moves(draw):
    """Moves of several layers, some of which share their pairs; each target page at most once."""
    moves = []
    free = {layer: list(range(11)) for layer in range(3)}
    for _ in range(draw(st.integers(1, 4))):
        layers = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
        common = [b for b in range(11) if all(b in free[layer] for layer in layers)]
        if not common:
            continue
        dst = draw(st.lists(st.sampled_from(common), min_size=1, max_size=6, unique=True))
        src = draw(st.lists(st.integers(0, 7), min_size=len(dst), max_size=len(dst)))
        pairs = BlockPairs(src, dst)
        for layer in layers:
            moves.append(PageMove(layer, pairs))
            free[layer] = [b for b in free[layer] if b not in dst]
    return moves


@given(moves=all_moves())
def test_page_ids_are_those_of_a_loop(moves):
    source, target = PagePool(make_layout(8), 0), PagePool(make_layout(11), 0)
    pages = [(m.layer, a, b) for m in moves for a, b in zip(m.pairs.src, m.pairs.dst, strict=True)]
    ids = np.full((2, len(pages)), -1, np.int32)
    page_ids(source, target, moves, ids)
    assert ids.T.tolist() == [[layer * 8 + a, layer * 11 + b] for layer, a, b in pages]


@given(moves=all_moves())
def test_page_lists_name_each_page_once(moves):
    if not moves:
        return
    source, target = PagePool(make_layout(8), 0), PagePool(make_layout(11), 0)
    numbers = np.full(100, -1, np.int32)
    used = []

    def room(num_ids):
        used.append(num_ids)
        return numbers[:num_ids]

    num_layers, num_pairs = page_list(source, target, moves, room)
    assert used == [num_layers + 2 * num_pairs]
    layers, src, dst = np.split(numbers[: used[0]], [num_layers, num_layers + num_pairs])
    named = [(8 * n + a, 11 * n + b) for n in layers for a, b in zip(src, dst, strict=True)]
    pages = [(m.layer, a, b) for m in moves for a, b in zip(m.pairs.src, m.pairs.dst, strict=True)]
    assert named == [(8 * layer + a, 11 * layer + b) for layer, a, b in pages]
    if all(move.pairs is moves[0].pairs for move in moves):
        assert num_layers == len(moves)  # a list of blocks, not of pages


# ---- through the seam, in the interpreter: a fake device whose copies are the kernel's


class KernelDevice(HostDevice):
    def __init__(self, fabric, name="host:0", **options):
        super().__init__(fabric, name, **options)
        self.copier = PageCopier(None)
        self.num_launches = 0

    def copy_pages(self, source, target, moves, after):
        if after is not None:
            self._put(self._side, after.done)
        moves = list(moves)

        def operation():
            launched(self.copier, source, target, moves, num_ctas=3)
            return True

        self._put(self._side, operation)
        self.num_launches += 1
        return self.copy([], None)


@pytest.fixture
def pair():
    """Producer's and consumer's pages, the producer's transport and its link."""
    if ON_GPU:
        pytest.skip("kernels of host memory run in the interpreter only")
    fabric = HostFabric()
    device = KernelDevice(fabric, manual=True)
    source = HostPages.create(make_layout(8), device)
    target = HostPages.create(make_layout(11), HostDevice(fabric, "host:1"))
    source.array[:] = np.random.default_rng(1).integers(0, 256, source.array.shape, np.uint8)
    producer = create_transport("mapped", source, "prefill-0", TransportOptions())
    consumer = create_transport("mapped", target, "decode-0", TransportOptions())
    link = producer.connect(target.layout, Descriptor(consumer.descriptor().data))
    yield source, target, producer, link
    link.close()
    device.run()
    for closable in (producer, consumer, source, target):
        closable.close()


def sent(link, producer):
    """The report of the one transfer; it may come from the thread that waits for the device."""
    end = time.monotonic() + 10
    while True:
        for news in link.poll():
            assert isinstance(news, Sent)
            return news.report
        assert time.monotonic() < end, "nothing was reported"
        select.select([producer.fileno()], [], [], 0.02)


@given(moves=all_moves())
@settings(max_examples=10, deadline=None)
def test_the_copier_does_what_runs_do(moves):
    if ON_GPU:
        pytest.skip("kernels of host memory run in the interpreter only")
    fabric = HostFabric()
    device = KernelDevice(fabric)
    source = HostPages.create(make_layout(8), device)
    targets = [HostPages.create(make_layout(11), device) for _ in range(2)]
    source.array[:] = np.random.default_rng(2).integers(0, 256, source.array.shape, np.uint8)
    for target, copy in zip(
        targets, (device.copy_pages, super(KernelDevice, device).copy_pages), strict=True
    ):
        copy(
            PagePool(source.layout, source.address),
            PagePool(target.layout, target.address),
            moves,
            None,
        )
    assert np.array_equal(targets[0].array, targets[1].array)
    for pages in (source, *targets):
        pages.close()


def test_a_late_reservation_is_one_launch_for_all_layers(pair):
    source, target, producer, link = pair
    for layer in range(3):
        producer.device.written(layer)
    src, dst = [5, 0, 1, 7], [2, 9, 10, 0]
    link.begin("a", [b"k"] * 4)
    for layer in range(3):
        link.send("a", layer, 0, src, dst)
    link.flush("a")
    link.finish("a")
    assert producer.device.num_launches == 1
    assert not target.array.any()
    producer.device.run()
    assert np.array_equal(target.array[:, dst], source.array[:, src])
    assert not target.array[:, [1, 3, 4, 5, 6, 7, 8]].any()
    report = sent(link, producer)
    assert (report.num_pieces, report.num_bytes) == (3 * 3, 4 * source.layout.block_bytes)


def test_a_batch_waits_for_the_latest_writes_of_its_layers(pair):
    """In the middle of a step: layer 0 was just launched, layers 1 and 2 are of the step before."""
    source, target, producer, link = pair
    device = producer.device
    for layer in range(3):
        device.written(layer)
    device.run()
    device.launch(lambda: source.array[0].fill(7))
    device.written(0)
    link.begin("a", [b"k"])
    for layer in range(3):
        link.send("a", layer, 0, [4], [3])
    link.finish("a")
    device.run_copies()
    assert not target.array.any()
    device.run()
    assert (target.array[0, 3] == 7).all()
    assert np.array_equal(target.array[:, 3], source.array[:, 4])


def test_lists_of_pages_in_use_are_not_overwritten():
    if ON_GPU:
        pytest.skip("kernels of host memory run in the interpreter only")

    class Pending:
        reached = False

        def done(self):
            return self.reached

    layout = make_layout()
    memory = np.zeros(layout.total_bytes, np.uint8)
    pool = PagePool(layout, memory.ctypes.data)
    copier = PageCopier(None)
    del copier._ids[1:]
    first = launched(copier, pool, pool, [PageMove(0, BlockPairs([1], [1]))])
    first.busy = Pending()
    kept = first.array[:2].copy()
    second = launched(copier, pool, pool, [PageMove(0, BlockPairs([2], [2]))])
    assert second is not first and np.array_equal(first.array[:2], kept)
    first.busy.reached = True
    assert launched(copier, pool, pool, [PageMove(0, BlockPairs([3], [3]))]) is first


def test_the_list_that_was_used_longest_ago_is_next_and_long_lists_come_as_needed():
    copier = PageCopier(None)
    lists = list(copier._ids)
    assert [copier._free_ids(10) for _ in range(len(lists) + 1)] == [*lists, lists[0]]
    long = copier._free_ids(len(lists[0].array) + 1)
    assert long not in lists and len(long.array) > len(lists[0].array)
    assert copier._free_ids(len(long.array)) is long
    assert copier._free_ids(10) is lists[1]


def test_a_closed_copier_holds_no_page_lists_whoever_holds_it():
    copier = PageCopier(None)
    lists = [weakref.ref(ids) for ids in copier._ids]
    copier.close()
    assert lists and all(ref() is None for ref in lists)


class FakeCompiled:
    """Stands for what Triton compiled, which only a GPU launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def launch(source, target, numbers, *rest, stream):
            assert [type(a) for a in (source, target, numbers, *rest)] == [int] * 10
            self.launches.append((grid, stream, rest))

        return launch


def test_what_is_compiled_is_launched_by_addresses_on_the_stream():
    if ON_GPU:
        pytest.skip("a copier over memory of the host")
    layout = make_layout()
    memory = np.zeros(layout.total_bytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    pool = PagePool(layout, memory.ctypes.data + start)
    odd = PagePool(layout, pool.address + 8)
    copier = PageCopier(None, stream=77)
    plan = chunk_plan(layout.layer_block_bytes)
    kernel = FakeCompiled()
    copier._compiled[plan, True, True] = kernel
    pairs = BlockPairs([1, 2], [5, 4])
    moves = [PageMove(layer, pairs) for layer in (0, 2)]
    ids = launched(copier, pool, pool, moves, num_ctas=3)
    assert ids.array[:6].tolist() == [0, 2, 1, 2, 5, 4]
    assert kernel.launches == [((3, 1, 1), 77, (2, 2, 8, 8, 4, plan.words, plan.chunk))]
    launched(copier, odd, pool, moves, num_ctas=3)  # compiled for another alignment: not this one
    assert len(kernel.launches) == 1
    copier.close()
