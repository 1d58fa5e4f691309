"""Transport `fake`: in one process, it succeeds, fails, stalls or corrupts on request.

    fabric = FakeFabric()
    fabric.inject(Fault.CORRUPT, transfer_id="r7", nth_send=2)
    producer = FakeTransport(pages_p, "prefill-0", fabric)
    consumer = FakeTransport(pages_d, "decode-0", fabric)

For tests of whatever stands on a transport; no threads of its own, so a script of calls always
gives the same result.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from pdrelay.core.clock import Clock, monotonic_ns
from pdrelay.core.kv_layout import KVLayout
from pdrelay.errors import ConfigError, TransportError
from pdrelay.transport.base import (
    Arrived,
    Capabilities,
    Descriptor,
    HostLink,
    PrefixStore,
    ProducerLink,
    Sent,
    TransferFailed,
)
from pdrelay.transport.copying import (
    check_blocks,
    check_commit,
    check_compatible,
    check_layer,
    check_slots,
    close_fds,
    copy_layer,
    decode_descriptor,
)
from pdrelay.transport.device import Device
from pdrelay.transport.meter import Meter
from pdrelay.transport.news import Bell, NewsQueue
from pdrelay.transport.open_transfers import OpenTransfer, OpenTransfers
from pdrelay.transport.options import TransportOptions
from pdrelay.transport.pages import SharedPages

NAME = "fake"


class Fault(enum.Enum):
    """What happens to a `send`."""

    FAIL = enum.auto()  # the producer is told TransferFailed; nothing of it arrives
    STALL = enum.auto()  # this and later sends wait for `FakeFabric.resume`, or for the deadline
    CORRUPT = enum.auto()  # the pages arrive with one byte flipped
    BREAK = enum.auto()  # the link breaks: `send` raises TransportError from now on


@dataclass(frozen=True)
class Rule:
    """Applies once, to the `nth_send` (from 0) of `transfer_id`, or of any transfer if empty."""

    fault: Fault
    transfer_id: str = ""
    nth_send: int = 0


class FakeDescriptor(msgspec.Struct, frozen=True, tag=NAME):
    instance: str


class FakeFabric:
    """What the fake transports of one test share: who is there, and what is to go wrong.

    Consumers may live on another thread than producers, as engine loops do in tests.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._consumers: dict[str, FakeTransport] = {}
        self._rules: list[Rule] = []
        self._held: list[Callable[[], None]] = []

    def inject(self, fault: Fault, transfer_id: str = "", nth_send: int = 0) -> None:
        with self.lock:
            self._rules.append(Rule(fault, transfer_id, nth_send))

    def resume(self) -> None:
        """Deliver what stalled."""
        with self.lock:
            held, self._held = self._held, []
            for deliver in held:
                deliver()

    def hold(self, deliver: Callable[[], None]) -> None:
        self._held.append(deliver)

    def take_rule(self, transfer_id: str, nth_send: int) -> Fault | None:
        for rule in self._rules:
            if rule.transfer_id in ("", transfer_id) and rule.nth_send == nth_send:
                self._rules.remove(rule)
                return rule.fault
        return None

    def attach(self, transport: FakeTransport) -> None:
        with self.lock:
            self._consumers[transport.instance] = transport

    def detach(self, transport: FakeTransport) -> None:
        with self.lock:
            if self._consumers.get(transport.instance) is transport:
                del self._consumers[transport.instance]

    def consumer(self, instance: str) -> FakeTransport:
        """Raises TransportError when it is gone."""
        with self.lock:
            if instance not in self._consumers:
                raise TransportError(f"{instance} is gone")
            return self._consumers[instance]


@dataclass
class _Incoming:
    transfer_id: str
    due: int
    arrived: int = 0
    committed: int | None = None
    deadline_ns: int = 0
    meter: Meter = field(default_factory=Meter)


class FakeTransport:
    capabilities = Capabilities(
        name=NAME,
        needs_slots=True,
        prefix_store=False,
    )
    prefix_store: PrefixStore | None = None
    device: Device | None = None

    def __init__(
        self,
        pages: SharedPages,
        instance: str,
        fabric: FakeFabric,
        *,
        timeout_s: float = 30.0,
        clock: Clock = monotonic_ns,
    ) -> None:
        self.pages = pages
        self.instance = instance
        self.fabric = fabric
        self.clock = clock
        self.timeout_ns = int(timeout_s * 1e9)
        self.bell = Bell()
        self._news: NewsQueue[Arrived | TransferFailed] = NewsQueue(self.bell)
        self._incoming: dict[str, _Incoming] = {}
        self._closed = False
        fabric.attach(self)

    def descriptor(self) -> Descriptor:
        return Descriptor(msgspec.msgpack.encode(FakeDescriptor(self.instance)))

    def connect(self, layout: KVLayout, descriptor: Descriptor) -> ProducerLink:
        close_fds(descriptor.fds)
        check_compatible(self.pages.layout, layout)
        name = decode_descriptor(descriptor, FakeDescriptor).instance
        return FakeLink(self, self.fabric.consumer(name))

    def expect(
        self, transfer_id: str, first_block: int, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        check_blocks(blocks, self.pages.layout, "local")
        with self.fabric.lock:
            if transfer_id in self._incoming:
                raise TransportError(f"transfer {transfer_id} is expected already")
            due = len(blocks) * self.pages.layout.num_layers
            self._incoming[transfer_id] = _Incoming(transfer_id, due)

    def commit(self, transfer_id: str, num_pages: int) -> None:
        with self.fabric.lock:
            incoming = self._incoming.get(transfer_id)
            if incoming is None:
                return
            wrong = check_commit(num_pages, incoming.due)
            if wrong is not None:
                self._fail(incoming, wrong)
                return
            incoming.committed = num_pages
            incoming.deadline_ns = self.clock() + self.timeout_ns
            self._complete(incoming)

    def deliver(
        self,
        transfer_id: str,
        source: SharedPages,
        layer: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        *,
        corrupt: bool,
    ) -> int:
        """Take one send of a link; returns the pieces. Unknown transfers are discarded."""
        incoming = self._incoming.get(transfer_id)
        if incoming is None or self._closed:
            return 0
        start = self.clock()
        pieces = copy_layer(source.array, self.pages.array, layer, src_blocks, dst_blocks)
        if corrupt and dst_blocks:
            self.pages.array[layer, dst_blocks[0], 0] ^= 0xFF
        incoming.arrived += len(dst_blocks)
        num_bytes = len(dst_blocks) * self.pages.layout.layer_block_bytes
        incoming.meter.add(start, self.clock(), num_bytes, pieces)
        self._complete(incoming)
        return pieces

    def _complete(self, incoming: _Incoming) -> None:
        if incoming.committed is not None and incoming.arrived == incoming.committed:
            del self._incoming[incoming.transfer_id]
            self._news.put(Arrived(incoming.meter.report(incoming.transfer_id, NAME)))

    def _fail(self, incoming: _Incoming, message: str) -> None:
        del self._incoming[incoming.transfer_id]
        self._news.put(TransferFailed(incoming.transfer_id, message))

    def poll(self) -> list[Arrived | TransferFailed]:
        with self.fabric.lock:
            now = self.clock()
            for incoming in list(self._incoming.values()):
                if incoming.committed is not None and now >= incoming.deadline_ns:
                    self._fail(incoming, "the producer's pages did not arrive in time")
        return self._news.take()

    def abort(self, transfer_id: str) -> None:
        with self.fabric.lock:
            self._incoming.pop(transfer_id, None)

    def fileno(self) -> int:
        return self.bell.fileno()

    def close(self) -> None:
        with self.fabric.lock:
            self._closed = True
            self._incoming.clear()
        self.fabric.detach(self)
        self.bell.close()

    @property
    def closed(self) -> bool:
        return self._closed


@dataclass
class _Outgoing(OpenTransfer):
    num_sends: int = 0
    num_held: int = 0
    stalled: bool = False
    failed: bool = False
    deadline_ns: int = 0


class FakeLink(HostLink):
    def __init__(self, local: FakeTransport, remote: FakeTransport) -> None:
        self._local = local
        self._remote = remote
        self._news: NewsQueue[Sent | TransferFailed] = NewsQueue(local.bell)
        self._open: OpenTransfers[_Outgoing] = OpenTransfers()

    def begin(self, transfer_id: str, keys: Sequence[bytes]) -> None:
        self._check_remote()
        self._open.begin(_Outgoing(transfer_id))

    def _check_remote(self) -> None:
        if self._remote.closed:
            raise TransportError(f"{self._remote.instance} is gone")

    def send(
        self,
        transfer_id: str,
        layer: int,
        first_block: int,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> None:
        with self._local.fabric.lock:
            self._open.check_alive()
            self._check_remote()
            outgoing = self._open.sending(transfer_id)
            check_layer(layer, self._local.pages.layout)
            check_slots(src_blocks, dst_blocks)
            check_blocks(src_blocks, self._local.pages.layout, "local")
            check_blocks(dst_blocks, self._remote.pages.layout, "remote")
            if outgoing.failed:
                return
            fault = self._local.fabric.take_rule(transfer_id, outgoing.num_sends)
            outgoing.num_sends += 1
            match fault:
                case Fault.BREAK:
                    self._open.break_off("the link broke (injected)")
                    self._open.check_alive()
                case Fault.FAIL:
                    outgoing.failed = True
                    self._news.put(TransferFailed(transfer_id, "injected failure"))
                    return
                case Fault.STALL:
                    outgoing.stalled = True
                    outgoing.deadline_ns = self._local.clock() + self._local.timeout_ns
            piece = (layer, list(src_blocks), list(dst_blocks), fault is Fault.CORRUPT)
            if outgoing.stalled:
                outgoing.num_held += 1
                self._local.fabric.hold(lambda: self._deliver_held(outgoing, piece))
            else:
                self._deliver(outgoing, piece)

    def _deliver(self, outgoing: _Outgoing, piece: tuple[int, list[int], list[int], bool]) -> None:
        layer, src_blocks, dst_blocks, corrupt = piece
        start = self._local.clock()
        pieces = self._remote.deliver(
            outgoing.transfer_id,
            self._local.pages,
            layer,
            src_blocks,
            dst_blocks,
            corrupt=corrupt,
        )
        num_bytes = len(src_blocks) * self._local.pages.layout.layer_block_bytes
        outgoing.meter.add(start, self._local.clock(), num_bytes, pieces)

    def _deliver_held(
        self, outgoing: _Outgoing, piece: tuple[int, list[int], list[int], bool]
    ) -> None:
        if not self._open.is_open(outgoing):
            return
        self._deliver(outgoing, piece)
        outgoing.num_held -= 1
        if outgoing.num_held == 0:
            outgoing.stalled = False
            self._complete(outgoing)

    def finish(self, transfer_id: str) -> None:
        with self._local.fabric.lock:
            self._complete(self._open.finish(transfer_id))

    def _complete(self, outgoing: _Outgoing) -> None:
        if outgoing.failed:
            self._open.pop(outgoing.transfer_id)
        elif outgoing.finished and not outgoing.stalled:
            self._open.pop(outgoing.transfer_id)
            self._news.put(Sent(outgoing.meter.report(outgoing.transfer_id, NAME)))

    def poll(self) -> list[Sent | TransferFailed]:
        with self._local.fabric.lock:
            now = self._local.clock()
            for outgoing in self._open.all():
                late = outgoing.stalled and now >= outgoing.deadline_ns
                if (late or self._remote.closed) and not outgoing.failed:
                    reason = "took no data in time" if late else "is gone"
                    self._open.pop(outgoing.transfer_id)
                    message = f"{self._remote.instance} {reason}"
                    self._news.put(TransferFailed(outgoing.transfer_id, message))
        return self._news.take()

    def abort(self, transfer_id: str) -> bool:
        with self._local.fabric.lock:
            self._open.pop(transfer_id)
        return True

    def close(self) -> None:
        with self._local.fabric.lock:
            self._open.break_off("the link is closed")
            self._news.take()


def create(pages: SharedPages, instance: str, options: TransportOptions) -> FakeTransport:
    """Raises ConfigError: it connects nothing but the instances of one test."""
    if options.fabric is None:
        raise ConfigError("transport 'fake' is for tests in one process: choose another one")
    return FakeTransport(pages, instance, options.fabric, timeout_s=options.timeout_s)
