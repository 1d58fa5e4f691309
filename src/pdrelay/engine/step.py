"""What a runner returns for one step."""

from __future__ import annotations

from dataclasses import dataclass

from pdrelay.core.messages import TokenLogprobs


@dataclass(frozen=True)
class StepTokens:
    """`token_ids[i]` and `logprobs[i]` belong to sampling chunk i of the plan."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: dict[str, list[TokenLogprobs]]  # of the chunk's tokens but position 0
