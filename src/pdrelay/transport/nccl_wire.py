"""What the two ends of a `nccl` link say to each other beside NCCL itself.

Over a socket pair of their own, one end of which reached the producer with the descriptor:

    producer                         consumer
    Join(unique_id)            ->
                               <-    Joining()
    both make the communicator of two
    Announce(...)              ->    posts the receives that fit
    ncclSend ...                     ncclRecv ...  into staging memory, then to the pages

Every announced piece is received, also one that nobody wants any more, so that both ends stay in
step. No id of a block travels: the consumer places request blocks itself.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdrelay.transport.nccl_library import UNIQUE_ID_BYTES

# A piece is at most this, or one block: what the consumer sets aside for each producer, twice.
STAGING_BYTES = 16 << 20


class Join(msgspec.Struct, frozen=True, tag="join"):
    unique_id: Annotated[
        bytes, msgspec.Meta(min_length=UNIQUE_ID_BYTES, max_length=UNIQUE_ID_BYTES)
    ]


class Joining(msgspec.Struct, frozen=True, tag="joining"):
    pass


Natural = Annotated[int, msgspec.Meta(ge=0)]


class Announce(msgspec.Struct, frozen=True, tag="announce"):
    """One layer of request blocks `first_block ..`, as `runs` of so many blocks each."""

    transfer_id: str
    layer: Natural
    first_block: Natural
    runs: list[Annotated[int, msgspec.Meta(ge=1)]]


NcclMessage = Join | Joining | Announce
