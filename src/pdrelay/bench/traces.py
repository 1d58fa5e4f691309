"""Readers of public request traces: arrival times, lengths and, for Mooncake, prefix sharing.

* Azure LLM inference trace 2023 (Patel et al., Splitwise, ISCA 2024): CSV with TIMESTAMP,
  ContextTokens, GeneratedTokens. Timestamps have seven fractional digits.
* Mooncake (Qin et al., FAST 2025): JSONL with timestamp (ms), input_length, output_length and
  hash_ids, one for each 512-token block, the last one possibly partial. Equal ids mean equal
  blocks after equal prefixes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from pdrelay.bench.request import BenchRequest
from pdrelay.bench.token_ids import DEFAULT_LOW, DEFAULT_VOCAB_SIZE, check_vocab, token_blocks
from pdrelay.bench.workload import MAX_LEN, check_length, read_lines
from pdrelay.errors import ConfigError

MOONCAKE_BLOCK_SIZE = 512  # tokens a hash id stands for
_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII
)
_MAX_HASH_ID = 2**63 - 1


class TraceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was read, and what was changed on the way. Lengths are in tokens, after scaling."""

    path: str
    format: str  # "azure" or "mooncake"
    num_rows: int
    num_requests: int
    num_outside_window: int  # dropped: before start_s or after start_s + duration_s
    num_over_max_requests: int  # dropped: the window held more than max_requests
    num_input_capped: int
    num_output_capped: int
    num_raised_to_one: int  # rows whose input or output length was 0 (after scaling)
    total_input_tokens: int
    total_output_tokens: int
    num_shared_tokens: int  # prompt tokens in whole or partial blocks seen earlier in the load
    duration_s: float  # last arrival, time_scale applied
    time_scale: float
    length_scale: float  # as applied: Mooncake's is rounded to whole tokens a block
    block_size: int  # tokens a hash id stands for, after scaling; 0 without sharing
    start_s: float
    max_input_len: int | None
    max_output_len: int | None

    def describe(self) -> str:
        """One line for people: what is in the load and what was left out or cut."""
        text = (
            f"{self.format} trace: {self.num_requests} of {self.num_rows} requests over "
            f"{self.duration_s:.1f} s (time x {self.time_scale:g}, lengths x "
            f"{self.length_scale:g}), {self.total_input_tokens} prompt tokens"
        )
        if self.block_size and self.total_input_tokens:
            text += f" ({self.num_shared_tokens / self.total_input_tokens:.0%} shared)"
        for count, what in (
            (self.num_outside_window, "outside the window"),
            (self.num_over_max_requests, "over the request limit"),
            (self.num_input_capped, f"prompts cut to {self.max_input_len}"),
            (self.num_output_capped, f"outputs cut to {self.max_output_len}"),
            (self.num_raised_to_one, "empty or scaled-away lengths raised to 1"),
        ):
            if count:
                text += f"; {count} {what}"
        return text


@dataclass(frozen=True)
class _Row:
    t_ns: int  # after the first row of the trace
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Options:
    time_scale: float
    length_scale: float
    max_input_len: int | None
    max_output_len: int | None
    start_s: float
    duration_s: float | None
    max_requests: int | None
    seed: int
    vocab_size: int
    low: int

    def __post_init__(self) -> None:
        for name in ("time_scale", "length_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= 1e6):
                raise ConfigError(f"{name} is {value}: give a number above 0, at most 1e6")
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise ConfigError(f"start_s is {self.start_s}: give seconds from 0 on")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ConfigError(f"duration_s is {self.duration_s}: give seconds above 0")
        if self.max_requests is not None and self.max_requests < 1:
            raise ConfigError(f"max_requests is {self.max_requests}: give at least 1")
        for name in ("max_input_len", "max_output_len"):
            value = getattr(self, name)
            if value is not None:
                check_length(name, value)
        check_vocab(self.low, self.vocab_size)


def read_trace(
    path: str | Path,
    *,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_requests: int | None = None,
    seed: int = 0,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    low: int = DEFAULT_LOW,
) -> tuple[list[BenchRequest], TraceInfo]:
    """Reads an Azure CSV or a Mooncake JSONL trace, told apart by its first line.

    Args:
        time_scale: arrival times are multiplied by it: 0.5 doubles the rate.
        length_scale: lengths are multiplied by it, and so is the block size of hash ids, which
            is first rounded to whole tokens, so that sharing stays exact.
        max_input_len, max_output_len: caps in tokens, after scaling. Capped prompts keep their
            head, so that sharing stays exact.
        start_s, duration_s: the window, in seconds of the trace itself (before `time_scale`);
            arrivals are counted from its start.
        max_requests: the first so many of the window.
        low, vocab_size: prompts are token ids in [low, vocab_size).

    Returns:
        Requests in order of arrival, and what was capped or dropped.

    Raises:
        ConfigError: bad options, an unreadable file (naming file:line), or an empty window.
    """
    options = _Options(
        time_scale,
        length_scale,
        max_input_len,
        max_output_len,
        start_s,
        duration_s,
        max_requests,
        seed,
        vocab_size,
        low,
    )
    lines = read_lines(path)
    if not lines:
        raise ConfigError(f"{path} is empty: give an Azure CSV or a Mooncake JSONL trace")
    mooncake = lines[0][1].lstrip().startswith(b"{")
    rows = _mooncake_rows(path, lines) if mooncake else _azure_rows(path, lines)
    rows.sort(key=lambda row: row.t_ns)
    return _build(path, "mooncake" if mooncake else "azure", rows, options)


# ---- the two formats


def _azure_rows(path: str | Path, lines: list[tuple[int, bytes]]) -> list[_Row]:
    number, header = lines[0]
    names = [name.strip() for name in header.decode("utf-8", "replace").split(",")]
    if names != _AZURE_HEADER:
        raise ConfigError(
            f"{path}:{number}: neither a JSON object nor the header {','.join(_AZURE_HEADER)}: "
            "give an Azure 2023 CSV or a Mooncake JSONL trace"
        )
    stamped = []
    for number, raw in lines[1:]:
        where = f"{path}:{number}"
        fields = raw.decode("utf-8", "replace").split(",")
        if len(fields) != len(_AZURE_HEADER):
            raise ConfigError(
                f"{where}: {len(fields)} columns: write TIMESTAMP,ContextTokens,GeneratedTokens"
            )
        stamped.append(
            (
                _timestamp_ns(fields[0].strip(), where),
                _length(fields[1], where, "ContextTokens"),
                _length(fields[2], where, "GeneratedTokens"),
            )
        )
    if not stamped:
        raise ConfigError(f"{path} has a header and no rows: give a complete trace")
    first = min(stamp for stamp, _, _ in stamped)
    return [_Row(stamp - first, n_in, n_out) for stamp, n_in, n_out in stamped]


def _timestamp_ns(text: str, where: str) -> int:
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        whole = datetime.fromisoformat(match[1] + (match[3] or "+00:00").replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(
            f"{where}: timestamp {text[:40]!r}: write YYYY-MM-DD HH:MM:SS.fffffff"
        ) from None
    return int(whole.timestamp()) * 10**9 + int((match[2] or "0").ljust(9, "0"))


def _length(text: str, where: str, name: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 12 and int(digits) <= MAX_LEN):
        raise ConfigError(f"{where}: {name} is {digits[:40]!r}: write 0 to {MAX_LEN}")
    return int(digits)


class _MooncakeLine(msgspec.Struct):
    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: list[int]


def _mooncake_rows(path: str | Path, lines: list[tuple[int, bytes]]) -> list[_Row]:
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    rows = []
    for number, raw in lines:
        where = f"{path}:{number}"
        try:
            line = decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{where}: {error}: write an object with timestamp (ms), input_length, "
                "output_length, hash_ids"
            ) from error
        _check_mooncake(line, where)
        rows.append(
            _Row(
                round(line.timestamp * 1e6),
                line.input_length,
                line.output_length,
                tuple(line.hash_ids),
            )
        )
    first = min(row.t_ns for row in rows)
    return [_Row(r.t_ns - first, r.input_len, r.output_len, r.hash_ids) for r in rows]


def _check_mooncake(line: _MooncakeLine, where: str) -> None:
    if not 0 <= line.timestamp < 1e15:
        raise ConfigError(f"{where}: timestamp is {line.timestamp}: write ms from 0 on")
    for name in ("input_length", "output_length"):
        value = getattr(line, name)
        if not 0 <= value <= MAX_LEN:
            raise ConfigError(f"{where}: {name} is {value}: write 0 to {MAX_LEN}")
    expected = -(-line.input_length // MOONCAKE_BLOCK_SIZE)
    if len(line.hash_ids) != expected:
        raise ConfigError(
            f"{where}: {len(line.hash_ids)} hash_ids for {line.input_length} tokens: write "
            f"{expected}, one for each {MOONCAKE_BLOCK_SIZE}-token block"
        )
    if line.hash_ids and not 0 <= min(line.hash_ids) <= max(line.hash_ids) <= _MAX_HASH_ID:
        raise ConfigError(f"{where}: a hash id is outside 0 to 2**63 - 1: write such integers")


# ---- rows to requests


class _Tally:
    """Counts what `TraceInfo` reports."""

    def __init__(self) -> None:
        self.input_capped = 0
        self.output_capped = 0
        self.raised = 0
        self.shared_tokens = 0
        self.blocks_seen: set[int] = set()


def _build(
    path: str | Path, name: str, rows: Sequence[_Row], options: _Options
) -> tuple[list[BenchRequest], TraceInfo]:
    start_ns = round(options.start_s * 1e9)
    end_ns = math.inf if options.duration_s is None else start_ns + options.duration_s * 1e9
    window = [(i, row) for i, row in enumerate(rows) if start_ns <= row.t_ns < end_ns]
    if not window:
        raise ConfigError(
            f"{path}: no request between {options.start_s:g} s and {end_ns / 1e9:g} s: the trace "
            f"lasts {rows[-1].t_ns / 1e9:g} s, widen the window"
        )
    kept = window if options.max_requests is None else window[: options.max_requests]
    mooncake = name == "mooncake"
    block_size = max(1, round(MOONCAKE_BLOCK_SIZE * options.length_scale))
    length_scale = block_size / MOONCAKE_BLOCK_SIZE if mooncake else options.length_scale
    tally = _Tally()
    requests = []
    for index, (row_index, row) in enumerate(kept):
        if mooncake:
            ids = _shared_prompt(row, row_index, block_size, options, tally)
        else:
            ids = _own_prompt(row, row_index, length_scale, options, tally)
        output_len = _scaled(row.output_len, length_scale, options.max_output_len)
        tally.output_capped += output_len < round(row.output_len * length_scale)
        tally.raised += row.input_len == 0 or round(row.output_len * length_scale) == 0
        arrival_s = (row.t_ns - start_ns) / 1e9 * options.time_scale
        requests.append(BenchRequest(index, arrival_s, ids, None, output_len))
    info = TraceInfo(
        path=str(path),
        format=name,
        num_rows=len(rows),
        num_requests=len(requests),
        num_outside_window=len(rows) - len(window),
        num_over_max_requests=len(window) - len(kept),
        num_input_capped=tally.input_capped,
        num_output_capped=tally.output_capped,
        num_raised_to_one=tally.raised,
        total_input_tokens=sum(len(r.prompt_token_ids or ()) for r in requests),
        total_output_tokens=sum(r.max_tokens for r in requests),
        num_shared_tokens=tally.shared_tokens,
        duration_s=requests[-1].arrival_s,
        time_scale=options.time_scale,
        length_scale=length_scale,
        block_size=block_size if mooncake else 0,
        start_s=options.start_s,
        max_input_len=options.max_input_len,
        max_output_len=options.max_output_len,
    )
    return requests, info


def _scaled(length: int, scale: float, cap: int | None) -> int:
    scaled = max(1, round(length * scale))
    return scaled if cap is None else min(scaled, cap)


def _own_prompt(
    row: _Row, row_index: int, scale: float, options: _Options, tally: _Tally
) -> list[int]:
    length = _scaled(row.input_len, scale, options.max_input_len)
    tally.input_capped += length < round(row.input_len * scale)
    return _tokens([row_index], length, options, "azure")[:length]


def _shared_prompt(
    row: _Row, row_index: int, block_size: int, options: _Options, tally: _Tally
) -> list[int]:
    """The prompt that the hash ids describe: whole blocks, the last one cut to its length."""
    if not row.hash_ids:  # an empty prompt, raised to one token of its own
        return _tokens([row_index], 1, options, "mooncake-empty")
    last = row.input_len - MOONCAKE_BLOCK_SIZE * (len(row.hash_ids) - 1)
    last_scaled = min(block_size, max(1, round(last * block_size / MOONCAKE_BLOCK_SIZE)))
    length = block_size * (len(row.hash_ids) - 1) + last_scaled
    if options.max_input_len is not None and length > options.max_input_len:
        length = options.max_input_len
        tally.input_capped += 1
    num_blocks = -(-length // block_size)
    hash_ids = list(row.hash_ids[:num_blocks])
    _count_shared(hash_ids, length, block_size, tally)
    return _tokens(hash_ids, block_size, options, "mooncake")[:length]


def _count_shared(hash_ids: list[int], length: int, block_size: int, tally: _Tally) -> None:
    shared_blocks = 0
    while shared_blocks < len(hash_ids) and hash_ids[shared_blocks] in tally.blocks_seen:
        shared_blocks += 1
    tally.shared_tokens += min(length, shared_blocks * block_size)
    tally.blocks_seen.update(hash_ids)


def _tokens(keys: list[int], block_len: int, options: _Options, domain: str) -> list[int]:
    blocks = token_blocks(
        keys,
        block_len,
        seed=options.seed,
        low=options.low,
        vocab_size=options.vocab_size,
        domain=domain,
    )
    ids: list[int] = blocks.reshape(-1).tolist()
    return ids
