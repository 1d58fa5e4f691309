"""Ask the kernel for short time slices: how a latency-bound process shares cores with busy ones.

Linux's EEVDF scheduler (6.12 and later) takes a slice request by sched_setattr(2): a waking task
with a shorter slice has the earlier deadline and preempts a long computation at once, instead of
after that one's slice of about 3 ms. Shares of the core stay as they are, unlike with nice.
"""

from __future__ import annotations

import ctypes
import platform
import struct

SHORT_SLICE_NS = 100_000  # the kernel's minimum
# Of who relays or reads tokens: as long as the tokens of a step take, so that the reader that the
# first of them wakes does not interrupt the rest (docs/LOG.md, 2026-11-24).
RELAY_SLICE_NS = 400_000

_SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
_ATTR = struct.Struct("=IIQiIQQQ")
_RESET_ON_FORK = 1  # children (a prefill rank, say) start with the default slice again


def request_short_slices(slice_ns: int) -> bool:
    """For the calling thread alone. Returns False where the kernel does not take it.

    Kernels before 6.12 accept the call and ignore it.
    """
    numbers = _SYSCALLS.get(platform.machine())
    if platform.system() != "Linux" or numbers is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    set_attr, get_attr = numbers
    buffer = ctypes.create_string_buffer(_ATTR.size)
    if libc.syscall(get_attr, 0, buffer, _ATTR.size, 0) != 0:
        return False
    _, policy, flags, nice, priority, _, deadline, period = _ATTR.unpack(buffer.raw)
    if policy != 0:  # not SCHED_OTHER: somebody chose another policy on purpose
        return False
    attr = _ATTR.pack(
        _ATTR.size, policy, flags | _RESET_ON_FORK, nice, priority, slice_ns, deadline, period
    )
    return bool(libc.syscall(set_attr, 0, ctypes.create_string_buffer(attr), 0) == 0)
