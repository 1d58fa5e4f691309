"""One-shot all-reduce and all-gather between GPUs that map each other's memory.

Every rank stores its part into an inbox on every peer and reads its own inbox, in packets that
carry their own flags (`packets.py`): one trip over the link. Parts are added in rank order in
float32: the same bits on every rank.

An inbox has a place for each (program, parity, source rank), BLOCK packets each. Program p talks
to the programs p of its peers alone and counts its exchanges in its own memory, so that replays of
a CUDA graph need nothing from the host. Two parities are enough: p begins exchange n only when n-1
is over, so every peer had begun n-1 and, kernels of a stream being ordered, had read n-2. A place
is always written whole: flags in it are older by exactly two, or by one turn of the counter.

A program that waits longer than the timeout says so in `state` and in host memory, and never
waits again; what it returns then is rubbish, and the host must look before using it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pdrelay.engine.kernels.triton.launch import WARP, interpreting, pdl_flags
from pdrelay.engine.kernels.triton.packets import at_lane, lane, packets_at, receive, send

PACKET_BYTES = 8  # of data; twice that in an inbox
BLOCK = 256  # packets a program, one a thread: more would be dealt out to threads anew in between
_STATE_WORDS = 2  # a program: exchanges done, whether a peer was lost
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def inbox_bytes(max_bytes: int, world_size: int, block: int = BLOCK) -> int:
    """Of one rank's inbox for messages of up to `max_bytes`."""
    return num_programs(max_bytes, block) * 2 * world_size * block * 2 * PACKET_BYTES


def num_programs(num_bytes: int, block: int = BLOCK) -> int:
    programs: int = triton.cdiv(num_bytes, block * PACKET_BYTES)
    return programs


def state_words(max_bytes: int, block: int = BLOCK) -> int:
    return _STATE_WORDS * num_programs(max_bytes, block)


@dataclass(frozen=True)
class Exchange:
    """What one rank's kernels need: made once, with the same `max_bytes` and `block` on all
    ranks.

    `inboxes`: int64 [world_size], addresses as this rank's GPU reaches them, zeroed memory of
    `inbox_bytes` each. `state`: int32 zeros, `state_words`. `failed`: int32 [1], pinned host
    memory, 1 when a peer did not answer in time.
    """

    rank: int
    world_size: int
    max_bytes: int
    timeout_us: int  # kernels take integers as int32
    inboxes: torch.Tensor
    state: torch.Tensor
    failed: torch.Tensor
    pdl: bool = False
    block: int = BLOCK

    def reduce(self, x: torch.Tensor, out: torch.Tensor, *, phase: str = "both") -> None:
        """`out` = sum of all ranks' `x`; both contiguous, the same dtype (bfloat16, float16 or
        float32) and a multiple of 8 bytes, at most `max_bytes`. They may be the same."""
        self._launch(x, out, DTYPES[x.dtype], phase)

    def gather(self, x: torch.Tensor, out: torch.Tensor, *, phase: str = "both") -> None:
        """`out` = all ranks' `x` one after the other; contiguous, any dtype, sizes as above."""
        self._launch(x, out, None, phase)

    def _launch(
        self, x: torch.Tensor, out: torch.Tensor, dtype: tl.dtype | None, phase: str
    ) -> None:
        """`phase`: "send" or "receive" alone for the interpreter, where no rank runs beside
        another one."""
        num_bytes = x.numel() * x.element_size()
        assert x.is_contiguous() and out.is_contiguous()
        assert 0 < num_bytes <= self.max_bytes and num_bytes % PACKET_BYTES == 0
        assert x.data_ptr() % PACKET_BYTES == 0 and out.data_ptr() % PACKET_BYTES == 0
        assert phase == "both" or interpreting()
        _exchange[(num_programs(num_bytes, self.block),)](
            x.view(-1).view(torch.int64),
            out.view(-1).view(torch.int64),
            self.inboxes,
            self.state,
            self.failed,
            num_bytes // PACKET_BYTES,
            self.timeout_us,
            RANK=self.rank,
            WORLD=self.world_size,
            DTYPE=dtype,
            SEND=phase != "receive",
            RECEIVE=phase != "send",
            SIZE=self.block,
            INTERPRET=interpreting(),
            num_warps=self.block // WARP,
            **pdl_flags(self.pdl),
        )


@triton.jit(do_not_specialize=["num_packets", "timeout_us"])
def _exchange(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    inboxes_ptr: tl.tensor,
    state_ptr: tl.tensor,
    failed_ptr: tl.tensor,
    num_packets: int,
    timeout_us: int,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    DTYPE: tl.constexpr,
    SEND: tl.constexpr,
    RECEIVE: tl.constexpr,
    SIZE: tl.constexpr,
    INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: SIZE packets of every rank. DTYPE None: gather."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    places = tl.arange(0, SIZE)
    packets = program * SIZE + places
    inside = packets < num_packets
    own_inbox = tl.load(inboxes_ptr + RANK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    mine, flag, place, lost = begin_exchange(
        x_ptr + packets, inside, inboxes_ptr, state_ptr, RANK, WORLD, SEND, SIZE, INTERPRET
    )
    if RECEIVE:
        patience = tl.where(lost != 0, 0, timeout_us).to(tl.int64) * 1000
        late = tl.zeros((SIZE,), tl.int32)
        if DTYPE is not None:
            LANES: tl.constexpr = 64 // DTYPE.primitive_bitwidth
            total0 = tl.zeros((SIZE,), tl.float32)
            total1 = tl.zeros((SIZE,), tl.float32)
            total2 = tl.zeros((SIZE,), tl.float32)
            total3 = tl.zeros((SIZE,), tl.float32)
        for source in tl.static_range(WORLD):
            if source == RANK:
                value = mine
            else:
                value, silent = receive(
                    packets_at(own_inbox, place + source, SIZE), flag, patience, INTERPRET
                )
                late = late | silent
            if DTYPE is None:
                tl.store(out_ptr + source * num_packets + packets, value, mask=inside)
            else:
                total0 += lane(value, 0, DTYPE)
                total1 += lane(value, 1, DTYPE)
                if LANES == 4:
                    total2 += lane(value, 2, DTYPE)
                    total3 += lane(value, 3, DTYPE)
        if DTYPE is not None:
            value = at_lane(total0, 0, DTYPE) | at_lane(total1, 1, DTYPE)
            if LANES == 4:
                value |= at_lane(total2, 2, DTYPE) | at_lane(total3, 3, DTYPE)
            tl.store(out_ptr + packets, value, mask=inside)
        end_exchange(state_ptr, failed_ptr, flag, late)


@triton.jit
def begin_exchange(
    x_at: tl.tensor,
    inside: tl.tensor,
    inboxes_ptr: tl.tensor,
    state_ptr: tl.tensor,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    SEND: tl.constexpr,
    SIZE: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Send this program's packets, those at `x_at`, to every peer. Returns (the packets, the flag
    of this exchange, rank 0's place in the inboxes, whether a peer was lost before)."""
    program = tl.program_id(0)
    state = state_ptr + program * 2
    count = tl.load(state)
    lost = tl.load(state + 1)
    mine = tl.load(x_at, mask=inside, other=0)
    flag = count + 1
    place = (program * 2 + (count & 1)) * WORLD
    if SEND:
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                inbox = tl.load(inboxes_ptr + peer)
                send(packets_at(inbox, place + RANK, SIZE), mine, flag, INTERPRET)
    return mine, flag, place, lost


@triton.jit
def end_exchange(
    state_ptr: tl.tensor, failed_ptr: tl.tensor, flag: tl.tensor, late: tl.tensor
) -> None:
    """`late` [SIZE]: where a peer's packet did not come in time."""
    state = state_ptr + tl.program_id(0) * 2
    any_late = tl.max(late, 0)
    tl.debug_barrier()  # every warp has read the counter
    tl.store(state, flag)
    if any_late != 0:
        tl.store(state + 1, 1)
        tl.store(failed_ptr, 1)
