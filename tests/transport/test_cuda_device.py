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

    def __init__(self, driver):
        self._driver = driver
        self.forgotten = []

    def launch(self, source, target, moves, *, num_ctas):
        self._driver.calls.append(("kernel", len(moves), num_ctas))
        self.ids = self.Ids()
        return self.ids

    def forget(self, address):
        self.forgotten.append(address)

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


def test_a_closed_mapping_is_forgotten_before_it_goes():
    device = make_device()
    device.close_peer(TARGET.address)
    assert device._copier.forgotten == [TARGET.address]
    device.close()


def test_page_lists_are_freed_before_the_stream_that_used_them():
    device = make_device()
    device.close()
    device.close()  # twice is once
    assert kinds(device) == ["copier closed", "destroy"]
