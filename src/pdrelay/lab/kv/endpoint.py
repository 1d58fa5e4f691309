"""The producer's or the consumer's process of `pdrelay kv`: drives the transport seam and times it.

Run by `pair.py` as `python -m pdrelay.lab.kv.endpoint CONTROL_FD PEER_FD`.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from pdrelay.core.clock import monotonic_ns
from pdrelay.errors import PdrelayError, TransportError
from pdrelay.lab.kv.devices import Mark, PlainCopy, open_device
from pdrelay.lab.kv.wire import (
    Commit,
    Expect,
    Expecting,
    Landed,
    Peer,
    Reach,
    Sample,
    Setup,
    Transfer,
    Trouble,
    Up,
)
from pdrelay.transport.base import (
    Arrived,
    Descriptor,
    ProducerLink,
    Sent,
    TransferFailed,
    TransferReport,
    Transport,
)
from pdrelay.transport.registry import TransportOptions, create_transport

HANDSHAKE_S = 60.0
_IDLE_S = 3600.0  # for the next command; the parent's end shows at once
_RECHECK_S = 0.02  # a transport without a descriptor to wait on
COPY_VIA = "mapped"  # whose descriptor leads to the consumer's pool


def _not_computed() -> int:
    """The mark behind no computation."""
    return 0


N = TypeVar("N", Sent, Arrived)


def keys_of(transfer_id: str, count: int) -> list[bytes]:
    """Block keys that nothing else has, the same on both sides."""
    return [hashlib.sha256(f"{transfer_id}/{index}".encode()).digest() for index in range(count)]


class Endpoint:
    """What both sides hold: pages, and a transport of each kind over them."""

    def __init__(self, setup: Setup, fds: Sequence[int], stack: ExitStack) -> None:
        self.setup = setup
        self.device = open_device(setup.device)
        self.pages = self.device.create_pages(setup.layout)
        stack.callback(self.pages.close)
        is_producer = setup.role == "producer"
        self.transports: dict[str, Transport] = {}
        options = TransportOptions(
            timeout_s=setup.timeout_s,
            pool=setup.pool,
            pool_fd=fds[0] if fds else -1,
            instance_index=0 if is_producer else 1,
        )
        for name in dict.fromkeys([*setup.transports, COPY_VIA]):
            transport = create_transport(name, self.pages, setup.role, options)
            stack.callback(transport.close)
            self.transports[name] = transport

    def wait(
        self, name: str, kind: type[N], transfer_id: str, *polls: Callable[[], Sequence[object]]
    ) -> TransferReport:
        """The report of `kind` on a transfer. Raises TransportError when it failed or is late."""
        transport = self.transports[name]
        fd = transport.fileno()
        deadline = time.monotonic() + self.setup.timeout_s
        while True:
            for item in (item for poll in polls for item in poll()):
                if isinstance(item, TransferFailed):
                    raise TransportError(f"{name}: {item.message}")
                if isinstance(item, kind) and item.report.transfer_id == transfer_id:
                    return item.report
            if time.monotonic() > deadline:
                raise TransportError(f"{name}: no {kind.__name__} in {self.setup.timeout_s:g} s")
            select.select([] if fd is None else [fd], [], [], _RECHECK_S)


# ---- consumer


def consume(control: Peer, peer: Peer, endpoint: Endpoint) -> None:
    """Serve the producer until it closes."""
    for name, transport in endpoint.transports.items():
        descriptor = _descriptor(name, transport, endpoint.setup)
        peer.send(Reach(transport=name, data=descriptor.data), descriptor.fds)
    control.send(Up(device=endpoint.device.words))
    peer.set_timeout(_IDLE_S)
    while True:
        try:
            expect, _ = peer.receive(Expect)
        except TransportError:
            return  # the producer is done
        _take(peer, endpoint, expect)


def _descriptor(name: str, transport: Transport, setup: Setup) -> Descriptor:
    """Nothing where only the plain copy wants it and this host does not share device memory."""
    try:
        return transport.descriptor()
    except TransportError:
        if name in setup.transports:
            raise
        return Descriptor(b"")


def _take(peer: Peer, endpoint: Endpoint, expect: Expect) -> None:
    transport = endpoint.transports[expect.transport]
    transfer_id = expect.transfer_id
    keys = keys_of(transfer_id, len(expect.blocks))
    transport.expect(transfer_id, 0, expect.blocks, keys)
    peer.send(Expecting(transfer_id))
    commit, _ = peer.receive(Commit)
    transport.commit(transfer_id, commit.num_pages)
    report = endpoint.wait(expect.transport, Arrived, transfer_id, transport.poll)
    landed_ns = monotonic_ns()
    peer.send(
        Landed(
            transfer_id=transfer_id,
            landed_ns=landed_ns,
            busy_ns=report.busy_ns,
            checksum=endpoint.device.checksum(endpoint.pages, expect.blocks),
        )
    )


# ---- producer


class Producer:
    """Runs what the parent asks for."""

    def __init__(self, peer: Peer, endpoint: Endpoint, stack: ExitStack) -> None:
        self._peer = peer
        self._endpoint = endpoint
        self._links: dict[str, ProducerLink] = {}
        self._copy: PlainCopy | None = None
        endpoint.device.fill(endpoint.pages, seed=1)
        for _ in endpoint.transports:
            reach, fds = peer.receive(Reach)
            self._connect(reach.transport, Descriptor(reach.data, fds), stack)

    def _connect(self, name: str, descriptor: Descriptor, stack: ExitStack) -> None:
        """A link, and the way of the plain copy. Raises TransportError for a link asked for."""
        endpoint = self._endpoint
        try:
            if name == COPY_VIA:
                own = Descriptor(descriptor.data, tuple(os.dup(fd) for fd in descriptor.fds))
                self._copy = endpoint.device.plain_copy(endpoint.pages, own)
                stack.callback(self._copy.close)
            link = endpoint.transports[name].connect(endpoint.setup.layout, descriptor)
        except TransportError:
            if name in endpoint.setup.transports:
                raise
            return
        stack.callback(link.close)
        self._links[name] = link

    @property
    def has_copy(self) -> bool:
        return self._copy is not None

    def run(self, transfer: Transfer) -> Sample:
        match transfer.mode:
            case "copy":
                return self._plain(transfer)
            case "compute":
                return self._compute(transfer)
            case _:
                return self._transfer(transfer)

    def _plain(self, transfer: Transfer) -> Sample:
        if self._copy is None:
            raise TransportError("this device has no plain copy to compare with")
        num_bytes = len(transfer.src_blocks) * self._endpoint.setup.layout.block_bytes
        start = monotonic_ns()
        self._copy.copy(num_bytes)
        end = monotonic_ns()
        return Sample(
            transfer_id=transfer.transfer_id,
            start_ns=start,
            sent_ns=end,
            landed_ns=end,
            num_bytes=num_bytes,
            num_pieces=1,
            busy_ns=end - start,
        )

    def _compute(self, transfer: Transfer) -> Sample:
        start = monotonic_ns()
        device = self._endpoint.device
        for layer in range(self._endpoint.setup.layout.num_layers):
            device.compute(layer, transfer.units)
        return Sample(transfer_id=transfer.transfer_id, start_ns=start, computed_ns=device.mark()())

    def _transfer(self, transfer: Transfer) -> Sample:
        name, transfer_id = transfer.transport, transfer.transfer_id
        endpoint, link = self._endpoint, self._links[name]
        transport = endpoint.transports[name]
        src, layers = transfer.src_blocks, endpoint.setup.layout.num_layers
        dst = transfer.dst_blocks if transport.capabilities.needs_slots else []
        keys = keys_of(transfer_id, len(src))
        expect = Expect(transfer_id=transfer_id, transport=name, blocks=transfer.dst_blocks)
        self._peer.send(expect)
        self._peer.receive(Expecting)
        computed: Mark = _not_computed
        start = monotonic_ns()
        link.begin(transfer_id, keys)
        for layer in range(layers):
            if transfer.mode == "layerwise":
                endpoint.device.compute(layer, transfer.units)
                computed = endpoint.device.mark()
            link.send(transfer_id, layer, 0, src, dst)
            if transfer.mode == "layerwise":
                link.flush(transfer_id)
        link.finish(transfer_id)
        computed_ns = computed()
        report = endpoint.wait(name, Sent, transfer_id, link.poll, transport.poll)
        sent = monotonic_ns()
        self._peer.send(Commit(transfer_id=transfer_id, num_pages=layers * len(src)))
        landed, _ = self._peer.receive(Landed)
        return Sample(
            transfer_id=transfer_id,
            start_ns=start,
            computed_ns=computed_ns,
            sent_ns=sent,
            landed_ns=landed.landed_ns,
            num_bytes=report.num_bytes,
            num_pieces=report.num_pieces,
            busy_ns=report.busy_ns,
            taken_ns=landed.busy_ns,
            damaged=landed.checksum != endpoint.device.checksum(endpoint.pages, src),
        )


def produce(control: Peer, peer: Peer, endpoint: Endpoint, stack: ExitStack) -> None:
    """Serve the parent until it closes."""
    producer = Producer(peer, endpoint, stack)
    rates = endpoint.device.calibrate()
    up = Up(
        unit_ns=rates.unit_ns,
        flops_per_s=rates.flops_per_s,
        rate=rates.words,
        device=endpoint.device.words,
        has_copy=producer.has_copy,
    )
    control.send(up)
    control.set_timeout(_IDLE_S)
    while True:
        try:
            transfer, _ = control.receive(Transfer)
        except TransportError:
            return  # the parent is done
        control.send(producer.run(transfer))


def main(control_fd: int, peer_fd: int) -> int:
    control = Peer(socket.socket(fileno=control_fd), HANDSHAKE_S)
    peer = Peer(socket.socket(fileno=peer_fd), HANDSHAKE_S)
    try:
        with ExitStack() as stack:
            setup, fds = control.receive(Setup)
            endpoint = Endpoint(setup, fds, stack)
            if setup.role == "producer":
                produce(control, peer, endpoint, stack)
            else:
                consume(control, peer, endpoint)
        return 0
    except (PdrelayError, OSError) as error:
        trouble = Trouble(" ".join(str(error).split()))
        for end in (control, peer):
            try:
                end.send(trouble)
            except TransportError:
                continue  # that end is gone
        return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
