"""How the next token of one request is chosen, as the engine sees it: validated and complete."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling and stopping rules of one request.

    The front door fills every field: generation_config defaults are merged, `seed` is drawn when
    the client gave none, stop strings stay at the front door (it owns the text).
    """

    max_tokens: int  # output tokens, >= 1; already capped to the context
    seed: int  # the noise of output token i is a function of (seed, i) alone
    client_seed: bool = False  # the client chose `seed`: engines that pay for seeds need one
    min_tokens: int = 0  # end-of-sequence and stop ids are barred before this many output tokens
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()  # the client's
    eos_token_ids: tuple[int, ...] = ()  # the model's
    ignore_eos: bool = False
    logprobs: int | None = None  # top-n alternatives per output token; 0: the chosen token's only
    prompt_logprobs: int | None = None  # the same for prompt tokens; turns prefix-cache reads off

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def terminal_token_ids(self) -> tuple[int, ...]:
        """Token ids that end the request, in a stable order."""
        return self.stop_token_ids if self.ignore_eos else self.eos_token_ids + self.stop_token_ids
