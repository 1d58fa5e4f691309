"""The process of one rank: builds what its RankConfig says, reports Ready, serves until told.

Run as `python -m pdrelay.engine.worker` by the launcher, with the configuration on standard input.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from functools import partial

import msgspec
import torch

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.channel import Channel
from pdrelay.core.clock import monotonic_ns
from pdrelay.core.heap import settle_heap
from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import Fatal, Ready, Role, ToWorker
from pdrelay.core.rank_config import RankConfig, read_rank_config
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.time_slice import SHORT_SLICE_NS, request_short_slices
from pdrelay.engine.batch import BatchInput
from pdrelay.engine.communicator import Communicator, connect_ranks
from pdrelay.engine.consumer import Consumer
from pdrelay.engine.cuda_engine import (
    CudaEngine,
    build_engine,
    open_device,
    prepare_backend,
    size_pool,
    step_limits,
)
from pdrelay.engine.loop import EngineLoop
from pdrelay.engine.models.registry import CausalLM, build_model
from pdrelay.engine.outbox import Outbox
from pdrelay.engine.prefix_writer import PrefixWriter
from pdrelay.engine.producer import Producer
from pdrelay.engine.runner import ModelRunner, forward
from pdrelay.engine.startup_clock import StartupClock
from pdrelay.engine.step import Runner
from pdrelay.engine.step_input import StepMessage
from pdrelay.engine.tp_link import Follower, Leader
from pdrelay.engine.warmup import warm_up
from pdrelay.errors import LaunchError, PdrelayError
from pdrelay.model.config import ModelConfig, kv_layout, load_model_config
from pdrelay.transport.base import Transport
from pdrelay.transport.checksum import prepare_checksum
from pdrelay.transport.device import DevicePages
from pdrelay.transport.pages import SharedPages
from pdrelay.transport.registry import TransportOptions, create_transport

_TP_TIMEOUT_S = 60.0
_log = logging.getLogger("pdrelay.engine.worker")  # not __name__, which is __main__ here


@dataclass
class Rank:
    """What every rank holds, leader or not. `config.num_blocks` is what the pool has."""

    config: RankConfig
    model_config: ModelConfig
    layout: KVLayout
    pages: SharedPages | DevicePages
    kv_pool: torch.Tensor
    model: CausalLM
    startup: StartupClock
    cuda: CudaEngine | None = None


def build_rank(config: RankConfig, communicator: Communicator) -> Rank:
    """Load weights and make the KV pool. Raises ModelError, LaunchError."""
    startup = StartupClock(monotonic_ns)
    model_config = load_model_config(config.model)
    with startup.phase("weights"):
        model = build_model(
            config.model,
            model_config,
            load_format=config.load_format,
            seed=config.seed,
            dtype=getattr(torch, config.dtype),
            device=torch.device(config.device),
            communicator=communicator,
            attention=config.attention,
        )
    if config.device == "cpu":
        return _on_cpu(config, model_config, model, startup)
    return _on_cuda(config, model_config, model, communicator, startup)


def _layout(config: RankConfig, model_config: ModelConfig, num_blocks: int) -> KVLayout:
    return kv_layout(model_config, config.block_size, num_blocks, config.dtype, config.world_size)


def _on_cpu(
    config: RankConfig, model_config: ModelConfig, model: CausalLM, startup: StartupClock
) -> Rank:
    layout = _layout(config, model_config, config.num_blocks)
    with startup.phase("KV pool"):
        pages = SharedPages.create(layout)
    kv_pool = torch.frombuffer(pages.buffer, dtype=getattr(torch, config.dtype))
    return Rank(config, model_config, layout, pages, kv_pool.view(layout.shape), model, startup)


def _on_cuda(
    config: RankConfig,
    model_config: ModelConfig,
    model: CausalLM,
    communicator: Communicator,
    startup: StartupClock,
) -> Rank:
    from pdrelay.transport.cuda.pages import CudaPages

    limits = step_limits(config)
    with startup.phase("memory profile"):
        prepare_backend(model, model_config, limits, config.world_size)
        one_block = _layout(config, model_config, 1)
        num_blocks = size_pool(config, model_config, model, communicator, one_block)
    layout = _layout(config, model_config, num_blocks)
    with startup.phase("KV pool"):
        pages = CudaPages.create(layout, torch.cuda.current_device())
    engine = build_engine(model, pages.tensor, limits, startup)
    config = msgspec.structs.replace(config, num_blocks=num_blocks)
    return Rank(config, model_config, layout, pages, pages.tensor, model, startup, engine)


def _rendezvous_path(config: RankConfig, what: str) -> str:
    return os.path.join(config.run_dir, f"{config.instance}.{config.incarnation}.{what}")


def _communicator(config: RankConfig) -> Communicator:
    return connect_ranks(
        rank=config.rank,
        world_size=config.world_size,
        path=_rendezvous_path(config, "ranks"),
        timeout_s=_TP_TIMEOUT_S,
        dtype=getattr(torch, config.dtype),
        device=torch.device(config.device),
    )


def follow(config: RankConfig) -> None:
    """Rank 1..: compute what rank 0 sends until it is gone."""
    communicator = _communicator(config)
    rank = build_rank(config, communicator)
    communicator.barrier()
    path = _rendezvous_path(config, "tp")
    settle_heap()
    if rank.cuda is None:
        _follow_on_cpu(rank, Follower(path, BatchInput))
    else:
        rank.cuda.follower.check = communicator.check
        _follow_on_cuda(rank.cuda, Follower(path, StepMessage))


def _follow_on_cpu(rank: Rank, follower: Follower[BatchInput]) -> None:
    with torch.inference_mode():
        while (batch := follower.next_batch()) is not None:
            forward(rank.model, rank.kv_pool, batch, None)
    follower.close()


def _follow_on_cuda(engine: CudaEngine, follower: Follower[StepMessage]) -> None:
    while (step := follower.next_batch()) is not None:
        engine.follower.run(step)
    follower.close()


def _transport(config: RankConfig, pages: SharedPages | DevicePages) -> Transport | None:
    if not config.transport:
        return None
    options = TransportOptions(
        timeout_s=config.kv_transfer_timeout_s,
        pool=config.pool,
        pool_fd=config.pool_fd,
        instance_index=config.instance_index,
    )
    return create_transport(config.transport, pages, config.instance, options)


def lead(config: RankConfig, control: Channel[ToWorker]) -> None:
    """Rank 0: build everything, report Ready, run the loop."""
    followers = config.world_size - 1
    message = BatchInput if config.device == "cpu" else StepMessage
    path = _rendezvous_path(config, "tp")
    leader = Leader(path, followers, _TP_TIMEOUT_S, message) if followers else None
    communicator = _communicator(config)
    rank = build_rank(config, communicator)
    config = rank.config
    communicator.barrier()
    if leader is not None:
        leader.accept()
    transport = _transport(config, rank.pages)
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
    )
    scheduler = Scheduler(
        scheduler_config,
        BlockManager(config.num_blocks, enable_prefix_caching=config.enable_prefix_caching),
        transport.prefix_store if transport is not None else None,
    )
    runner: Runner
    if rank.cuda is not None:
        runner = rank.cuda.runner
        runner.broadcast = leader.broadcast if leader else None
        runner.check = communicator.check
    else:
        broadcast = leader.broadcast if leader else None
        runner = ModelRunner(rank.model, rank.kv_pool, config.block_size, broadcast)
    with rank.startup.phase("warm-up"):
        warm_up(
            runner,
            scheduler_config,
            num_blocks=config.num_blocks,
            vocab_size=rank.model_config.vocab_size,
            max_model_len=config.max_model_len,
            on_gpu=rank.cuda is not None,
            remote_pool=rank.kv_pool if rank.cuda and config.role is Role.PREFILL else None,
        )
    outbox = Outbox()
    producer, consumer = _peers(rank, transport, scheduler, outbox)
    prefix_writer = None
    if config.role is Role.BOTH and transport is not None and transport.prefix_store is not None:
        prefix_writer = PrefixWriter(transport, rank.layout)
    loop = EngineLoop(
        instance=config.instance,
        scheduler=scheduler,
        runner=runner,
        control=control,
        outbox=outbox,
        producer=producer,
        consumer=consumer,
        transport=transport,
        clock=monotonic_ns,
        prefix_writer=prefix_writer,
        remote_of=None if producer is None else producer.remote_store,
        busy_wait=config.busy_wait,
    )
    settle_heap()
    _log.info("start-up: %s", rank.startup)
    control.send(_ready(rank))
    try:
        loop.run()
    finally:
        for part in (producer, consumer, prefix_writer, transport, leader):
            if part is not None:
                part.close()


def _peers(
    rank: Rank, transport: Transport | None, scheduler: Scheduler, outbox: Outbox
) -> tuple[Producer | None, Consumer | None]:
    config = rank.config
    if transport is None or config.role is Role.BOTH:
        return None, None
    verify = partial(prepare_checksum, rank.pages, mode=config.verify)
    if config.role is Role.PREFILL:
        producer = Producer(
            instance=config.instance,
            transport=transport,
            scheduler=scheduler,
            outbox=outbox,
            num_layers=rank.layout.num_layers,
            checksum=verify,
            timeout_s=config.kv_transfer_timeout_s,
            clock=monotonic_ns,
            pools=None if rank.cuda is None else rank.cuda.runner,
        )
        return producer, None
    consumer = Consumer(
        instance=config.instance,
        address=config.peer_address,
        transport=transport,
        scheduler=scheduler,
        outbox=outbox,
        layout=rank.layout,
        checksum=verify,
        clock=monotonic_ns,
    )
    return None, consumer


def _ready(rank: Rank) -> Ready:
    from pdrelay.engine import kernels

    config = rank.config
    return Ready(
        instance=config.instance,
        role=config.role,
        pid=os.getpid(),
        layout=rank.layout,
        peer_address=config.peer_address,
        max_model_len=config.max_model_len,
        transport=config.transport,
        resolved={
            "device": config.device,
            "dtype": config.dtype,
            "kernels": kernels.describe() if config.device == "cpu" else "triton",
            "torch": str(torch.__version__),
            "start-up": str(rank.startup),
        },
    )


def _open_device(config: RankConfig) -> None:
    if config.device != "cpu":
        open_device(config.device)


def _follower_main(config: RankConfig) -> int:
    try:
        _open_device(config)
        follow(config)
    except PdrelayError as error:  # rank 0's end tells the front door; the log tells why
        print(f"pdrelay worker {config.instance}.{config.rank}: {error}", file=sys.stderr)
        return 2 if isinstance(error, LaunchError) else 1
    return 0


def configure_logging(level: str) -> None:
    """To standard error, which the front door passes on with the time's and the rank's prefix."""
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front door decides when to stop
    config = read_rank_config(sys.stdin.buffer)
    configure_logging(config.log_level)
    _log.debug("%s", config)
    if config.device == "cpu":
        # A decode step must not wait behind a prefill. Prefill ranks too: what they give up when
        # they yield between tiles (kernels/cpu.c) is the rest of a slice, so it must be short.
        request_short_slices(SHORT_SLICE_NS)
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    if config.rank > 0:
        return _follower_main(config)
    control: Channel[ToWorker] = Channel(socket.socket(fileno=config.control_fd), ToWorker)
    try:
        _open_device(config)
        lead(config, control)
    except PdrelayError as error:
        control.send(Fatal(str(error)))
        print(f"pdrelay worker {config.instance}: {error}", file=sys.stderr)
        return 2 if isinstance(error, LaunchError) else 1
    except Exception as error:  # the last word to the front door before the process ends
        traceback.print_exc()
        control.send(Fatal(f"{type(error).__name__}: {error}".splitlines()[0]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
