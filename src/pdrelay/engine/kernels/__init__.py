"""C kernels for float32 on CPU, built on first use with the system's compiler.

Without a compiler the engine runs on torch alone: the same results, slower.
"""

from __future__ import annotations

from pdrelay.engine.kernels.library import Kernels, available, describe, load_kernels

__all__ = ["Kernels", "available", "describe", "load_kernels"]
