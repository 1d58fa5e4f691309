from __future__ import annotations

import asyncio

import openai
import pytest
from router_harness import REPLICA, front_door, until

from pdrelay.router.config import RouterConfig


async def test_429_when_full_and_200_when_there_is_room_again() -> None:
    async with front_door(REPLICA, auto=False, config=RouterConfig(max_num_requests=2)) as front:
        body = {"prompt": "x", "max_tokens": 1}
        running = [asyncio.create_task(front.post("/v1/completions", body)) for _ in range(2)]
        await until(lambda: front.flow.num_requests == 2)
        status, error, headers = await front.post("/v1/completions", body)
        assert status == 429 and headers["Retry-After"] == "1"
        assert error["error"]["code"] == "overloaded"
        with pytest.raises(openai.RateLimitError):
            await front.openai().completions.create(model="tiny", prompt="x")
        front.step("replica-0")
        assert [(await each)[0] for each in running] == [200, 200]
        asking = asyncio.create_task(front.post("/v1/completions", body))
        await until(lambda: front.flow.num_requests)
        front.step("replica-0")
        assert (await asking)[0] == 200


async def test_every_choice_counts() -> None:
    async with front_door(REPLICA, auto=False, config=RouterConfig(max_num_requests=3)) as front:
        first = asyncio.create_task(front.post("/v1/completions", {"prompt": "x", "n": 2}))
        await until(lambda: front.flow.num_requests == 2)
        assert (await front.post("/v1/completions", {"prompt": ["a", "b"]}))[0] == 429
        assert (await front.post("/v1/completions", {"prompt": "x", "n": 4}))[0] == 400
        first.cancel()
        await until(lambda: not front.flow.num_requests)


async def test_waiting_tokens() -> None:
    async with front_door(
        REPLICA, auto=False, config=RouterConfig(max_waiting_tokens=100)
    ) as front:
        large = {"prompt": [1] * 150, "max_tokens": 2}
        asking = asyncio.create_task(front.post("/v1/completions", large))
        await until(lambda: front.flow.waiting_tokens == 150)  # a lone one is admitted
        status, error, _ = await front.post("/v1/completions", {"prompt": [1]})
        assert status == 429 and "waiting" in error["error"]["message"]
        front.step("replica-0")
        assert front.flow.waiting_tokens == 0
        second = asyncio.create_task(
            front.post("/v1/completions", {"prompt": [1], "max_tokens": 1})
        )
        await until(lambda: front.flow.num_requests == 2)
        front.step("replica-0")
        assert [(await each)[0] for each in (asking, second)] == [200, 200]
        front.assert_idle()
