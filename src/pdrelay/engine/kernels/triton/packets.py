"""Packets between GPUs that say themselves when they are there.

NCCL's LL protocol: of 16 bytes stored at once, 8 are data, each 4-byte half beside a flag. A half
has arrived when its flag is the expected count, so there is no fence and no second trip for a
signal. As NCCL does, it relies on each 8-byte half of a 16-byte store arriving whole.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def packets_at(inbox: tl.tensor, place: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Addresses of the packets of a place."""
    return inbox + (place.to(tl.int64) * SIZE + tl.arange(0, SIZE)) * 16


@triton.jit
def lane(packet: tl.tensor, LANE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """One of a packet's numbers as float32."""
    if DTYPE.primitive_bitwidth == 32:
        return (packet >> (32 * LANE)).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (packet >> (16 * LANE)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def at_lane(number: tl.tensor, LANE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """A packet that holds `number`, rounded, and zeros."""
    if DTYPE.primitive_bitwidth == 32:
        bits = number.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        return bits << (32 * LANE)
    else:
        bits = number.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
        return bits << (16 * LANE)


@triton.jit
def send(address: tl.tensor, packet: tl.tensor, flag: tl.tensor, INTERPRET: tl.constexpr) -> None:
    if INTERPRET:
        words = address.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(words, packet.to(tl.int32))
        tl.store(words + 1, flag)
        tl.store(words + 2, (packet >> 32).to(tl.int32))
        tl.store(words + 3, flag)
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .b32 lo, hi;
                mov.b64 {lo, hi}, $2;
                st.volatile.global.v4.b32 [$1], {lo, $3, hi, $3};
                mov.b32 $0, 0;
            }
            """,
            "=r,l,l,r",
            [address, packet, flag],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def receive(
    address: tl.tensor, flag: tl.tensor, patience_ns: tl.tensor, INTERPRET: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(packet, 0) once both halves carry `flag`; (rubbish, 1) after `patience_ns`.

    The clock is read once in 1,024 polls, about half a millisecond.
    """
    if INTERPRET:
        words = address.to(tl.pointer_type(tl.int32), bitcast=True)
        lo = tl.load(words).to(tl.int64) & 0xFFFFFFFF
        packet = lo | (tl.load(words + 2).to(tl.int64) << 32)
        arrived = (tl.load(words + 1) == flag) & (tl.load(words + 3) == flag)
        silent = tl.where(arrived, 0, 1)
    else:
        packet, silent = tl.inline_asm_elementwise(
            """
            {
                .reg .pred ready, more;
                .reg .b32 lo, hi, first, second, polls, gave_up;
                .reg .b64 now, until;
                mov.b64 until, 0;
                mov.b32 polls, 0;
                mov.b32 gave_up, 0;
            poll:
                ld.volatile.global.v4.b32 {lo, first, hi, second}, [$2];
                setp.eq.b32 ready, first, $3;
                setp.eq.and.b32 ready, second, $3, ready;
                @ready bra done;
                add.u32 polls, polls, 1;
                and.b32 first, polls, 1023;
                setp.ne.b32 more, first, 0;
                @more bra poll;
                mov.u64 now, %globaltimer;
                setp.eq.u64 more, until, 0;
                @more add.u64 until, now, $4;
                setp.lt.u64 more, now, until;
                @more bra poll;
                mov.b32 gave_up, 1;
            done:
                mov.b64 $0, {lo, hi};
                mov.b32 $1, gave_up;
            }
            """,
            "=l,=r,l,r,l",
            [address, flag, patience_ns],
            dtype=(tl.int64, tl.int32),
            is_pure=False,
            pack=1,
        )
    return packet, silent
