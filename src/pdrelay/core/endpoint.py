"""An engine instance behind HTTP: where it is, and what its peers need to know of it."""

from __future__ import annotations

from typing import Literal

import msgspec

from pdrelay.core.messages import Ready

EngineName = Literal["vllm", "sglang"]
# sequential: producer first, consumer after its answer; concurrent: both at once; auto: whichever
# is right for the request's sampling parameters
Dispatch = Literal["auto", "sequential", "concurrent"]


class HttpEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """`ready` is what is known before the instance answers; the instance completes it."""

    engine: EngineName
    url: str  # http://host:port
    ready: Ready
    api_key: str = ""  # bearer token that the instance asks for
    producer_address: str = ""  # PdrelayConnector: path of the producer's Unix socket
    bootstrap_host: str = ""  # SGLang producers
    bootstrap_port: int = 0
