"""What every launch here has in common: the interpreter, and programmatic dependent launch.

Programmatic dependent launch (PDL, sm_90): a kernel launched with it may start while the kernel
before it in the stream still runs. The rules that keep it correct, for every kernel of this
package that has a PDL flag:
- before gdc_wait it touches nothing but what no kernel with PDL writes: weights, and a step's
  inputs (lengths, block tables, what `decode_parts.py` makes of them). Copies and kernels without
  PDL write those, and one more kernel without PDL comes between them and the step's first with it:
  a kernel without PDL begins when all before it has ended and its stores are visible, while a
  kernel with PDL may begin before even the stores of one without are;
- it calls gdc_wait on every path to its end: what comes behind it may then take its end for the
  end of everything before it;
- it calls gdc_launch_dependents first thing: the kernel behind it becomes resident as soon as all
  of this one's programs run, reads what it may, and waits. So kernels far behind may be resident
  as well: that several with PDL lie in between orders nothing before gdc_wait.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

WARP = 32
VECTOR_BYTES = 16  # the widest load or store of one thread


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def pdl_flags(pdl: bool) -> dict[str, Any]:
    """Keyword arguments of a launch: the kernel's PDL constexpr and the launch attribute."""
    if not pdl or interpreting():
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def num_warps(num_elements: int, element_size: int, most: int = 16) -> int:
    """Warps that move `num_elements` with one 16-byte access a thread; a power of two."""
    threads = max(1, num_elements * element_size // VECTOR_BYTES)
    power: int = triton.next_power_of_2(threads)
    return max(1, min(most, power // WARP))


def is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 132, an H100's, where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
