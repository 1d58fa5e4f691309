"""The shared pool's memory: slots of whole blocks, and the index that finds them by key.

Every process of a server maps one anonymous file (`pool_file.py`). What keeps it right:

- **Exclusion.** `flock` on a private open of the file: the kernel drops it when its holder dies.
- **Death inside the lock.** A holder sets `dirty` first and clears it last. Whoever finds it set
  rebuilds what can be derived (pin counts, who must re-read which key) from the rest, which is
  written in an order that makes any prefix of the writes safe.
- **Finding keys.** Each process mirrors the index in a dict and, under the lock, re-reads only the
  slots that changed since it last looked.
- **Pins.** A *lease* names the slots of one transfer, in block order, and pins them from the
  producer's first write until the consumer took them. Leases and half-written slots carry the
  instances they belong to, so `reclaim` frees what a dead instance held.
- **Eviction.** The least recently used ready slot that no lease pins; of one prefix, its end first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pdrelay.errors import TransportError
from pdrelay.transport.pool_file import (
    KEY_BYTES,
    MAGIC,
    Head,
    LeaseState,
    PoolDescription,
    State,
    fields_of,
    plan_of,
)

_MAX_LOCK_PAUSE_S = 0.001


@dataclass(frozen=True)
class PoolStats:
    """Slots by state, pins and leases, now."""

    num_slots: int
    num_free: int
    num_writing: int
    num_ready: int
    num_pinned: int
    num_leases: int


@dataclass(frozen=True)
class Lease:
    """One transfer's row of the lease table; it may have been given up meanwhile."""

    row: int
    name: tuple[int, int]


@dataclass(frozen=True)
class Placed:
    """Where one block is. `shared` slots were ready: compare, do not write."""

    slot: int
    shared: bool


def lease_name(transfer_id: str) -> tuple[int, int]:
    digest = hashlib.blake2b(transfer_id.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _ids(slots: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(slots, np.int64)  # an empty list would be floats


class PoolStore:
    """One process's view of the pool. Thread-safe; `slots` is read and written without the lock
    by whoever holds a pin (readers) or the WRITING state (its writer)."""

    def __init__(self, fd: int, description: PoolDescription, *, timeout_s: float = 10.0) -> None:
        """Map the pool behind `fd`, which stays the caller's.

        Raises TransportError when it is not a pool of this description.
        """
        offsets, slots_at, size = plan_of(description)
        self.layout = description.layout
        self._timeout_s = timeout_s
        self._thread_lock = threading.Lock()
        try:
            # flock belongs to the open file: an inherited fd shares its lock with all heirs.
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"cannot open the shared pool: {error}") from error
        try:
            if os.fstat(self._fd).st_size != size:
                raise TransportError("the shared pool has another size than described")
            self._map = mmap.mmap(self._fd, size)
        except (OSError, ValueError, TransportError) as error:
            os.close(self._fd)
            raise TransportError(f"cannot map the shared pool: {error}") from error

        def array(name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
            return np.ndarray(shape, dtype, self._map, offsets[name])

        fields = fields_of(description)
        arrays = {name: array(name, dtype, shape) for name, dtype, shape in fields}
        self._head = arrays["head"]
        self._state, self._private = arrays["state"], arrays["private"]
        self._writer, self._pins = arrays["writer"], arrays["pins"]
        self._used, self._changed = arrays["used"], arrays["changed"]
        self._key = arrays["key"]
        self._lease_state = arrays["lease_state"]
        self._lease_producer = arrays["lease_producer"]
        self._lease_consumer = arrays["lease_consumer"]
        self._lease_length, self._lease_name = arrays["lease_length"], arrays["lease_name"]
        self._lease_slots = arrays["lease_slots"]
        self.slots: npt.NDArray[np.uint8] = np.ndarray(
            (self.layout.num_layers, self.layout.num_blocks, self.layout.layer_block_bytes),
            np.uint8,
            self._map,
            slots_at,
        )
        self._seen_version = 0
        self._slot_of: dict[bytes, int] = {}  # mirror: key to its ready slot
        self._key_of: dict[int, bytes] = {}
        if int(self._head[Head.MAGIC]) != MAGIC:
            self.close()
            raise TransportError("the file descriptor is not a shared pool")

    def close(self) -> None:
        if self._fd < 0:
            return
        for name in [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]:
            setattr(self, name, np.empty((0, 0, 0), np.uint8))
        with contextlib.suppress(BufferError):  # a view elsewhere keeps the mapping
            self._map.close()
        os.close(self._fd)
        self._fd = -1

    # ---- the lock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the pool. Raises TransportError when another process keeps it for too long."""
        if not self._thread_lock.acquire(timeout=self._timeout_s):
            raise TransportError("the shared pool is locked by another thread")
        try:
            self._flock()
            try:
                if self._head[Head.DIRTY]:
                    self._repair()
                self._head[Head.DIRTY] = 1
                self._refresh()
                try:
                    yield
                except TransportError:  # raised before anything was changed
                    self._head[Head.DIRTY] = 0
                    raise
                self._head[Head.DIRTY] = 0
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._thread_lock.release()

    def _flock(self) -> None:
        # flock has no timeout, and a stopped process may hold it: try, and pause between tries.
        pause, deadline = 20e-6, time.monotonic() + self._timeout_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TransportError(
                        f"the shared pool is locked for over {self._timeout_s:g} s: "
                        "a worker is stopped inside it"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, _MAX_LOCK_PAUSE_S)

    def _repair(self) -> None:
        """Another process died inside the lock: derive again what follows from the rest."""
        pins = np.zeros_like(self._pins)
        for row in np.flatnonzero(self._lease_state != LeaseState.FREE):
            np.add.at(pins, self._slots_of_row(int(row)), 1)
        self._pins[:] = pins
        # Only leases make slots private, and a lease frees them in its last step.
        self._state[(self._state == State.READY) & (self._private == 1) & (pins == 0)] = State.FREE
        self._touch(np.arange(len(self._state)))

    def _refresh(self) -> None:
        """Bring the mirror up to date."""
        version = int(self._head[Head.VERSION])
        if version == self._seen_version:
            return
        stale = np.flatnonzero(self._changed > self._seen_version)
        ready = (self._state[stale] == int(State.READY)) & (self._private[stale] == 0)
        for slot, key, is_ready in zip(
            stale.tolist(), self._keys_of(stale), ready.tolist(), strict=True
        ):
            old = self._key_of.pop(slot, None)
            if old is not None and self._slot_of.get(old) == slot:
                del self._slot_of[old]
            if is_ready:
                self._key_of[slot] = key
                self._slot_of[key] = slot
        self._seen_version = version

    def _keys_of(self, slots: npt.NDArray[Any]) -> list[bytes]:
        raw = self._key[slots].tobytes()
        return [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]

    def _touch(self, slots: npt.NDArray[Any]) -> None:
        """Tell all mirrors that the keys of `slots` changed."""
        version = int(self._head[Head.VERSION]) + 1
        self._changed[slots] = version
        self._head[Head.VERSION] = version

    def _use(self, slots: Sequence[int]) -> None:
        """Note a use, for LRU. Slots come in block order: later blocks are to go first."""
        tick = int(self._head[Head.TICK]) + len(slots)
        self._used[_ids(slots)] = tick - np.arange(len(slots))
        self._head[Head.TICK] = tick

    # ---- leases

    def open_lease(self, transfer_id: str, producer: int, consumer: int) -> Lease:
        """Raises TransportError when the transfer has one or the table is full."""
        name = lease_name(transfer_id)
        with self._locked():
            if self._find(name) is not None:
                raise TransportError(f"transfer {transfer_id} is in the shared pool already")
            return self._new_lease(name, producer, consumer)

    def _new_lease(self, name: tuple[int, int], producer: int, consumer: int) -> Lease:
        free = np.flatnonzero(self._lease_state == LeaseState.FREE)
        if len(free) == 0:
            raise TransportError(
                f"the shared pool's {len(self._lease_state)} leases are all in use: send fewer "
                "requests at once"
            )
        row = int(free[0])
        self._lease_slots[row, : int(self._lease_length[row])] = 0
        self._lease_length[row] = 0
        self._lease_producer[row], self._lease_consumer[row] = producer, consumer
        self._lease_name[row] = name
        self._lease_state[row] = LeaseState.OPEN
        return Lease(row, name)

    def _find(self, name: tuple[int, int]) -> int | None:
        found = np.flatnonzero(
            (self._lease_name[:, 0] == np.uint64(name[0]))
            & (self._lease_name[:, 1] == np.uint64(name[1]))
            & (self._lease_state != LeaseState.FREE)
        )
        return int(found[0]) if len(found) else None

    def _check(self, lease: Lease) -> None:
        if self._find(lease.name) != lease.row:
            raise TransportError("the consumer gave the transfer up")

    def _slots_of_row(self, row: int) -> npt.NDArray[np.int32]:
        entries = self._lease_slots[row, : int(self._lease_length[row])]
        slots: npt.NDArray[np.int32] = entries[entries > 0] - 1
        return slots

    def place(
        self,
        lease: Lease,
        first: int,
        keys: Sequence[bytes],
        writer: int,
        *,
        private: Sequence[bool],
    ) -> list[Placed]:
        """Find or take a slot for each of the request blocks `first ..` and pin them.

        Raises TransportError, changing nothing, when the pool is full or the lease was given up.
        """
        with self._locked():
            self._check(lease)
            if first + len(keys) > self._lease_slots.shape[1]:
                raise TransportError(self._full(len(keys)))
            found = [self._slot_of.get(key, -1) for key in keys]
            shared = [slot for slot in found if slot >= 0]
            missing = [i for i, slot in enumerate(found) if slot < 0]
            np.add.at(self._pins, _ids(shared), 1)  # so that taking slots does not evict these
            try:
                fresh = self._take_slots(len(missing))
            except TransportError:
                np.subtract.at(self._pins, _ids(shared), 1)
                raise
            self._use(shared)
            self._claim(
                fresh, [keys[i] for i in missing], [int(private[i]) for i in missing], writer
            )
            for i, slot in zip(missing, fresh, strict=True):
                found[i] = slot
            self._pins[_ids(fresh)] += 1
            self._set_row(lease.row, first, found)
            is_new = set(missing)
            return [Placed(slot, i not in is_new) for i, slot in enumerate(found)]

    def _set_row(self, row: int, first: int, slots: Sequence[int]) -> None:
        stop = first + len(slots)
        self._lease_slots[row, first:stop] = np.asarray(slots, np.int32) + 1
        self._lease_length[row] = max(int(self._lease_length[row]), stop)

    def _claim(
        self, slots: list[int], keys: Sequence[bytes], private: Sequence[int], writer: int
    ) -> None:
        if not slots:
            return
        self._key[slots] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        self._private[slots] = private
        self._writer[slots] = writer
        self._state[slots] = State.WRITING

    def _take_slots(self, count: int) -> list[int]:
        """Free slots, ascending; evicts. Raises TransportError, changing nothing, when full."""
        free = np.flatnonzero(self._state == State.FREE)
        if len(free) >= count:
            return [int(slot) for slot in free[:count]]
        wanted = count - len(free)
        idle = np.flatnonzero((self._state == State.READY) & (self._pins == 0))
        if len(idle) < wanted:
            raise TransportError(self._full(count))
        evicted = idle[np.argsort(self._used[idle], kind="stable")[:wanted]]
        self._state[evicted] = State.FREE
        self._touch(evicted)
        return sorted([*free.tolist(), *evicted.tolist()])

    def _full(self, count: int) -> str:
        return (
            f"the shared pool is full: {count} more of its {len(self._state)} slots are wanted and "
            "all others are in use; give it more memory or send fewer requests at once"
        )

    def split(self, lease: Lease, key: bytes, writer: int) -> int:
        """A private slot for a block that turned out to differ from the shared one.

        It is in WRITING state, and both slots stay pinned until `swap`. Raises TransportError.
        """
        with self._locked():
            self._check(lease)
            (slot,) = self._take_slots(1)
            self._claim([slot], [key], [1], writer)
            return slot

    def swap(self, lease: Lease, block: int, slot: int) -> None:
        """Make `slot` the place of `block` in the lease."""
        with self._locked():
            self._check(lease)
            old = int(self._lease_slots[lease.row, block]) - 1
            self._lease_slots[lease.row, block] = slot + 1
            self._pins[slot] += 1
            self._pins[old] -= 1
            self._free_private(_ids([old]))

    def finish(self, lease: Lease, written: Sequence[int]) -> None:
        """The producer wrote all layers of the slots `written`: the consumer may take.

        Raises TransportError when the lease was given up; abandon the slots then.
        """
        with self._locked():
            self._check(lease)
            fresh: dict[bytes, int] = {}
            for slot, key in zip(written, self._keys_of(_ids(written)), strict=True):
                if key in self._slot_of or key in fresh:
                    self._private[slot] = 1  # somebody else was quicker
                elif not self._private[slot]:
                    fresh[key] = slot
            self._state[_ids(written)] = State.READY
            self._use(written)
            self._touch(_ids(written))
            self._lease_state[lease.row] = LeaseState.FINISHED

    def abandon(self, written: Sequence[int]) -> None:
        """The producer stops writing these slots of its own."""
        with self._locked():
            self._state[_ids(written)] = State.FREE

    def release(self, transfer_id: str) -> None:
        """Unpin what the transfer's lease names, if it has one. Slots being written stay so."""
        with self._locked():
            row = self._find(lease_name(transfer_id))
            if row is not None:
                self._release_row(row)

    def _release_row(self, row: int) -> None:
        slots = self._slots_of_row(row)
        self._lease_state[row] = LeaseState.FREE
        np.subtract.at(self._pins, slots, 1)
        self._free_private(slots)

    def _free_private(self, slots: npt.NDArray[Any]) -> None:
        ready = self._state[slots] == State.READY
        gone = slots[ready & (self._private[slots] == 1) & (self._pins[slots] == 0)]
        self._state[gone] = State.FREE
        self._touch(gone)

    def take(self, transfer_id: str, first: int, keys: Sequence[bytes]) -> list[int]:
        """The pinned slots of request blocks `first ..`, checked against their keys.

        Raises TransportError when the pool does not hold them for this transfer.
        """
        with self._locked():
            row = self._find(lease_name(transfer_id))
            if row is None or self._lease_state[row] != LeaseState.FINISHED:
                raise TransportError("the producer's pages are not in the shared pool")
            entries = self._lease_slots[row, first : first + len(keys)]
            if len(entries) != len(keys) or first + len(keys) > int(self._lease_length[row]):
                raise TransportError("the producer's pages are not all in the shared pool")
            slots = [int(entry) - 1 for entry in entries]
            for slot, key in zip(slots, keys, strict=True):
                if slot < 0 or self._state[slot] != State.READY or self._key[slot].tobytes() != key:
                    raise TransportError("the shared pool holds other pages than were asked for")
            self._use(slots)
            return slots

    # ---- prefixes

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are ready."""
        with self._locked():
            return self._match(keys)

    def _match(self, keys: Sequence[bytes]) -> int:
        for count, key in enumerate(keys):
            if key not in self._slot_of:
                return count
        return len(keys)

    def pin_prefix(self, name: str, keys: Sequence[bytes], instance: int) -> list[int]:
        """Pin the slots of the leading keys under a lease `name`, to be released. Raises
        TransportError when the lease table is full."""
        with self._locked():
            slots = [self._slot_of[key] for key in keys[: self._match(keys)]]
            if not slots:
                return []
            lease = self._new_lease(lease_name(name), instance, instance)
            self._set_row(lease.row, 0, slots)
            np.add.at(self._pins, slots, 1)
            self._use(slots)
            return slots

    # ---- after a death

    def reclaim(self, instance: int) -> None:
        """Free what a dead instance held: its half-written slots, what waited for it, and the
        transfers that it had not finished."""
        with self._locked():
            unfinished = (self._lease_producer == instance) & (self._lease_state == LeaseState.OPEN)
            awaited = (self._lease_consumer == instance) & (self._lease_state != LeaseState.FREE)
            for row in np.flatnonzero(unfinished | awaited):
                self._release_row(int(row))
            mine = np.flatnonzero((self._state == State.WRITING) & (self._writer == instance))
            self._state[mine] = State.FREE

    def stats(self) -> PoolStats:
        with self._locked():
            count = {state: int((self._state == state).sum()) for state in State}
            return PoolStats(
                num_slots=len(self._state),
                num_free=count[State.FREE],
                num_writing=count[State.WRITING],
                num_ready=count[State.READY],
                num_pinned=int((self._pins > 0).sum()),
                num_leases=int((self._lease_state != LeaseState.FREE).sum()),
            )

    def check_integrity(self) -> None:
        """Assert what must hold whenever nobody is inside the lock."""
        with self._locked():
            pins = np.zeros_like(self._pins)
            for row in np.flatnonzero(self._lease_state != LeaseState.FREE):
                np.add.at(pins, self._slots_of_row(int(row)), 1)
            assert (pins == self._pins).all(), "pin counts do not follow from the leases"
            assert (self._state[pins > 0] != State.FREE).all(), "a pinned slot is free"
            ready = (self._state == State.READY) & (self._private == 0)
            keys = [self._key[slot].tobytes() for slot in np.flatnonzero(ready)]
            assert len(keys) == len(set(keys)), "a key is ready in two slots"
            assert set(keys) == set(self._slot_of), "the mirror is stale"
