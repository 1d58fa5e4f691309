"""What GPUs of this host can do with each other's memory.

python -m pdrelay.transport.cuda.probe 0 1       prints a GpuProbe as JSON
python -m pdrelay.transport.cuda.probe --open H  opens an IPC handle (hex), as a peer would
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import msgspec

from pdrelay.errors import TransportError
from pdrelay.transport.choose import GpuPair, GpuProbe
from pdrelay.transport.cuda.driver import Driver

_NUM_BYTES = 2 << 20
_TIMEOUT_S = 30.0


def probe(ordinals: Sequence[int]) -> GpuProbe:
    """Raises TransportError without a driver or one of the GPUs."""
    driver = Driver()
    count = driver.num_devices()
    missing = [ordinal for ordinal in ordinals if ordinal >= count]
    if missing:
        raise TransportError(f"no GPU {missing[0]}: this process sees {count}")
    pairs = [
        GpuPair(a, b, driver.can_access_peer(a, b), driver.peer_atomics(a, b))
        for a in ordinals
        for b in ordinals
        if a != b
    ]
    return GpuProbe(pairs, _ipc_error(driver, ordinals[0]), _nccl_error())


def _ipc_error(driver: Driver, ordinal: int) -> str:
    """Whether another process can open memory of this one: containers may forbid it."""
    driver.context(ordinal)
    address = driver.allocate(_NUM_BYTES)
    try:
        handle = driver.ipc_handle(address)
        command = [sys.executable, "-m", "pdrelay.transport.cuda.probe", "--open", handle.hex()]
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except TransportError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return "no answer"
    finally:
        driver.free(address)
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _nccl_error() -> str:
    from pdrelay.transport.nccl_library import load_nccl

    try:
        load_nccl()
    except TransportError as error:
        return str(error)
    return ""


def _open(handle: bytes) -> None:
    driver = Driver()
    driver.context(0)
    driver.close_ipc(driver.open_ipc(handle))


def main(arguments: Sequence[str]) -> int:
    try:
        if arguments[:1] == ["--open"]:
            _open(bytes.fromhex(arguments[1]))
        else:
            found = probe([int(argument) for argument in arguments])
            sys.stdout.buffer.write(msgspec.json.encode(found))
    except TransportError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
