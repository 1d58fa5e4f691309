"""Instances over one transport in one process, and the steps of a transfer, for tests."""

from __future__ import annotations

import hashlib
import os
import select
import time

import numpy as np
import pytest

from pdrelay.core.block_hash import tail_key
from pdrelay.core.kv_layout import KVLayout
from pdrelay.transport.base import Arrived, Descriptor, Sent, TransferFailed
from pdrelay.transport.fake import FakeFabric
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.nccl_fake import FakeNccl
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.pool import PoolHandle, create_pool
from pdrelay.transport.registry import TRANSPORTS, TransportOptions, create_transport

DEADLINE_S = 10.0
DEVICE_TRANSPORTS = ("mapped", "tcp", "pool")


def _has_cuda():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


no_gpu = pytest.mark.skipif(not _has_cuda(), reason="needs a CUDA GPU")
ALL = (
    *(name for name in TRANSPORTS if name != "nccl"),
    *(f"{name}@host" for name in (*DEVICE_TRANSPORTS, "nccl")),
    *(pytest.param(f"{name}@cuda", marks=no_gpu) for name in DEVICE_TRANSPORTS),
)
CANARY = 0xA5


def make_layout(num_blocks=24, num_layers=3, block_size=4) -> KVLayout:
    return KVLayout(
        num_layers=num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=2,
        head_dim=4,
        dtype="float32",
    )


def make_keys(transfer_id, num_blocks, *, tail=False):
    """Distinct keys, the same for the same transfer id; the last one unique if `tail`."""
    keys = [hashlib.sha256(f"{transfer_id}/{i}".encode()).digest() for i in range(num_blocks)]
    if tail:
        keys[-1] = tail_key(transfer_id)
    return keys


class Kit:
    """Makes instances, joins them, and takes everything down.

    `name` is a transport, over pages of the host; `name@host`: over pages of a fake device;
    `name@cuda`: over pages of a GPU.
    """

    def __init__(self, name, *, timeout_s=DEADLINE_S, num_slots=256):
        self.name, _, self.where = name.partition("@")
        self.host_fabric = HostFabric()
        self.nccl = FakeNccl()
        self.timeout_s = timeout_s
        self.fabric = FakeFabric()
        self.pool: PoolHandle | None = None
        self._num_slots = num_slots
        self._sides = []
        self._num_devices = 0

    def options(self, layout, index):
        if self.name == "pool" and self.pool is None:
            self.pool = create_pool(layout, self._num_slots)
        return TransportOptions(
            timeout_s=self.timeout_s,
            fabric=self.fabric,
            nccl=self.nccl,
            pool=self.pool.description if self.pool else b"",
            pool_fd=self.pool.fd if self.pool else -1,
            instance_index=index,
        )

    def pages(self, layout):
        if self.where == "host":
            self._num_devices += 1
            return HostPages.create(
                layout, HostDevice(self.host_fabric, f"host:{self._num_devices}")
            )
        if self.where == "cuda":
            from cuda_kit import make_pages

            return make_pages(layout, self.host_fabric)
        assert not self.where
        return SharedPages.create(layout)

    def side(self, name, layout=None, *, seed=None):
        """An instance: `seed` fills its pages at random, otherwise they are canaries."""
        layout = layout or make_layout()
        side = Side(self, name, layout, len(self._sides), seed)
        self._sides.append(side)
        return side

    def pair(self, **layouts):
        return self.side("prefill-0", layouts.get("p"), seed=1), self.side(
            "decode-0", layouts.get("d")
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for side in self._sides:
            side.close_links()
        for side in self._sides:
            side.close()
        if self.pool is not None:
            self.pool.close()
        assert not self.host_fabric.opened, "a mapping of a peer's pages was not closed"


class Side:
    def __init__(self, kit, name, layout, index, seed):
        self.kit = kit
        self.name = name
        self.layout = layout
        self.index = index
        self.pages = kit.pages(layout)
        if seed is None:
            self.pages.array[:] = CANARY
        else:
            rng = np.random.default_rng(seed)
            self.pages.array[:] = rng.integers(0, 256, self.pages.array.shape, np.uint8)
        self.transport = create_transport(kit.name, self.pages, name, kit.options(layout, index))
        self.links = []
        self.news = []  # of the transport and of all links
        self._closed = False

    def connect(self, consumer):
        """As over the peer socket: the link gets descriptors of its own."""
        descriptor = consumer.transport.descriptor()
        fds = tuple(os.dup(fd) for fd in descriptor.fds)
        link = self.transport.connect(consumer.layout, Descriptor(descriptor.data, fds))
        self.links.append(link)
        return link

    def poll(self):
        for link in self.links:
            self.news += link.poll()
        self.news += self.transport.poll()

    def wait(self, kind, transfer_id):
        """The news of `kind` about the transfer, once it is there."""
        end = time.monotonic() + DEADLINE_S
        while True:
            self.poll()
            for item in self.news:
                if isinstance(item, kind) and transfer_id_of(item) == transfer_id:
                    return item
            wrong = [i for i in self.news if transfer_id_of(i) == transfer_id]
            assert not wrong, f"waited for {kind.__name__}, got {wrong}"
            assert time.monotonic() < end, f"no {kind.__name__} of {transfer_id}"
            select.select([self.transport.fileno()], [], [], 0.02)

    def news_of(self, transfer_id):
        self.poll()
        return [item for item in self.news if transfer_id_of(item) == transfer_id]

    def close_links(self):
        for link in self.links:
            link.close()

    def close(self):
        if self._closed:
            return
        self._closed = True
        self.close_links()
        self.transport.close()
        self.pages.close()


def transfer_id_of(item):
    return item.transfer_id if isinstance(item, TransferFailed) else item.report.transfer_id


class Transfer:
    """One request's hand-over, step by step."""

    def __init__(self, link, producer, consumer, transfer_id, src, dst, *, first=0, keys=None):
        """`src` are the producer's blocks of the whole request, `dst` those from `first` on."""
        assert len(dst) == len(src) - first
        self.link, self.producer, self.consumer = link, producer, consumer
        self.id, self.src, self.dst, self.first = transfer_id, list(src), list(dst), first
        self.keys = keys or make_keys(transfer_id, len(src))
        self.num_layers = producer.layout.num_layers

    def expect(self):
        self.consumer.transport.expect(self.id, self.first, self.dst, self.keys)
        return self

    def begin(self):
        self.link.begin(self.id, self.keys)
        return self

    def send(self, layer, start=None, stop=None):
        """Request blocks `start .. stop` of one layer."""
        start = self.first if start is None else start
        stop = len(self.src) if stop is None else stop
        self.link.send(
            self.id,
            layer,
            start,
            self.src[start:stop],
            self.dst[start - self.first : stop - self.first]
            if self.producer.transport.capabilities.needs_slots
            else [],
        )

    def send_all(self):
        for layer in range(self.num_layers):
            self.send(layer)
        return self

    def finish(self):
        self.link.finish(self.id)
        return self

    @property
    def num_pages(self):
        return len(self.dst) * self.num_layers

    def commit(self):
        self.consumer.transport.commit(self.id, self.num_pages)

    def complete(self):
        """From `Sent` to `Arrived`; returns both."""
        sent = self.producer.wait(Sent, self.id)
        self.commit()
        return sent.report, self.consumer.wait(Arrived, self.id).report

    def run(self):
        return self.expect().begin().send_all().finish().complete()

    def assert_moved(self):
        sent = self.producer.pages.array[:, self.src[self.first :]]
        assert np.array_equal(self.consumer.pages.array[:, self.dst], sent)


def assert_canaries(side, *moved):
    """Nothing was written outside the blocks `moved`."""
    others = sorted(set(range(side.layout.num_blocks)) - {b for blocks in moved for b in blocks})
    assert (side.pages.array[:, others] == CANARY).all()


def open_fds():
    names = os.listdir("/proc/self/fd")  # names the descriptor of the listing itself, too
    return {name for name in names if os.path.lexists(f"/proc/self/fd/{name}")}
