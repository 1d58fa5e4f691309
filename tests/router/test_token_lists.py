"""Lists of token ids that are decoded in slices, against the same lists decoded at once."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from pdrelay.errors import InvalidRequestError
from pdrelay.router.openai.protocol import CompletionRequest, decode_body
from pdrelay.router.openai.token_list import TokenLists
from pdrelay.router.openai.validate import completion_prompts

VOCAB = 128_256
LENGTHS = (1, 2, 100, 3000, 8192, 20_000)


async def prompts(raw: str) -> Any:
    """Of a body whose `prompt` is `raw`."""
    body = decode_body(b'{"prompt": %b, "max_tokens": 1}' % raw.encode(), CompletionRequest)
    return await completion_prompts(body, TokenLists(VOCAB))


def spaced(ids: list[int], rng: random.Random) -> str:
    """JSON with white space of all kinds wherever it may be."""
    parts = []
    for token_id in ids:
        parts += [rng.choice(["", " ", "\n\t", "\r\n  "]), str(token_id), rng.choice(["", " "])]
        parts.append(",")
    return f"[{''.join(parts[:-1])}{rng.choice(['', chr(10)])}]"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", range(3))
async def test_slices_make_the_same_ids(length: int, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(VOCAB) for _ in range(length)]
    for raw in (json.dumps(ids), json.dumps(ids, separators=(",", ":")), spaced(ids, rng)):
        (got,) = await prompts(raw)
        assert got.typecode == "I" and got.tolist() == ids == json.loads(raw)


@pytest.mark.parametrize("bad", ["-1", str(VOCAB), "1.5", "1e3", '"7"', "null", "[1]", "9" * 30])
@pytest.mark.parametrize("place", [0, 1, 2499, 8000, 19_999])
async def test_what_is_no_id_is_named_by_its_place(bad: str, place: int) -> None:
    items = ["5"] * 20_000
    items[place] = bad
    with pytest.raises(InvalidRequestError) as refusal:
        await prompts(f"[{','.join(items)}]")
    assert refusal.value.param == "prompt"
    if place or bad not in ("[1]", '"7"'):  # such a list is one of lists, or of texts
        assert f"prompt[{place}]" in str(refusal.value)


async def test_lists_of_lists_are_read_whole() -> None:
    lists = [[i, i + 1] for i in range(9000)]
    assert [ids.tolist() for ids in await prompts(json.dumps(lists))] == lists
    with pytest.raises(InvalidRequestError, match=r"prompt\[8999\]\[1\]"):
        await prompts(json.dumps([*lists[:-1], [1, VOCAB]]))


async def test_others_have_their_turn_between_the_slices() -> None:
    num_turns = 0

    async def others() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await prompts(json.dumps([100_000] * 100))
    assert num_turns == 0
    await prompts(json.dumps([100_000] * 20_000))  # 160 KB
    task.cancel()
    assert num_turns >= 4
