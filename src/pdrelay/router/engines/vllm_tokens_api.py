"""vLLM's /inference/v1/generate as the front door uses it: token ids in, token ids out, no text.

/v1/completions makes text that nobody reads here. For a prompt of 8,192 tokens its server spells
the prompt out twice before token 1 and sends it back with it, in the event loop that relays every
other stream (benchmarks/vllm_api_stall.py). Versions from 0.23 on have this API, from 0.30 on
behind --enable-scale-out. Log-probabilities differ between versions here: requests for them go to
/v1/completions.
"""

from __future__ import annotations

import msgspec

from pdrelay.core.messages import EngineRequest
from pdrelay.router.engines import vllm_api
from pdrelay.router.engines.piece import Leg, Piece

GENERATE = "/inference/v1/generate"


def serves(request: EngineRequest) -> bool:
    """Whether this API answers what is asked."""
    return request.params.logprobs is None and request.params.prompt_logprobs is None


def body(model: str, request: EngineRequest, leg: Leg) -> bytes:
    """The JSON body of one leg of a request that `serves` accepts."""
    sampling = {**vllm_api.sampling(request, leg), "detokenize": False}
    if leg.kv_transfer_params is not None:
        # As /v1/completions hands them to the engine: versions before 0.29 drop the field here.
        sampling["extra_args"] = {"kv_transfer_params": leg.kv_transfer_params}
    return msgspec.json.encode(
        {
            **vllm_api.envelope(model, request, leg),
            "token_ids": vllm_api.prompt(request, leg),
            "sampling_params": sampling,
        }
    )


def read_piece(data: bytes) -> Piece:
    """As `vllm_api.read_piece`. Before 0.32 the answer has no stop reason: one of our ids ended it,
    the last, as there are no stop strings."""
    piece = vllm_api.read_piece(data)
    if piece.finish_reason == "stop":
        piece.stop_token_id = piece.token_ids[-1] if piece.token_ids else None
    return piece
