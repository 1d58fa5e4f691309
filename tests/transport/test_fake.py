"""The fake transport does on request what the others do by accident."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transport_kit import Kit, Transfer, assert_canaries, make_layout

from pdrelay.core.clock import FakeClock
from pdrelay.errors import ConfigError, TransportError
from pdrelay.transport.base import Arrived, TransferFailed
from pdrelay.transport.checksum import checksum
from pdrelay.transport.fake import FakeFabric, FakeTransport, Fault
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.registry import TransportOptions, create_transport


@pytest.fixture
def kit():
    with Kit("fake") as kit:
        yield kit


def transfer_of(kit, name="a"):
    p, d = kit.pair()
    return p, d, Transfer(p.connect(d), p, d, name, range(4), range(4))


def test_fail_is_told_to_the_producer_and_delivers_nothing_of_that_send(kit):
    p, d, transfer = transfer_of(kit)
    kit.fabric.inject(Fault.FAIL, "a", nth_send=1)
    transfer.expect().begin().send_all().finish()
    assert "injected" in p.wait(TransferFailed, "a").message
    assert len(p.news_of("a")) == 1
    assert (d.pages.array[1:] == 0xA5).all()


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_corrupt_arrives_and_the_checksum_finds_it(kit, mode):
    _, d, transfer = transfer_of(kit)
    kit.fabric.inject(Fault.CORRUPT)
    transfer.run()
    p = transfer.producer
    assert checksum(p.pages, transfer.src, mode) != checksum(d.pages, transfer.dst, mode)


def test_break_raises_from_then_on(kit):
    _, _, transfer = transfer_of(kit)
    kit.fabric.inject(Fault.BREAK, nth_send=2)
    transfer.expect().begin()
    transfer.send(0)
    transfer.send(1)
    for _ in range(2):
        with pytest.raises(TransportError, match="broke"):
            transfer.send(2)


def test_rules_apply_once_and_to_the_transfer_they_name(kit):
    p, d = kit.pair()
    link = p.connect(d)
    kit.fabric.inject(Fault.FAIL, "b")
    Transfer(link, p, d, "a", range(4), range(4)).run()
    Transfer(link, p, d, "b", range(4), range(4)).expect().begin().send_all().finish()
    p.wait(TransferFailed, "b")
    d.transport.abort("b")
    Transfer(link, p, d, "c", range(4), range(4)).run()


def test_stall_and_resume(kit):
    p, d, transfer = transfer_of(kit)
    kit.fabric.inject(Fault.STALL, nth_send=1)
    transfer.expect().begin().send_all().finish()
    assert p.news_of("a") == []
    transfer.commit()  # overtakes the data
    assert d.news_of("a") == []
    kit.fabric.resume()
    d.wait(Arrived, "a")
    transfer.assert_moved()
    assert_canaries(d, transfer.dst)


def test_a_stall_ends_in_failure_on_both_sides_at_the_deadline():
    clock, fabric, layout = FakeClock(1), FakeFabric(), make_layout()
    pages = [SharedPages.create(layout) for _ in range(2)]
    p, d = (
        FakeTransport(page, name, fabric, timeout_s=2.0, clock=clock)
        for page, name in zip(pages, ("p", "d"), strict=True)
    )
    link = p.connect(layout, d.descriptor())
    fabric.inject(Fault.STALL)
    d.expect("a", 0, [0], [bytes(32)])
    link.begin("a", [bytes(32)])
    for layer in range(layout.num_layers):
        link.send("a", layer, 0, [0], [0])
    link.finish("a")
    clock.advance(1.0)
    d.commit("a", layout.num_layers)
    assert link.poll() == d.poll() == []
    clock.advance(1.0)
    assert [type(news) for news in link.poll()] == [TransferFailed]
    assert d.poll() == []
    clock.advance(1.0)
    assert [type(news) for news in d.poll()] == [TransferFailed]
    fabric.resume()
    assert link.poll() == d.poll() == []
    assert not pages[1].array.any()
    for part in (link, p, d, *pages):
        part.close()


def test_a_transfer_aborted_while_it_stalls_stays_away(kit):
    p, d, transfer = transfer_of(kit)
    kit.fabric.inject(Fault.STALL)
    transfer.expect().begin().send_all().finish()
    transfer.link.abort("a")
    kit.fabric.resume()
    assert p.news_of("a") == []
    assert_canaries(d)


def test_the_registry(kit):
    side = kit.side("x")
    with pytest.raises(ConfigError, match="mapped, nccl, tcp, pool, fake"):
        create_transport("carrier-pigeon", side.pages, "x", TransportOptions())
    with pytest.raises(ConfigError, match="tests"):
        create_transport("fake", side.pages, "x", TransportOptions())
    for name in ("mapped", "tcp", "fake"):
        transport = create_transport(name, side.pages, "x", TransportOptions(fabric=kit.fabric))
        assert transport.capabilities.name == name
        transport.close()


def test_no_torch_is_imported():
    script = (
        "import sys, pdrelay.transport.registry as r\n"
        "import pdrelay.transport.mapped, pdrelay.transport.tcp, pdrelay.transport.pool\n"
        "import pdrelay.transport.fake, pdrelay.transport.checksum\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
