from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdrelay.bench.traces import MOONCAKE_BLOCK_SIZE, read_trace
from pdrelay.errors import ConfigError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:46.6805907,0,0\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-17 00:00:00,197,183"
)


def mooncake_row(t_ms: float, length: int, hash_ids: list[int], output: int = 5) -> dict[str, Any]:
    return {
        "timestamp": t_ms,
        "input_length": length,
        "output_length": output,
        "hash_ids": hash_ids,
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@st.composite
def prefix_trees(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows whose hash ids form a tree, as chained block hashes do."""
    parents = draw(st.lists(st.integers(-1, 5), min_size=1, max_size=12))
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        base = paths[parent] if 0 <= parent < node else []
        paths.append([*base, node * draw(st.integers(1, 3)) * 100 + node])
    rows = []
    for i in draw(st.lists(st.integers(0, len(paths) - 1), min_size=1, max_size=8)):
        whole = MOONCAKE_BLOCK_SIZE * len(paths[i])
        # A leaf that is cut has an id of its own: the same id has one length everywhere.
        cut = draw(st.integers(0, 511))
        ids = paths[i] if cut == 0 else [*paths[i][:-1], 100_000 + 512 * paths[i][-1] + cut]
        rows.append(mooncake_row(draw(st.integers(0, 9999)), whole - cut, ids))
    return rows


def common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prefix_trees(),
    st.sampled_from([1.0, 0.5, 1 / 16, 0.13, 2.0]),
    st.one_of(st.none(), st.integers(1, 3000)),
    st.integers(0, 2**40),
)
def test_prompts_share_exactly_what_hash_ids_share(
    tmp_path: Path, rows: list[dict[str, Any]], scale: float, cap: int | None, seed: int
) -> None:
    path = write_jsonl(tmp_path / "trace.jsonl", rows)
    # A vocabulary above every id: one token spells a whole id, so sharing is exact to the token.
    requests, info = read_trace(
        path, length_scale=scale, max_input_len=cap, seed=seed, vocab_size=2**33, low=3
    )
    ordered = sorted(rows, key=lambda r: r["timestamp"])
    block = info.block_size
    assert block == max(1, round(512 * scale))
    num_capped = 0
    for row, request in zip(ordered, requests, strict=True):
        whole, cut = divmod(row["input_length"], 512)
        length = whole * block + (min(block, max(1, round(cut * block / 512))) if cut else 0)
        num_capped += cap is not None and length > cap
        assert len(request.prompt_token_ids or []) == (length if cap is None else min(length, cap))
    assert info.num_input_capped == num_capped
    seen: set[int] = set()
    num_shared = 0
    for i, (a, request) in enumerate(zip(ordered, requests, strict=True)):
        ids_a = request.prompt_token_ids or []
        for b, other in zip(ordered[:i], requests[:i], strict=True):
            ids_b = other.prompt_token_ids or []
            blocks = common(a["hash_ids"], b["hash_ids"])
            assert common(ids_a, ids_b) == min(blocks * block, len(ids_a), len(ids_b))
        blocks = 0
        while blocks < len(a["hash_ids"]) and a["hash_ids"][blocks] in seen:
            blocks += 1
        kept = -(-len(ids_a) // block)
        num_shared += min(len(ids_a), blocks * block)
        seen.update(a["hash_ids"][:kept])
    assert info.num_shared_tokens == num_shared


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=20, unique=True), st.integers(0, 9))
def test_different_ids_differ_within_the_first_tokens_even_in_a_byte_vocabulary(
    tmp_path: Path, ids: list[int], seed: int
) -> None:
    rows = [mooncake_row(0, 512, [hash_id]) for hash_id in ids]
    requests, _ = read_trace(write_jsonl(tmp_path / "t.jsonl", rows), seed=seed)
    heads = {tuple((r.prompt_token_ids or [])[:5]) for r in requests}
    assert len(heads) == len(ids)
    assert all(3 <= t < 256 for r in requests for t in r.prompt_token_ids or [])


def test_content_does_not_depend_on_the_window(tmp_path: Path) -> None:
    rows = [mooncake_row(1000 * i, 700, [i // 2, 50 + i]) for i in range(6)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    whole, _ = read_trace(path, seed=5)
    part, info = read_trace(path, seed=5, start_s=2, duration_s=3)
    assert [r.prompt_token_ids for r in part] == [r.prompt_token_ids for r in whole[2:5]]
    assert [r.arrival_s for r in part] == [0, 1, 2]
    assert [r.index for r in part] == [0, 1, 2]
    assert (info.num_outside_window, info.num_requests, info.num_rows) == (3, 3, 6)
    other, _ = read_trace(path, seed=6)
    assert other[0].prompt_token_ids != whole[0].prompt_token_ids


def test_azure_times_lengths_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    requests, info = read_trace(path, time_scale=2, max_input_len=380, max_output_len=100)
    assert info.format == "azure"
    assert [round(r.arrival_s * 1e7) for r in requests[:3]] == [0, 14, 86_291_580]  # 7 digits kept
    assert requests[3].arrival_s == pytest.approx(2 * 20_653.31941)
    assert [len(r.prompt_token_ids or []) for r in requests] == [374, 1, 380, 197]
    assert [r.max_tokens for r in requests] == [44, 1, 100, 100]
    assert (info.num_input_capped, info.num_output_capped, info.num_raised_to_one) == (1, 2, 1)
    assert info.total_input_tokens == 374 + 1 + 380 + 197
    assert info.total_output_tokens == 44 + 1 + 100 + 100
    assert info.block_size == info.num_shared_tokens == 0
    heads = {tuple((r.prompt_token_ids or [])[:1]) for r in requests}
    assert len(heads) == 4
    assert "4 of 4 requests" in info.describe() and "cut to 380" in info.describe()


def test_azure_2024_timestamps_with_a_zone(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 02:00:00.25+02:00,1,1\n2024-05-10 00:00:01Z,1,1\n"
    )
    requests, _ = read_trace(path)
    assert [r.arrival_s for r in requests] == [0, 0.75]


def test_max_requests_and_unsorted_rows(tmp_path: Path) -> None:
    rows = [mooncake_row(t, 10, [t]) for t in (500, 0, 250)]
    requests, info = read_trace(write_jsonl(tmp_path / "t.jsonl", rows), max_requests=2)
    assert [r.arrival_s for r in requests] == [0, 0.25]
    assert info.num_over_max_requests == 1


@pytest.mark.parametrize(
    ("text", "line", "fix"),
    [
        ("", "", "is empty"),
        ("a,b\n1,2\n", ":1:", "header"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "", "no rows"),
        (AZURE + "\n2023-11-16 18:15:46,1\n", ":6:", "2 columns"),
        (AZURE + "\n2023-13-16 18:15:46,1,1\n", ":6:", "YYYY-MM-DD"),
        (AZURE + "\n\n\nyesterday,1,1\n", ":8:", "YYYY-MM-DD"),
        (AZURE + "\n2023-11-16 18:15:46,-1,1\n", ":6:", "ContextTokens"),
        (AZURE + "\n2023-11-16 18:15:46,1,99999999999999\n", ":6:", "GeneratedTokens"),
        (AZURE + "\n2023-11-16 18:15:46,1,nan\n", ":6:", "GeneratedTokens"),
        ('{"timestamp": 0}\n', ":1:", "input_length"),
        ('{"timestamp": 0, "input_length"', ":1:", "write an object"),
        (json.dumps(mooncake_row(0, 513, [1])), ":1:", "write 2"),
        (json.dumps(mooncake_row(-1, 1, [1])), ":1:", "timestamp"),
        (json.dumps(mooncake_row(0, 1, [-1])), ":1:", "hash id"),
        (json.dumps(mooncake_row(0, 10**9, [1])), ":1:", "input_length"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, text: str, line: str, fix: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert f"{path}{line}" in message and fix in message and "\n" not in message


def test_bytes_that_are_no_text_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        read_trace(path)
    path.write_bytes(b'{"timestamp": "\xff"}')
    with pytest.raises(ConfigError, match=":1:"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    "options",
    [
        {"time_scale": 0},
        {"time_scale": float("nan")},
        {"length_scale": -1},
        {"start_s": -1},
        {"duration_s": 0},
        {"start_s": 1e6},
        {"max_requests": 0},
        {"max_input_len": 0},
        {"max_output_len": -3},
        {"vocab_size": 4},
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    with pytest.raises(ConfigError):
        read_trace(path, **options)
