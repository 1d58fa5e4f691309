"""The compiled kernels as Python functions on addresses; shapes are in cpu.c."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from pdrelay.engine.kernels.build import BuildError, build

_SOURCE = Path(__file__).with_name("cpu.c")
_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float

# function: (result, arguments)
_SIGNATURES: dict[str, tuple[type | None, Sequence[type]]] = {
    "pd_panel_width": (_L, []),
    "pd_vector_width": (_L, []),
    "pd_max_head_dim": (_L, []),
    "pd_pack": (None, [_P, _L, _L, _P]),
    "pd_linear": (None, [_P, _P, _P, _P, _L, _L, _L]),
    "pd_add_rms_norm": (None, [_P, _P, _P, _P, _L, _L, _F]),
    "pd_silu_mul": (None, [_P, _P, _L, _L]),
    "pd_rope_write_kv": (None, [_P] * 6 + [_F, _P] + [_L] * 5),
    "pd_attend_prefill": (ctypes.c_int, [_P] * 4 + [_L] * 7 + [_F]),
    "pd_attend_decode": (ctypes.c_int, [_P] * 5 + [_L] * 7 + [_F]),
    "pd_all_reduce": (ctypes.c_int, [_P, _L, _L, _L, _P, _L, _L]),
}


class Kernels:
    """Entry points of one loaded library. Calls release the interpreter lock."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the library does not load."""
        self.path = path
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
        self.pack: Callable[..., None] = library.pd_pack
        self.linear: Callable[..., None] = library.pd_linear
        self.add_rms_norm: Callable[..., None] = library.pd_add_rms_norm
        self.silu_mul: Callable[..., None] = library.pd_silu_mul
        self.rope_write_kv: Callable[..., None] = library.pd_rope_write_kv
        self.attend_prefill: Callable[..., int] = library.pd_attend_prefill
        self.attend_decode: Callable[..., int] = library.pd_attend_decode
        self.all_reduce: Callable[..., int] = library.pd_all_reduce
        self.panel_width = int(library.pd_panel_width())
        self.vector_width = int(library.pd_vector_width())
        self.max_head_dim = int(library.pd_max_head_dim())


@functools.cache
def _load() -> Kernels | str:
    try:
        return Kernels(build(_SOURCE))
    except (BuildError, OSError) as error:
        return str(error)


def load_kernels() -> Kernels | None:
    """The kernels, built at the first call of the process; None where they cannot be."""
    loaded = _load()
    return loaded if isinstance(loaded, Kernels) else None


def available() -> bool:
    """Whether the C kernels run here."""
    return load_kernels() is not None


def describe() -> str:
    """One phrase for logs: what computes, and why not C when it is torch."""
    loaded = _load()
    return "C" if isinstance(loaded, Kernels) else f"torch ({loaded})"
