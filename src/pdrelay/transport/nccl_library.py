"""NCCL's point-to-point calls, with errors as exceptions and communicators that never block.

Communicators are made in NCCL's non-blocking mode, so that a peer that dies in the middle of
anything leaves a call that returns and a communicator that can be aborted.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any, Protocol

from pdrelay.errors import TransportError

UNIQUE_ID_BYTES = 128
_SYSTEM = "libnccl.so.2"
_SUCCESS, _IN_PROGRESS = 0, 7
_INT8 = 0  # ncclDataType_t
_MAGIC = 0xCAFEBEEF
_UNSET = -(1 << 31)
_CONFIG_VERSION = 21800  # the structure below is NCCL 2.18's; later ones take it

Pieces = Sequence[tuple[int, int]]  # addresses and bytes


class NcclLibrary(Protocol):
    """What transport `nccl` calls; `FakeNccl` is the fake. All raise TransportError."""

    def unique_id(self) -> bytes: ...

    def join(self, unique_id: bytes, rank: int) -> Any:
        """Begin to make a communicator of two on the current device. Returns it."""

    def ready(self, communicator: Any) -> bool:
        """Whether what was last asked of it is under way on its stream. Raises when it failed."""

    def send(self, communicator: Any, pieces: Pieces, stream: Any) -> None:
        """To the other rank, as one operation; `ready` says when it is on the stream."""

    def receive(self, communicator: Any, pieces: Pieces, stream: Any) -> None:
        """The same pieces, in the same order, from the other rank."""

    def abort(self, communicator: Any) -> None:
        """End it with all its operations, on this side; streams go on."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cga_cluster_size", c_int),
        ("min_ctas", c_int),
        ("max_ctas", c_int),
        ("net_name", c_char_p),
        ("split_share", c_int),
    )


class Nccl:
    """libnccl through ctypes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lib = library
        library.ncclGetErrorString.restype = c_char_p

    def _check(self, name: str, result: int) -> None:
        if result not in (_SUCCESS, _IN_PROGRESS):
            text = self._lib.ncclGetErrorString(c_int(result)).decode()
            raise TransportError(f"{name} failed: {text} (set NCCL_DEBUG=INFO to see more)")

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._lib, name)(*arguments))

    def unique_id(self) -> bytes:
        unique_id = _UniqueId()
        self._call("ncclGetUniqueId", byref(unique_id))
        return bytes(unique_id.internal)

    def join(self, unique_id: bytes, rank: int) -> c_void_p:
        communicator = c_void_p()
        config = _Config(
            ctypes.sizeof(_Config), _MAGIC, _CONFIG_VERSION, 0, _UNSET, _UNSET, _UNSET, None, _UNSET
        )
        self._call(
            "ncclCommInitRankConfig",
            byref(communicator),
            c_int(2),
            _UniqueId.from_buffer_copy(unique_id),
            c_int(rank),
            byref(config),
        )
        return communicator

    def ready(self, communicator: c_void_p) -> bool:
        state = c_int()
        self._call("ncclCommGetAsyncError", communicator, byref(state))
        self._check("NCCL", state.value)
        return state.value == _SUCCESS

    def send(self, communicator: c_void_p, pieces: Pieces, stream: int) -> None:
        self._group("ncclSend", communicator, pieces, stream, peer=1)

    def receive(self, communicator: c_void_p, pieces: Pieces, stream: int) -> None:
        self._group("ncclRecv", communicator, pieces, stream, peer=0)

    def _group(
        self, name: str, communicator: c_void_p, pieces: Pieces, stream: int, *, peer: int
    ) -> None:
        self._call("ncclGroupStart")
        for address, num_bytes in pieces:
            self._call(
                name,
                c_void_p(address),
                c_size_t(num_bytes),
                c_int(_INT8),
                c_int(peer),
                communicator,
                c_void_p(stream),
            )
        self._call("ncclGroupEnd")

    def abort(self, communicator: c_void_p) -> None:
        self._call("ncclCommAbort", communicator)


def load_nccl() -> Nccl:
    """The NCCL that torch brought, or the system's. Raises TransportError."""
    tried = []
    for path in (*_bundled(), _SYSTEM):
        try:
            return Nccl(ctypes.CDLL(path))
        except OSError as error:
            tried.append(str(error))
    raise TransportError(
        f"no NCCL library ({tried[-1]}): install a CUDA build of torch, which brings one, or "
        "choose --transport mapped or tcp"
    )


def _bundled() -> list[str]:
    """Where the wheel `nvidia-nccl-cu*` puts it."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    paths = [os.path.join(place, "lib", "libnccl.so.2") for place in places]
    return [path for path in paths if os.path.exists(path)]
