"""Which way a CudaDevice copies pages, and behind what: over a driver that only writes down."""

from __future__ import annotations

import itertools

import pytest

from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.cuda.device import CudaDevice
from pdrelay.transport.device import BlockPairs, PageMove, PagePool, Run

PAGE = 1 << 20
LAYOUT = KVLayout(
    num_layers=4, num_blocks=32, block_size=256, num_kv_heads=8, head_dim=128, dtype="bfloat16"
)
SOURCE, TARGET = PagePool(LAYOUT, 1 << 40), PagePool(LAYOUT, 1 << 41)


class FakeDriver:
    has_batch = True
    compute_is_idle = False

    def __init__(self):
        self.calls = []
        self.destroyed = []
        self._handles = itertools.count(100)

    def num_devices(self):
        return 1

    def uuid(self, ordinal):
        return "u"

    def context(self, ordinal):
        return 1

    def num_multiprocessors(self, ordinal):
        return 132

    def idle(self, stream):
        return self.compute_is_idle

    def make_current(self, context):
        pass

    def create_stream(self):
        return next(self._handles)

    def destroy_stream(self, stream):
        self.calls.append(("destroy", stream))

    def create_event(self, *, timing):
        return next(self._handles)

    def destroy_event(self, event):
        self.destroyed.append(event)

    def record(self, event, stream):
        self.calls.append(("record", event, stream))

    def wait_event(self, stream, event):
        self.calls.append(("wait", event, stream))

    def copy(self, run, stream):
        self.calls.append(("copy", run))

    def copy_batch(self, runs, stream):
        self.calls.append(("batch", list(runs)))
        return True

    def close_ipc(self, address):
        self.calls.append(("close", address))


class FakeCopier:
    """Stands for PageCopier."""

    class Ids:
        busy = None

    class Launch:
        pass

    def __init__(self, driver):
        self._driver = driver

    def prepare(self, source, target, moves, *, num_ctas):
        self.ids = self.Ids()
        launch = self.Launch()
        call = ("kernel", len(moves), num_ctas)
        launch.ids, launch.enqueue = self.ids, lambda: self._driver.calls.append(call)
        return launch

    def close(self):
        self._driver.calls.append(("copier closed",))


def make_device(*, triton=True, **options):
    device = CudaDevice(0, FakeDriver(), **options)
    if triton:
        device._copier = FakeCopier(device.driver)
    return device


def kinds(device):
    return [call[0] for call in device.driver.calls]


SHORT = [PageMove(layer, BlockPairs([3, 9, 1], [0, 5, 7])) for layer in range(4)]
LONG = [PageMove(layer, BlockPairs(range(8), range(20, 28))) for layer in range(4)]


@pytest.mark.parametrize(
    ("options", "moves", "way"),
    [
        ({}, SHORT, "kernel"),
        ({}, LONG, "batch"),
        ({"page_copies": "kernel"}, LONG, "kernel"),
        ({"page_copies": "driver"}, SHORT, "batch"),
        ({"triton": False}, SHORT, "batch"),
        ({"triton": False, "page_copies": "kernel"}, SHORT, "batch"),
    ],
)
def test_who_copies(options, moves, way):
    device = make_device(**options)
    copy = device.copy_pages(SOURCE, TARGET, moves, None)
    assert kinds(device) == ["record", way, "record"]
    if way == "kernel":
        assert device.driver.calls[1] == ("kernel", 4, 16)
        assert device._copier.ids.busy is copy
    device.close()


def test_the_driver_gets_the_moves_as_runs():
    device = make_device(triton=False)
    moves = [PageMove(1, BlockPairs([4, 5, 9], [7, 8, 0])), PageMove(3, BlockPairs([2], [2]))]
    device.copy_pages(SOURCE, TARGET, moves, None)
    runs = [
        Run(TARGET.address + (32 + 7) * PAGE, SOURCE.address + (32 + 4) * PAGE, 2 * PAGE),
        Run(TARGET.address + 32 * PAGE, SOURCE.address + (32 + 9) * PAGE, PAGE),
        Run(TARGET.address + (96 + 2) * PAGE, SOURCE.address + (96 + 2) * PAGE, PAGE),
    ]
    assert device.driver.calls[1] == ("batch", runs)
    device.close()


@pytest.mark.parametrize("moves", [SHORT, LONG])
def test_copies_wait_for_the_latest_writes_of_their_layers(moves):
    device = make_device()
    for layer in (0, 1, 2, 3, 0):  # the next step has begun
        device.written(layer)
    (*_, latest) = [call[1] for call in device.driver.calls]
    device.driver.calls.clear()
    device.copy_pages(SOURCE, TARGET, moves, device.writes_of(*range(4)))
    assert device.driver.calls[0][:2] == ("wait", latest)
    assert kinds(device)[1:2] == ["record"]
    device.close()


def test_a_layer_that_was_never_written_waits_for_all_that_was_launched():
    device = make_device()
    device.written(0)
    event = device.writes_of(0, 1)
    assert device.driver.calls[-1] == ("record", event.handle, device.compute_stream)
    assert event.handle != device.driver.calls[0][1]
    device.close()


@pytest.mark.parametrize(
    ("num_blocks", "block_runs", "way"),
    [
        (1, 1, "batch"),  # 4 runs: cheaper than a launch
        (4, 4, "kernel"),  # 16 runs of 1 MiB
        (8, 2, "batch"),  # 8 runs of 4 MiB
        (8, 4, "batch"),  # 16 runs of 2 MiB
        (8, 8, "kernel"),
    ],
)
def test_long_runs_and_few_are_the_drivers(num_blocks, block_runs, way):
    device = make_device()
    length = num_blocks // block_runs
    src = [3 * run * length + i for run in range(block_runs) for i in range(length)]
    pairs = BlockPairs(src, list(range(num_blocks)))
    assert pairs.num_runs == block_runs
    device.copy_pages(SOURCE, TARGET, [PageMove(layer, pairs) for layer in range(4)], None)
    assert kinds(device) == ["record", way, "record"]
    device.close()


@pytest.mark.parametrize(
    ("num_blocks", "idle", "page_copies", "num_ctas"),
    [
        (8, True, "auto", 132),
        (8, False, "auto", 16),  # something computes
        (7, True, "auto", 16),  # not worth it
        (8, True, "kernel", 16),  # as told
    ],
)
def test_much_on_an_idle_device_takes_all_of_it(num_blocks, idle, page_copies, num_ctas):
    device = make_device(page_copies=page_copies)
    device.driver.compute_is_idle = idle
    pairs = BlockPairs(list(range(0, 2 * num_blocks, 2)), list(range(num_blocks)))
    device.copy_pages(SOURCE, TARGET, [PageMove(layer, pairs) for layer in range(4)], None)
    assert device.driver.calls[1] == ("kernel", 4, num_ctas)
    device.close()


def test_events_are_used_again_once_nobody_holds_them_and_destroyed_at_the_end():
    device = make_device()
    first = device.launched()
    held, timed = first.handle, device.copy([Run(1, 2, 3)], None)
    assert device.launched().handle != held  # that one is free again
    others = [device.launched() for _ in range(3)]
    assert held not in [event.handle for event in others]
    del first
    assert device.launched().handle == held
    end = timed._end.handle
    del timed
    assert end not in [device.launched().handle for _ in range(8)]  # it keeps time
    del others
    assert device.driver.destroyed == []
    device.close()
    created = next(device.driver._handles) - 101  # less the side stream
    assert len(device.driver.destroyed) == len(set(device.driver.destroyed)) == created
    late = make_device()
    event = late.launched()
    late.close()
    del event  # with its context


def test_all_is_prepared_before_the_clock_starts():
    device = make_device()
    calls = device.driver.calls
    prepare = device._copier.prepare

    def prepared(*arguments, **options):
        calls.append(("prepare",))
        return prepare(*arguments, **options)

    device._copier.prepare = prepared
    device.copy_pages(SOURCE, TARGET, SHORT, device.launched())
    assert kinds(device)[1:] == ["prepare", "wait", "record", "kernel", "record"]
    device.close()


def test_page_lists_are_freed_before_the_stream_that_used_them():
    device = make_device()
    device.close()
    device.close()  # twice is once
    assert kinds(device) == ["copier closed", "destroy"]
