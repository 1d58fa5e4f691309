"""The devices that `pdrelay kv` measures on; the GPU's against stand-ins for its modules."""

from __future__ import annotations

import os
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.lab.kv import devices
from pdrelay.lab.kv.cuda_device import Cuda
from pdrelay.lab.kv.devices import Cpu, open_device
from pdrelay.lab.kv.endpoint import _descriptor
from pdrelay.lab.kv.wire import Setup
from pdrelay.transport.base import Descriptor

LAYOUT = KVLayout(
    num_layers=2, num_blocks=4, block_size=4, num_kv_heads=2, head_dim=4, dtype="float32"
)


def test_a_plain_copy_on_cpu_reaches_the_other_pool():
    cpu = Cpu()
    here, there = cpu.create_pages(LAYOUT), cpu.create_pages(LAYOUT)
    cpu.fill(here, seed=3)
    assert cpu.checksum(here, [0, 3]) != cpu.checksum(here, [3, 0])
    copy = cpu.plain_copy(here, Descriptor(b"", (os.dup(there.fd),)))
    copy.copy(LAYOUT.layer_block_bytes * 3)
    copy.close()
    flat = LAYOUT.layer_block_bytes * 3
    assert np.array_equal(here.array.reshape(-1)[:flat], there.array.reshape(-1)[:flat])
    assert not there.array.reshape(-1)[flat:].any()
    for pages in (here, there):
        pages.close()


def test_rates_on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_CALIBRATION_S", 0.01)
    rates = Cpu().calibrate()
    assert rates.unit_ns > 0 and rates.flops_per_s > 1e8 and "float32" in rates.words


@pytest.mark.parametrize("name", ["tpu", "cuda:x"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(TransportError, match="write cpu or cuda:N"):
        open_device(name)


class StubTensor:
    def __init__(self):
        self.products = 0

    def new_empty(self, shape):
        return StubTensor()

    def normal_(self):
        return self

    def matmul(self, other):
        self.products += 1


class StubGpu:
    """A stream that is over when waited for."""

    def __init__(self):
        self.calls = []

    def make_current(self):
        self.calls.append("current")

    def launched(self):
        return SimpleNamespace(wait=lambda: self.calls.append("wait"))

    def written(self, layer):
        self.calls.append(("written", layer))

    def open_peer(self, handle, num_bytes):
        self.calls.append(("open", handle, num_bytes))
        return 9000

    def close_peer(self, address):
        self.calls.append(("close", address))

    def copy(self, runs, after):
        self.calls.append(("copy", *runs, after))
        return SimpleNamespace(wait=lambda: self.calls.append("copied"))


class StubDescriptor(msgspec.Struct):
    handle: bytes
    num_bytes: int


@pytest.fixture
def gpu():
    return StubGpu()


@pytest.fixture
def cuda(gpu):
    pages = SimpleNamespace(tensor=StubTensor(), device=gpu, address=100, layout=LAYOUT)
    create = SimpleNamespace(create=lambda layout, ordinal: pages)
    return Cuda(
        SimpleNamespace(CudaPages=create),
        SimpleNamespace(DeviceDescriptor=StubDescriptor),
        SimpleNamespace(Run=lambda dst, src, num_bytes: (dst, src, num_bytes)),
        ordinal=1,
    )


def test_a_plain_copy_between_gpus_is_one_run_that_is_waited_for(cuda, gpu):
    pages = cuda.create_pages(LAYOUT)
    data = msgspec.msgpack.encode(StubDescriptor(b"h", 4096))
    copy = cuda.plain_copy(pages, Descriptor(data))
    copy.copy(512)
    copy.close()
    assert gpu.calls == [
        "current", ("open", b"h", 4096), ("copy", (9000, 100, 512), None), "copied", ("close", 9000)
    ]  # fmt: skip


def test_computation_on_a_gpu_announces_its_layer(cuda, gpu):
    cuda.create_pages(LAYOUT)
    cuda.compute(1, 3)
    mark = cuda.mark()
    assert gpu.calls == ["current", ("written", 1)]
    assert mark() > 0 and gpu.calls[-1] == "wait"


def test_without_shared_device_memory_only_what_needs_it_is_left_out():
    class Refusing:
        def descriptor(self):
            raise TransportError("not between containers")

    setup = Setup(
        role="consumer",
        device="cuda:0",
        layout=LAYOUT,
        transports=("tcp",),
        timeout_s=1.0,
        pool=b"",
    )
    assert _descriptor("mapped", Refusing(), setup) == Descriptor(b"")
    with pytest.raises(TransportError, match="between containers"):
        _descriptor("tcp", Refusing(), setup)
