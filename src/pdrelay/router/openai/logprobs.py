"""Log-probabilities as each endpoint shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pdrelay.core.messages import TokenLogprobs
from pdrelay.model.tokenizer import Tokenizer

_LOWEST = -9999.0  # stands for minus infinity, which JSON lacks; vLLM's value

TokenText = Callable[[int], str]


def token_text_of(tokenizer: Tokenizer, as_ids: bool) -> TokenText:
    """`as_ids`: vLLM's `return_tokens_as_token_ids`."""
    return (lambda token_id: f"token_id:{token_id}") if as_ids else tokenizer.token_text


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    num_top: int,
    token_text: TokenText,
    prompt_token_ids: Sequence[int],
) -> dict[str, Any]:
    """Four parallel lists. The first prompt token, whose entry is None, has no log-probability.

    `top_logprobs` holds the chosen token too, also when it is not among the best, as in vLLM.
    """
    tokens: list[str] = []
    chosen: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry is None:
            tokens.append(token_text(prompt_token_ids[0]))
            chosen.append(None)
            top.append(None)
            continue
        tokens.append(token_text(entry.token_id))
        chosen.append(_shown(entry.logprob))
        top.append(_top_by_text(entry, num_top, token_text))
    return {
        "text_offset": list(offsets),
        "token_logprobs": chosen,
        "tokens": tokens,
        "top_logprobs": top,
    }


def _top_by_text(entry: TokenLogprobs, num_top: int, token_text: TokenText) -> dict[str, float]:
    best: dict[str, float] = {}
    for each in entry.top[:num_top]:
        best.setdefault(token_text(each.token_id), _shown(each.logprob))
    best.setdefault(token_text(entry.token_id), _shown(entry.logprob))
    return best


def chat_logprobs(
    entries: Iterable[TokenLogprobs | None], num_top: int, tokenizer: Tokenizer, as_ids: bool
) -> dict[str, Any]:
    token_text = token_text_of(tokenizer, as_ids)

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(token_id),
            "logprob": _shown(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for entry in entries:
        assert entry is not None, "chat has no echo"
        top = [shown(each.token_id, each.logprob) for each in entry.top[:num_top]]
        content.append({**shown(entry.token_id, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _shown(logprob: float) -> float:
    return max(logprob, _LOWEST)
