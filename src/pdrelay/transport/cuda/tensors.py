"""Torch tensors over memory that torch did not allocate, and streams that it did not make."""

from __future__ import annotations

import ctypes
import math
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_char_p, c_int32, c_int64, c_size_t, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

_CPU, _CUDA = 1, 2  # DLDeviceType
_INT, _FLOAT, _BFLOAT = 0, 2, 4  # DLDataTypeCode
_DTYPES = {
    "float32": (_FLOAT, 32),
    "float16": (_FLOAT, 16),
    "bfloat16": (_BFLOAT, 16),
    "int64": (_INT, 64),
    "int32": (_INT, 32),
}
_CAPSULE = b"dltensor"  # PyCapsule_New keeps the pointer, so it must stay


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", c_void_p),
        ("strides", c_void_p),
        ("byte_offset", c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", c_void_p), ("deleter", c_void_p))


def tensor_at(address: int, shape: tuple[int, ...], dtype: str, ordinal: int | None) -> Any:
    """A contiguous tensor at `address` of `cuda:ordinal`, or of the host for None.

    Through DLPack, where the device is said and not asked of the pointer: memory opened by an IPC
    handle lives on the peer's GPU, and is used as this one's. The memory must outlive the tensor.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = c_void_p
    libc.malloc.argtypes = [c_size_t]
    # One block holds structure and shape, and the consumer's deleter is `free` itself.
    size = ctypes.sizeof(_DLManagedTensor)
    block = libc.malloc(size + 16 * len(shape))
    assert block is not None
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    (c_int64 * (2 * len(shape))).from_address(block + size)[:] = [*shape, *strides]
    code, bits = _DTYPES[dtype]
    managed = _DLManagedTensor.from_address(block)
    managed.tensor = _DLTensor(
        data=address,
        device_type=_CPU if ordinal is None else _CUDA,
        device_id=ordinal or 0,
        ndim=len(shape),
        code=code,
        bits=bits,
        lanes=1,
        shape=block + size,
        strides=block + size + 8 * len(shape),
        byte_offset=0,
    )
    managed.context = None
    managed.deleter = ctypes.cast(libc.free, c_void_p).value
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [c_void_p, c_char_p, c_void_p]
    tensor: torch.Tensor = from_dlpack(new_capsule(block, _CAPSULE, None))
    return tensor


def on_stream(stream: int, ordinal: int | None) -> AbstractContextManager[Any]:
    """Torch launches on this raw handle meanwhile; nothing changes without an ordinal."""
    if ordinal is None:
        return nullcontext()
    device = torch.device(f"cuda:{ordinal}")
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))
