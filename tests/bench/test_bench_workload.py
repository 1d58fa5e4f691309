from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.bench.workload import (
    CHAT_INPUT_MEAN,
    chat_like,
    fixed,
    from_jsonl,
    warmups_like,
)
from pdrelay.errors import ConfigError


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 300), st.integers(16, 64), st.integers(5, 300), st.integers(0, 2**63), st.data()
)
def test_fixed_prompts_differ_in_the_first_block_unless_shared(
    num: int, input_len: int, vocab: int, seed: int, data: st.DataObject
) -> None:
    shared = data.draw(st.sampled_from([0, input_len // 2]))
    low = data.draw(st.integers(0, 3))
    requests = fixed(num, input_len, 7, vocab, seed, low=low, shared_prefix_len=shared)
    prompts = [r.prompt_token_ids or [] for r in requests]
    assert all(len(p) == input_len and low <= min(p) <= max(p) < vocab for p in prompts)
    assert len({tuple(p[:shared]) for p in prompts}) == 1
    if vocab - low >= 20 or input_len - shared >= 32:  # room to spell the index
        assert len({tuple(p[shared : shared + 16]) for p in prompts}) == num or vocab - low < 20
    assert prompts == [
        r.prompt_token_ids
        for r in fixed(num, input_len, 7, vocab, seed, low=low, shared_prefix_len=shared)
    ]
    assert [r.index for r in requests] == list(range(num))
    assert {r.max_tokens for r in requests} == {7}


def test_prompts_differ_by_construction_and_not_by_luck() -> None:
    """5,000 random pairs of bytes would hold some 190 collisions."""
    requests = fixed(5000, 16, 1, 256, 11, low=3)
    assert len({tuple((r.prompt_token_ids or [])[:2]) for r in requests}) == 5000


def test_seeds_and_warm_ups_give_other_prompts() -> None:
    measured = fixed(20, 32, 4, 256, 1)
    others = [*fixed(20, 32, 4, 256, 2), *warmups_like(measured, 20, seed=1)]
    blocks = {tuple((r.prompt_token_ids or [])[:16]) for r in measured}
    assert not blocks & {tuple((r.prompt_token_ids or [])[:16]) for r in others}
    assert {len(r.prompt_token_ids or []) for r in others} == {32}
    assert warmups_like(measured, 0) == []


def test_chat_like_lengths() -> None:
    requests = chat_like(2000, seed=2, max_input_len=100_000, max_output_len=64)
    lengths = [len(r.prompt_token_ids or []) for r in requests]
    assert statistics.mean(lengths) == pytest.approx(CHAT_INPUT_MEAN, rel=0.1)
    assert min(lengths) >= 4
    assert max(r.max_tokens for r in requests) == 64
    few, again = (chat_like(100, seed=2) for _ in range(2))
    assert few == again


def test_jsonl_of_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    lines = [
        {"prompt": "日本", "max_tokens": 3, "arrival_s": 2.0, "tag": "t"},
        {"prompt_token_ids": [1, 2], "output_len": 4, "arrival_s": 1},
        {"input_len": 9, "max_tokens": 5, "arrival_s": 0, "extra_body": {"seed": 1}},
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    requests, timed = from_jsonl(path)
    assert timed
    assert [r.arrival_s for r in requests] == [0, 1, 2]
    assert [r.index for r in requests] == [0, 1, 2]
    assert len(requests[0].prompt_token_ids or []) == 9 and requests[0].extra_body == {"seed": 1}
    assert requests[1].prompt_token_ids == [1, 2] and requests[1].max_tokens == 4
    assert requests[2].prompt == "日本" and requests[2].tag == "t"
    assert len(from_jsonl(path, max_requests=1)[0]) == 1


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"prompt": "a"}', "max_tokens"),
        ('{"max_tokens": 1}', "prompt_token_ids"),
        ('{"prompt": "a", "input_len": 3, "max_tokens": 1}', "exactly one"),
        ('{"prompt": "a", "max_tokens": 1, "output_len": 1}', "exactly one"),
        ('{"prompt": "a", "max_tokens": 0}', "output length"),
        ('{"prompt": "a", "max_tokens": 1, "colour": 1}', "colour"),
        ('{"prompt": "", "max_tokens": 1}', "empty"),
        ('{"prompt_token_ids": [], "max_tokens": 1}', "non-empty"),
        ('{"prompt_token_ids": [-1], "max_tokens": 1}', "below 0"),
        ('{"input_len": -5, "max_tokens": 1}', "input_len"),
        ('{"prompt": "a", "max_tokens": 1, "arrival_s": -1}', "arrival_s"),
        ('{"prompt": 1, "max_tokens": 1}', "str"),
        ("[" * 100_000, "JSON"),
        ("{", "JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt": "ok", "max_tokens": 1}\n' + line)
    with pytest.raises(ConfigError) as caught:
        from_jsonl(path)
    assert f"{path}:2:" in str(caught.value) and word in str(caught.value)


def test_half_timed_and_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 1}\n{"prompt":"a","max_tokens":1,"arrival_s":1}')
    with pytest.raises(ConfigError, match="every line or on none"):
        from_jsonl(path)
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match="no requests"):
        from_jsonl(path)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fixed(0, 1, 1),
        lambda: fixed(1, 0, 1),
        lambda: fixed(1, 1, -1),
        lambda: fixed(1, 4, 1, shared_prefix_len=4),
        lambda: fixed(1, 4, 1, vocab_size=3),
        lambda: chat_like(0),
        lambda: chat_like(1, sigma=float("nan")),
    ],
)
def test_impossible_numbers_are_refused(call: object) -> None:
    with pytest.raises(ConfigError):
        call()  # type: ignore[operator]
