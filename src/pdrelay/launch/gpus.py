"""Which GPUs an instance sees, and what it must not do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdrelay.errors import ConfigError
from pdrelay.launch.topology import InstanceSpec

VARIABLE = "CUDA_VISIBLE_DEVICES"
# NVLink multicast needs rights over the host's switches that a shared host does not give.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def visible_gpus(outer: str | None, num_gpus: int) -> list[str]:
    """Names of the GPUs that this process may hand out: those of `outer`, the variable's value in
    its own environment, else all `num_gpus` of the driver."""
    if outer is None:
        return [str(i) for i in range(num_gpus)]
    return [name.strip() for name in outer.split(",") if name.strip() and name.strip() != "-1"]


def assign_gpus(
    specs: Sequence[InstanceSpec], gpus: Sequence[str], *, share: bool = False
) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES by instance id: consecutive GPUs, none twice unless `share`.

    Raises ConfigError when there are too few.
    """
    needed = sum(spec.world_size for spec in specs)
    widest = max(spec.world_size for spec in specs)
    if len(gpus) < (widest if share else needed):
        shown = ", ".join(gpus) or "none"
        raise ConfigError(
            f"{needed} GPUs are needed, one a rank, and {len(gpus)} can be seen ({shown}): ask for "
            f"fewer instances, widen {VARIABLE}, or pass --device cpu"
        )
    assigned: dict[str, str] = {}
    next_gpu = 0
    for spec in specs:
        if next_gpu + spec.world_size > len(gpus):
            next_gpu = 0
        assigned[spec.instance] = ",".join(gpus[next_gpu : next_gpu + spec.world_size])
        next_gpu += spec.world_size
    return assigned


def with_peers(assigned: Mapping[str, str], gpus: Sequence[str]) -> dict[str, str]:
    """The same with every other GPU behind an instance's own, which it computes on: memory of a
    GPU that a process does not see cannot be mapped in it, so hand-overs would take the long way.
    """
    seen: dict[str, str] = {}
    for instance, own in assigned.items():
        first = own.split(",")
        seen[instance] = ",".join([*first, *(gpu for gpu in gpus if gpu not in first)])
    return seen
