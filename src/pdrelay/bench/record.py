"""What the client saw of one request: one JSON line in `requests.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from pdrelay.errors import ConfigError

SCHEMA_VERSION = 1

Status = Literal["ok", "failed", "cancelled"]


class ClientRecord(msgspec.Struct, kw_only=True):
    """Times are CLOCK_MONOTONIC nanoseconds, comparable with server events on the same host.

    The derived times are in milliseconds and None where they do not exist: a failed request has
    no TTFT unless its first token arrived.
    """

    schema_version: int = SCHEMA_VERSION
    request_id: str  # sent as X-Request-Id
    index: int = 0  # the BenchRequest's
    tag: str = ""
    intended_ns: int  # when the schedule wanted it sent: every clock starts here
    sent_ns: int = 0  # when the client began to send it
    first_token_ns: int | None = None
    chunk_ns: list[int] = []  # arrival of each chunk that carries tokens
    end_ns: int  # last chunk of a complete answer, or when the failure was noticed
    max_tokens: int = 0  # asked for
    num_prompt_tokens: int = 0  # as the server counts; as sent, when it does not say
    num_cached_tokens: int | None = None
    num_output_tokens: int = 0
    status: Status = "ok"
    http_status: int | None = None
    error: str = ""
    finish_reason: str = ""
    token_ids: list[int] | None = None  # of the answer, when asked for and given

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def send_lag_ms(self) -> float:
        """How late the client was."""
        return (self.sent_ns - self.intended_ns) / 1e6

    @property
    def ttft_ms(self) -> float | None:
        """Intended send to first content token."""
        if self.first_token_ns is None:
            return None
        return (self.first_token_ns - self.intended_ns) / 1e6

    @property
    def ttst_ms(self) -> float | None:
        """Intended send to second chunk of tokens."""
        return (self.chunk_ns[1] - self.intended_ns) / 1e6 if len(self.chunk_ns) > 1 else None

    @property
    def itls_ms(self) -> list[float]:
        """Gaps between consecutive chunks of tokens, as `vllm bench serve` takes them."""
        times = self.chunk_ns
        return [(b - a) / 1e6 for a, b in pairwise(times)]

    @property
    def tpot_ms(self) -> float | None:
        """(end - first token) / (n - 1) of a complete answer of n > 1 tokens."""
        if not self.ok or self.first_token_ns is None or self.num_output_tokens < 2:
            return None
        return (self.end_ns - self.first_token_ns) / (self.num_output_tokens - 1) / 1e6

    @property
    def e2e_ms(self) -> float | None:
        """Intended send to the last chunk of a complete answer."""
        return (self.end_ns - self.intended_ns) / 1e6 if self.ok else None


def write_records(path: str | Path, records: Iterable[ClientRecord]) -> None:
    """Writes one JSON object a line."""
    encode = msgspec.json.Encoder().encode
    with Path(path).open("wb") as file:
        for record in records:
            file.write(encode(record))
            file.write(b"\n")


def read_records(path: str | Path) -> list[ClientRecord]:
    """Reads what `write_records` wrote.

    Raises:
        ConfigError: the file cannot be read, a line is not a record, or its schema is another.
    """
    decode = msgspec.json.Decoder(ClientRecord).decode
    records = []
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot read {path} ({reason}): check the path") from error
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line:
            continue
        try:
            record = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}:{number}: {error}: run the load again") from error
        if record.schema_version != SCHEMA_VERSION:
            raise ConfigError(
                f"{path}:{number}: schema {record.schema_version}, not {SCHEMA_VERSION}: use the "
                "pdrelay version that wrote it"
            )
        records.append(record)
    return records
