"""The few calls of the CUDA driver API that transports need, with errors as exceptions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from pdrelay.errors import TransportError
from pdrelay.transport.device import Run, RunTable

IPC_HANDLE_BYTES = 64
_NOT_READY = 600
_NOT_SUPPORTED = (1, 801)  # invalid value, not supported: of a batched copy
_IPC_LAZY_PEER_ACCESS = 1
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC, _EVENT_NO_TIMING = 1, 2
_PORTABLE = 1
_SRC_STREAM_ORDER = 1
_PREFER_OVERLAP = 1
_MULTIPROCESSOR_COUNT = 16  # CUdevice_attribute
_NATIVE_ATOMICS = 3  # CUdevice_P2PAttribute


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * IPC_HANDLE_BYTES),)


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("src_access_order", c_int),
        ("src_hint", _Location),
        ("dst_hint", _Location),
        ("flags", c_uint),
    )


class Driver:
    """libcuda, initialised. Raises TransportError where there is none."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransportError(f"no CUDA driver here ({error}): use --device cpu") from error
        self._call("cuInit", c_uint(0))
        self.version = self._driver_version()
        # What every hand-over calls: typed once, so that a call takes plain integers.
        self._set_current = self._typed("cuCtxSetCurrent", c_void_p)
        self._record = self._typed("cuEventRecord", c_void_p, c_void_p)
        self._query = self._typed("cuEventQuery", c_void_p)
        self._wait_event = self._typed("cuStreamWaitEvent", c_void_p, c_void_p, c_uint)
        self._stream_query = self._typed("cuStreamQuery", c_void_p)
        self._copy = self._typed("cuMemcpyAsync", c_uint64, c_uint64, c_size_t, c_void_p)
        # CUDA 13 dropped a parameter; both forms are exported by drivers that know them. Here:
        # addresses of destinations, sources and sizes, how many; attributes, what they begin at,
        # how many.
        common = (c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t)
        self._batch_13 = self._typed("cuMemcpyBatchAsync_v2", *common, c_void_p)
        self._batch_12 = self._typed("cuMemcpyBatchAsync", *common, c_void_p, c_void_p)
        self._batch_attributes = _CopyAttributes(_SRC_STREAM_ORDER, flags=_PREFER_OVERLAP)
        self._batch_first = c_size_t(0)

    def _typed(self, name: str, *arguments: Any) -> Any:
        """The function of that name; None where this driver has none."""
        function = getattr(self._lib, name, None)
        if function is not None:
            function.argtypes = arguments
        return function

    def _driver_version(self) -> int:
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return version.value

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._lib, name)(*arguments))

    def _check(self, name: str, result: int) -> None:
        if result:
            raise TransportError(f"{name} failed: {self._describe(result)}")

    def _describe(self, result: int) -> str:
        text = c_char_p()
        if self._lib.cuGetErrorString(c_int(result), byref(text)) or text.value is None:
            return f"CUDA error {result}"
        return f"{text.value.decode()} (CUDA error {result})"

    # ---- devices

    def num_devices(self) -> int:
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def context(self, ordinal: int) -> int:
        """The device's primary context, which is torch's, made current on this thread."""
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(device), c_int(ordinal))
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        assert context.value is not None
        self.make_current(context.value)
        return context.value

    def make_current(self, context: int) -> None:
        self._check("cuCtxSetCurrent", self._set_current(context))

    def uuid(self, ordinal: int) -> str:
        uuid = _Uuid()
        self._call("cuDeviceGetUuid_v2", byref(uuid), c_int(ordinal))
        return bytes(uuid.bytes).hex()

    def num_multiprocessors(self, ordinal: int) -> int:
        count = c_int()
        attribute, device = c_int(_MULTIPROCESSOR_COUNT), c_int(ordinal)
        self._call("cuDeviceGetAttribute", byref(count), attribute, device)
        return count.value

    def can_access_peer(self, ordinal: int, peer: int) -> bool:
        able = c_int()
        self._call("cuDeviceCanAccessPeer", byref(able), c_int(ordinal), c_int(peer))
        return bool(able.value)

    def peer_atomics(self, ordinal: int, peer: int) -> bool:
        """True over NVLink; False over PCIe."""
        able = c_int()
        what = c_int(_NATIVE_ATOMICS)
        self._call("cuDeviceGetP2PAttribute", byref(able), what, c_int(ordinal), c_int(peer))
        return bool(able.value)

    # ---- memory

    def allocate(self, num_bytes: int) -> int:
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(num_bytes))
        return address.value

    def zero(self, address: int, num_bytes: int) -> None:
        self._call("cuMemsetD8_v2", c_uint64(address), ctypes.c_ubyte(0), c_size_t(num_bytes))

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", c_uint64(address))

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Base and size of the allocation that `address` lies in: what an IPC handle names."""
        base, size = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", byref(base), byref(size), c_uint64(address))
        return base.value, size.value

    def ipc_handle(self, address: int) -> bytes:
        handle = _IpcHandle()
        self._call("cuIpcGetMemHandle", byref(handle), c_uint64(address))
        return bytes(handle.reserved)

    def open_ipc(self, handle: bytes) -> int:
        """Into the current context, which gets access to the peer's device."""
        if len(handle) != IPC_HANDLE_BYTES:
            raise TransportError(f"an IPC handle has {IPC_HANDLE_BYTES} bytes, not {len(handle)}")
        address = c_uint64()
        struct = _IpcHandle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", byref(address), struct, c_uint(_IPC_LAZY_PEER_ACCESS))
        return address.value

    def close_ipc(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", c_uint64(address))

    def allocate_pinned(self, num_bytes: int) -> int:
        address = c_void_p()
        self._call("cuMemHostAlloc", byref(address), c_size_t(num_bytes), c_uint(_PORTABLE))
        assert address.value is not None
        return address.value

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", c_void_p(address))

    def pin(self, address: int, num_bytes: int) -> None:
        self._call(
            "cuMemHostRegister_v2", c_void_p(address), c_size_t(num_bytes), c_uint(_PORTABLE)
        )

    def unpin(self, address: int) -> None:
        self._call("cuMemHostUnregister", c_void_p(address))

    # ---- streams and events

    def create_stream(self) -> int:
        """Of the highest priority: what runs here is short, and something waits for it."""
        least, greatest, stream = c_int(), c_int(), c_void_p()
        self._call("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
        self._call(
            "cuStreamCreateWithPriority", byref(stream), c_uint(_STREAM_NON_BLOCKING), greatest
        )
        assert stream.value is not None
        return stream.value

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", c_void_p(stream))

    def synchronize_stream(self, stream: int) -> None:
        self._call("cuStreamSynchronize", c_void_p(stream))

    def create_event(self, *, timing: bool) -> int:
        event = c_void_p()
        flags = _EVENT_BLOCKING_SYNC | (0 if timing else _EVENT_NO_TIMING)
        self._call("cuEventCreate", byref(event), c_uint(flags))
        assert event.value is not None
        return event.value

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        self._check("cuEventRecord", self._record(event, stream))

    def query(self, event: int) -> bool:
        return self._over("cuEventQuery", self._query(event))

    def idle(self, stream: int) -> bool:
        """Whether everything that was put on the stream is complete."""
        return self._over("cuStreamQuery", self._stream_query(stream))

    def _over(self, name: str, result: int) -> bool:
        if result == _NOT_READY:
            return False
        self._check(name, result)
        return True

    def synchronize(self, event: int) -> None:
        self._call("cuEventSynchronize", c_void_p(event))

    def wait_event(self, stream: int, event: int) -> None:
        self._check("cuStreamWaitEvent", self._wait_event(stream, event, 0))

    def elapsed_ns(self, start: int, end: int) -> int:
        milliseconds = c_float()
        self._call("cuEventElapsedTime", byref(milliseconds), c_void_p(start), c_void_p(end))
        return int(milliseconds.value * 1e6)

    # ---- copies

    @property
    def has_batch(self) -> bool:
        return self._batch_13 is not None or self._batch_12 is not None

    def copy(self, run: Run, stream: int) -> None:
        self.copy_bytes(run.dst, run.src, run.num_bytes, stream)

    def copy_bytes(self, dst: int, src: int, num_bytes: int, stream: int) -> None:
        self._check("cuMemcpyAsync", self._copy(dst, src, num_bytes, stream))

    def copy_batch(self, runs: Sequence[Run], stream: int) -> bool:
        """One submission for all runs. False: this driver cannot, nothing was copied."""
        count = len(runs)
        numbers = RunTable.of(runs).table  # 8-byte integers all: CUdeviceptr twice, size_t
        dsts = numbers.ctypes.data
        srcs, sizes = dsts + 8 * count, dsts + 16 * count
        attributes, first = byref(self._batch_attributes), byref(self._batch_first)
        common = (dsts, srcs, sizes, count, attributes, first, 1)
        if self._batch_13 is not None:
            result = self._batch_13(*common, stream)
        elif self._batch_12 is not None:
            failed = c_size_t()
            result = self._batch_12(*common, byref(failed), stream)
        else:
            return False
        if result in _NOT_SUPPORTED:
            return False
        self._check("cuMemcpyBatchAsync", result)
        return True
