"""Builders of request lists: fixed lengths, chat-like lengths, a file. Deterministic by seed.

All arrivals are 0 unless a file gives them: see arrivals.py and `with_arrivals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pdrelay.bench.request import BenchRequest
from pdrelay.bench.token_ids import (
    DEFAULT_LOW,
    DEFAULT_VOCAB_SIZE,
    check_vocab,
    token_prompt,
)
from pdrelay.errors import ConfigError

MAX_LEN = 10_000_000  # tokens; anything longer is a typing error

# ShareGPT's mean lengths in tokens as the vLLM paper reports them (Kwon et al. 2023, figure 11).
CHAT_INPUT_MEAN = 161.31
CHAT_OUTPUT_MEAN = 337.99
# Spread of the log-normals: our choice; it gives the long tail of that figure.
CHAT_SIGMA = 1.0
# Bounds of vLLM's ShareGPT sampler: at least 4 tokens each, prompts up to 1,024.
CHAT_MIN_LEN = 4
CHAT_MAX_LEN = 1024


def check_length(name: str, value: int) -> None:
    """Raises ConfigError unless 1 <= value <= MAX_LEN."""
    if not 1 <= value <= MAX_LEN:
        raise ConfigError(f"{name} is {value}: give 1 to {MAX_LEN} tokens")


def fixed(
    num: int,
    input_len: int,
    output_len: int,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
    *,
    low: int = DEFAULT_LOW,
    shared_prefix_len: int = 0,
    tag: str = "",
) -> list[BenchRequest]:
    """`num` requests of `input_len` random token ids in [low, vocab_size) and `output_len` tokens.

    Prompts differ from the first block on, except for `shared_prefix_len` leading tokens, which
    all of them share. Raises ConfigError for impossible numbers.
    """
    check_length("input_len", input_len)
    check_length("output_len", output_len)
    if not 0 <= shared_prefix_len < input_len:
        raise ConfigError(
            f"shared_prefix_len is {shared_prefix_len}: give 0 to {input_len - 1} (below input_len)"
        )
    return from_lengths(
        [(input_len, output_len)] * num,
        vocab_size=vocab_size,
        seed=seed,
        low=low,
        shared_prefix_len=shared_prefix_len,
        tag=tag,
    )


def from_lengths(
    lengths: Sequence[tuple[int, int]],
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
    low: int = DEFAULT_LOW,
    shared_prefix_len: int = 0,
    tag: str = "",
    domain: str = "prompt",
) -> list[BenchRequest]:
    """One request of random token ids for each (input_len, output_len), in tokens."""
    check_vocab(low, vocab_size)
    if not lengths:
        raise ConfigError("no requests asked for: give at least 1")
    shared: list[int] = []
    if shared_prefix_len:
        shared = token_prompt(
            0,
            shared_prefix_len,
            seed=seed,
            low=low,
            vocab_size=vocab_size,
            domain=f"{domain}-shared",
        )
    requests = []
    for index, (input_len, output_len) in enumerate(lengths):
        own_len = input_len - len(shared)
        own = token_prompt(index, own_len, seed=seed, low=low, vocab_size=vocab_size, domain=domain)
        requests.append(BenchRequest(index, 0.0, shared + own, None, output_len, tag))
    return requests


def chat_like(
    num: int,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
    low: int = DEFAULT_LOW,
    input_mean: float = CHAT_INPUT_MEAN,
    output_mean: float = CHAT_OUTPUT_MEAN,
    sigma: float = CHAT_SIGMA,
    max_input_len: int = CHAT_MAX_LEN,
    max_output_len: int = CHAT_MAX_LEN,
    tag: str = "",
) -> list[BenchRequest]:
    """Requests with ShareGPT-like log-normal lengths, clipped to [4, max] tokens.

    The means are those before clipping: the logarithms are normal with standard deviation `sigma`
    and mean ln(mean) - sigma² / 2. Raises ConfigError for impossible numbers.
    """
    check_length("max_input_len", max_input_len)
    check_length("max_output_len", max_output_len)
    if num < 1 or not (input_mean > 0 and output_mean > 0 and sigma >= 0):
        raise ConfigError("chat-like lengths need num >= 1, means above 0 and sigma >= 0")
    rng = np.random.default_rng(seed)

    def draw(mean: float, cap: int) -> list[int]:
        lengths = rng.lognormal(math.log(mean) - sigma * sigma / 2, sigma, size=num)
        clipped = np.clip(np.rint(lengths), min(CHAT_MIN_LEN, cap), cap)
        ints: list[int] = clipped.astype(np.int64).tolist()
        return ints

    inputs = draw(input_mean, max_input_len)
    outputs = draw(output_mean, max_output_len)
    return from_lengths(
        list(zip(inputs, outputs, strict=True)),
        vocab_size=vocab_size,
        seed=seed,
        low=low,
        tag=tag,
    )


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    input_len: int | None = None
    max_tokens: int | None = None
    output_len: int | None = None
    arrival_s: float | None = None
    tag: str = ""
    extra_body: dict[str, Any] = {}


def from_jsonl(
    path: str | Path,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
    low: int = DEFAULT_LOW,
    max_requests: int | None = None,
) -> tuple[list[BenchRequest], bool]:
    """Reads a workload file, one JSON object a line.

    Each line has one of `prompt` (text), `prompt_token_ids`, `input_len` (random ids); one of
    `max_tokens`, `output_len`; and may have `arrival_s`, `tag`, `extra_body`. Requests come back
    in order of arrival.

    Returns:
        The requests, and whether the file gave arrival times (all lines or none).

    Raises:
        ConfigError: naming file:line, and what to write there.
    """
    check_vocab(low, vocab_size)
    requests: list[BenchRequest] = []
    timed: bool | None = None
    for number, raw in read_lines(path):
        if max_requests is not None and len(requests) >= max_requests:
            break
        where = f"{path}:{number}"
        try:
            line = msgspec.json.decode(raw, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {error}: write one JSON object a line") from error
        request = _line_request(
            line, where, len(requests), vocab_size=vocab_size, seed=seed, low=low
        )
        if timed is None:
            timed = line.arrival_s is not None
        if timed != (line.arrival_s is not None):
            raise ConfigError(f"{where}: give arrival_s on every line or on none")
        requests.append(request)
    if not requests:
        raise ConfigError(f"{path} holds no requests: write one JSON object a line")
    if timed:
        requests.sort(key=lambda r: r.arrival_s)
        requests = [replace(r, index=i) for i, r in enumerate(requests)]
    return requests, bool(timed)


def _line_request(
    line: _Line, where: str, index: int, *, vocab_size: int, seed: int, low: int
) -> BenchRequest:
    sources = (line.prompt, line.prompt_token_ids, line.input_len)
    if sum(source is not None for source in sources) != 1:
        raise ConfigError(f"{where}: give exactly one of prompt, prompt_token_ids, input_len")
    if (line.max_tokens is None) == (line.output_len is None):
        raise ConfigError(f"{where}: give exactly one of max_tokens, output_len")
    output_len = line.max_tokens if line.max_tokens is not None else line.output_len
    assert output_len is not None
    ids = line.prompt_token_ids
    try:
        check_length("the output length", output_len)
        if line.input_len is not None:
            check_length("input_len", line.input_len)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if line.input_len is not None:
        ids = token_prompt(
            index, line.input_len, seed=seed, low=low, vocab_size=vocab_size, domain="workload"
        )
    elif ids is not None and (not ids or min(ids) < 0):
        raise ConfigError(f"{where}: prompt_token_ids must be non-empty, and none below 0")
    elif line.prompt == "":
        raise ConfigError(f"{where}: the prompt is empty: write some text")
    arrival_s = line.arrival_s or 0.0
    if not 0 <= arrival_s < 1e9:
        raise ConfigError(f"{where}: arrival_s is {arrival_s}: give seconds from 0 on")
    return BenchRequest(index, arrival_s, ids, line.prompt, output_len, line.tag, line.extra_body)


def read_lines(path: str | Path) -> list[tuple[int, bytes]]:
    """Non-empty lines of a file with their numbers from 1. ConfigError when it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot read {path} ({reason}): check the path") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    return [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]


def warmups_like(
    requests: Sequence[BenchRequest],
    num: int,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
    low: int = DEFAULT_LOW,
) -> list[BenchRequest]:
    """`num` requests with the lengths of `requests` (evenly picked) and other prompts."""
    if num < 1 or not requests:
        return []
    picked = [requests[i * len(requests) // num] for i in range(num)]
    warmups = []
    for index, like in enumerate(picked):
        ids, text = None, None
        if like.prompt_token_ids is not None:
            ids = token_prompt(
                index,
                len(like.prompt_token_ids),
                seed=seed,
                low=low,
                vocab_size=vocab_size,
                domain="warm-up",
            )
        else:
            text = f"{index} warm-up: {like.prompt}"
        warmups.append(
            BenchRequest(index, 0.0, ids, text, like.max_tokens, "warm-up", like.extra_body)
        )
    return warmups
