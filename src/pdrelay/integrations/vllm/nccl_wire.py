"""What a writer and a taker say to each other beside NCCL (transport `nccl` of the connector).

Over a socket pair, one end of which reached the producer with the consumer's Hello:

    writer (producer)                taker (consumer)
    Join(unique_id)            ->
                               <-    Joining()
    both make the communicator of two
    Put(parts)                 ->
    ncclSend                         ncclRecv into staging memory, then to the pages
                               <-    Placed(how many Puts so far)

The blocks of a Put are announced ones: the producer's last word on a transfer waits for `Placed`.
"""

from __future__ import annotations

import msgspec

from pdrelay.integrations.vllm.staging import Part
from pdrelay.transport.nccl_wire import Join, Joining, Natural


class Put(msgspec.Struct, frozen=True, tag="put"):
    """Pages of the consumer's, in the order of their bytes (`staging.py`)."""

    parts: list[Part]


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    num_puts: Natural


NcclMessage = Join | Joining | Put | Placed
