"""When a link over a device starts to copy: behind how much, and each page once."""

from __future__ import annotations

import select
import time

import numpy as np
import pytest

from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import TransportError
from pdrelay.transport import device_mapped
from pdrelay.transport.base import Descriptor, Sent, Stopped
from pdrelay.transport.host_device import HostDevice, HostFabric, HostPages
from pdrelay.transport.registry import TransportOptions, create_transport

LAYOUT = KVLayout(
    num_layers=12, num_blocks=8, block_size=4, num_kv_heads=2, head_dim=4, dtype="float32"
)
SRC, DST = [5, 0, 1], [2, 6, 7]


@pytest.fixture
def rig(monkeypatch):
    """Source and target pages, the producer's transport and its link; a round starts at 3 blocks
    of a layer, the next one at 6, then 12."""
    monkeypatch.setattr(device_mapped, "ROUND_BYTES", 3 * LAYOUT.layer_block_bytes)
    monkeypatch.setattr(device_mapped, "BATCH_BYTES", 1 << 40)
    fabric = HostFabric()
    device = HostDevice(fabric, manual=True)
    source = HostPages.create(LAYOUT, device)
    target = HostPages.create(LAYOUT, HostDevice(fabric, "host:1"))
    source.array[:] = np.random.default_rng(1).integers(1, 256, source.array.shape, np.uint8)
    producer = create_transport("mapped", source, "prefill-0", TransportOptions())
    consumer = create_transport("mapped", target, "decode-0", TransportOptions())
    link = producer.connect(LAYOUT, Descriptor(consumer.descriptor().data))
    for layer in range(LAYOUT.num_layers):
        device.written(layer)
    yield source, target, producer, link
    link.close()
    device.run()
    for closable in (producer, consumer, source, target):
        closable.close()


def news(link, producer):
    end = time.monotonic() + 10
    while True:
        for each in link.poll():
            return each
        assert time.monotonic() < end, "nothing was reported"
        select.select([producer.fileno()], [], [], 0.02)


def test_a_long_round_starts_before_it_is_over_in_ever_larger_batches(rig):
    source, target, producer, link = rig
    link.begin("a", [b"k"] * 3)
    batches = []
    for layer in range(LAYOUT.num_layers):
        link.send("a", layer, 0, SRC, DST)
        batches.append(producer.device.num_copies)
    assert batches == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    link.finish("a")
    assert producer.device.num_copies == 4
    assert producer.device.num_runs == 2 * LAYOUT.num_layers
    assert not target.array.any()  # behind the writes of the layers
    producer.device.run()
    assert np.array_equal(target.array[:, DST], source.array[:, SRC])
    assert not target.array[:, [0, 1, 3, 4, 5]].any()
    sent = news(link, producer)
    assert isinstance(sent, Sent)
    assert sent.report.num_bytes == 3 * LAYOUT.block_bytes
    assert sent.report.num_pieces == 2 * LAYOUT.num_layers


def test_a_flush_begins_a_round_anew(rig):
    _, _, producer, link = rig
    link.begin("a", [b"k"] * 3)
    for layer in range(3):
        link.send("a", layer, 0, SRC, DST)
    assert producer.device.num_copies == 2
    link.flush("a")
    link.send("a", 3, 0, SRC, DST)
    assert producer.device.num_copies == 3
    link.finish("a")
    producer.device.run()
    assert isinstance(news(link, producer), Sent)


def test_what_started_early_is_waited_for_when_the_transfer_is_aborted(rig):
    source, target, producer, link = rig
    link.begin("a", [b"k"] * 3)
    for layer in range(2):  # the second one is queued
        link.send("a", layer, 0, SRC, DST)
    assert not link.abort("a")
    assert link.poll() == []
    producer.device.run()
    assert news(link, producer) == Stopped("a")
    assert np.array_equal(target.array[0, DST], source.array[0, SRC])
    assert not target.array[1:].any()
    with pytest.raises(TransportError, match="not open"):
        link.send("a", 2, 0, SRC, DST)


def test_a_closed_link_says_so_to_what_is_sent(rig):
    *_, link = rig
    link.begin("a", [b"k"] * 3)
    link.close()
    with pytest.raises(TransportError, match="the link is closed"):
        link.send("a", 0, 0, SRC, DST)
