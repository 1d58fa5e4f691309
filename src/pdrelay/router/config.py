"""What the front door needs to know: its own limits, and the model it speaks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdrelay.model.generation_config import GenerationConfig
from pdrelay.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class RouterConfig:
    """Limits of the front door. Times are seconds, sizes bytes or tokens."""

    api_key: str | None = None  # bearer token that /v1/* asks for
    max_num_requests: int = 1024  # in flight, each choice of each prompt counted; then 429
    max_waiting_tokens: int = 1 << 20  # prompt tokens without a first token yet; then 429
    max_request_bytes: int = 32 << 20
    max_stream_buffer: int = 16 << 20  # unsent bytes of a client that reads too slowly
    max_choices: int = 128  # `n`
    max_logprobs: int = 20
    request_timeout_s: float = 600.0
    first_token_timeout_s: float | None = None
    body_timeout_s: float = 30.0  # to receive a request's body
    keepalive_timeout_s: float = 75.0  # of an idle connection, and to receive a request's headers
    drain_timeout_s: float = 30.0
    retry_after_s: int = 1

    def __post_init__(self) -> None:
        assert self.max_num_requests >= 1 and self.max_request_bytes >= 1


@dataclass(frozen=True)
class ModelInfo:
    """The model that is served, as clients see it."""

    served_model_name: str
    root: str  # directory or built-in shape
    max_model_len: int  # tokens, prompt and output together
    tokenizer: Tokenizer
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    created: int = 0  # Unix seconds, for /v1/models

    @property
    def vocab_size(self) -> int:
        """The tokenizer's, which is the model's: padding included."""
        return self.tokenizer.vocab_size
