"""A rank without torch: speaks the control protocol and echoes prompts.

Misbehaves as the environment says, so that launching and supervision can be tested:
STUB_MODE is a comma-separated list of `what[@instance[#incarnation]]`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from pdrelay.core.channel import Channel
from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import (
    Abort,
    Drain,
    Fatal,
    Meet,
    Met,
    Output,
    Ping,
    Pong,
    Ready,
    StepResult,
    Submit,
    ToWorker,
    WorkerStats,
)
from pdrelay.core.rank_config import RankConfig, read_rank_config


def modes(config: RankConfig) -> set[str]:
    found = set()
    for entry in filter(None, os.environ.get("STUB_MODE", "").split(",")):
        what, _, where = entry.partition("@")
        instance, _, incarnation = where.partition("#")
        if instance not in ("", config.instance, f"{config.instance}.{config.rank}"):
            continue
        if incarnation and int(incarnation) != config.incarnation:
            continue
        found.add(what)
    return found


def wait_readable(sock: socket.socket) -> None:
    import selectors

    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        selector.select(60)


def serve(config: RankConfig, control: Channel, sock: socket.socket, mode: set[str]) -> int:
    held = []  # in mode "hold", until SIGUSR1
    introduced = []  # in mode "shy", until SIGUSR1

    def meet(message: Meet) -> None:
        control.send(Met(message.consumer, message.consumer_address))

    def release(*_) -> None:
        for request in held:
            answer(request)
        for message in introduced:
            meet(message)

    def answer(request) -> None:
        out = Output(
            request_id=request.request_id,
            token_ids=request.prompt_token_ids.tolist(),
            finish_reason="length",
        )
        control.send(StepResult(t_ns=time.monotonic_ns(), outputs=[out]))

    signal.signal(signal.SIGUSR1, release)
    while not control.closed:
        wait_readable(sock)
        for message in control.receive():
            match message:
                case Submit(request=request):
                    if "hold" in mode:
                        held.append(request)
                        continue
                    answer(request)
                case Meet(consumer=consumer):
                    print(f"stub {os.getpid()} is introduced to {consumer}", flush=True)
                    if "shy" in mode:
                        introduced.append(message)
                    else:
                        meet(message)
                case Abort(request_id=request_id):
                    held = [each for each in held if each.request_id != request_id]
                case Ping(nonce=nonce):
                    if "mute" not in mode:
                        control.send(Pong(nonce, WorkerStats()))
                case Drain():
                    if "ignore-drain" not in mode:
                        print(f"stub {config.instance}.{config.rank} drained")
                        return 0
    return 0


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = read_rank_config(sys.stdin.buffer)
    mode = modes(config)
    if "ignore-term" in mode:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"stub {config.instance}.{config.rank} incarnation {config.incarnation} starts")
    if "exit" in mode:
        print("the reason is on the last line", file=sys.stderr)
        return 3
    if "no-torch" in mode:
        print("ModuleNotFoundError: No module named 'torch'", file=sys.stderr)
        return 1
    if "child" in mode:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"grandchild {child.pid}", flush=True)
    if config.rank > 0:
        signal.pause()
        return 0
    sock = socket.socket(fileno=config.control_fd)
    control: Channel[ToWorker] = Channel(sock, ToWorker)
    if "fatal" in mode:
        control.send(Fatal("no weights in the directory: download them again"))
        return 1
    if "no-memory" in mode:
        control.send(Fatal("OSError: [Errno 12] Cannot allocate memory"))
        return 1
    if "hang" in mode:
        signal.pause()
    layout = KVLayout(
        num_layers=1,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        num_kv_heads=1,
        head_dim=8,
        dtype=config.dtype,
    )
    control.send(
        Ready(
            instance=config.instance,
            role=config.role,
            pid=os.getpid(),
            layout=layout,
            peer_address=config.peer_address,
            max_model_len=config.max_model_len,
            transport=config.transport,
            resolved={"device": config.device},
        )
    )
    if "die" in mode:
        return 4
    if "close-control" in mode:
        control.close()
        signal.pause()
    return serve(config, control, sock, mode)


if __name__ == "__main__":
    sys.exit(main())
