"""A request as the front door sends it to a vLLM, by each of vLLM's two APIs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pdrelay.core.messages import EngineRequest
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import pack_ids
from pdrelay.router.engines.engine_api import Call, VllmApi
from pdrelay.router.engines.piece import Leg
from pdrelay.router.engines.vllm_api import COMPLETIONS
from pdrelay.router.engines.vllm_tokens_api import GENERATE


def calls(
    model: str, ids: Sequence[int], max_tokens: int, *, ignore_eos: bool = False
) -> dict[str, Call]:
    """A greedy stream of `max_tokens` behind these ids, by path."""
    request = EngineRequest(
        request_id="bench",
        prompt_token_ids=pack_ids(ids),
        params=SamplingParams(
            max_tokens=max_tokens, temperature=0.0, seed=0, ignore_eos=ignore_eos
        ),
        arrived_ns=0,
    )
    api = VllmApi()
    models = json.dumps({"data": [{"id": model}]}).encode()
    api.read_facts({"/v1/models": models, "/version": None})
    made = {}
    for path, status in ((COMPLETIONS, 404), (GENERATE, 422)):
        api.read_refusals({GENERATE: status})
        made[path] = api.call(request, Leg(max_tokens=max_tokens, wants_usage=True))
    return made
