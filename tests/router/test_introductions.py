"""What waits until producers and consumers have met, and for how long."""

from __future__ import annotations

import asyncio

from router_harness import PD, REPLICA, FrontDoor, front_door, until

from pdrelay.core.messages import Meet, Met, Prefill, Role

BODY = {"prompt": [97, 98, 99], "max_tokens": 3}
UNAVAILABLE = {
    "status": "unavailable",
    "instances": {"decode-0": "prepares hand-overs"},
}


async def all_met(front: FrontDoor) -> bool:
    """Whether nothing is waited for, after a turn of the loop."""
    task = asyncio.ensure_future(front.flow._cluster.all_met())
    await asyncio.sleep(0)
    return task.done() or not task.cancel()


async def test_health_and_the_start_wait_until_the_pair_has_met() -> None:
    async with front_door(PD, meets=False) as front:
        assert await front.get("/health") == (503, UNAVAILABLE)
        assert not await all_met(front)
        front.clients["prefill-0"]._on_message(Met("decode-0", "fake:of an earlier incarnation"))
        assert not await all_met(front)
        status, _, _ = await front.post("/v1/completions", BODY)
        assert status == 200, "nobody else could take it"
        front.engine("prefill-0").meet()
        assert await all_met(front)
        assert await front.get("/health") == (200, {"status": "ok"})


async def test_nothing_waits_without_hand_overs() -> None:
    async with front_door(REPLICA, meets=False) as front:
        assert await all_met(front)
        assert await front.get("/health") == (200, {"status": "ok"})


async def test_all_pairs_are_waited_for() -> None:
    roles = {**PD, "prefill-1": Role.PREFILL, "decode-1": Role.DECODE}
    async with front_door(roles, meets=False) as front:
        front.engine("prefill-0").meet()
        assert not await all_met(front)
        front.engine("prefill-1").meet()
        assert await all_met(front)


async def test_after_the_deadline_nothing_waits_and_the_log_says_so(caplog) -> None:
    async with front_door(PD, meets=False, meet_timeout_s=0.01) as front:
        async with asyncio.timeout(10):
            await front.flow._cluster.all_met()
        assert await front.get("/health") == (200, {"status": "ok"})
        front.engine("prefill-0").meet()  # later than never
        (record,) = [each for each in caplog.records if "goes on without" in each.message]
        assert "prefill-0 -> decode-0" in record.message


async def test_a_lost_worker_is_waited_for_no_longer_and_introduced_again(caplog) -> None:
    for lost in PD:
        async with front_door(PD, meets=False) as front:
            assert len(front.sent("prefill-0", Meet)) == 1
            front.clients[lost].kill()
            assert await all_met(front)
            front.clients[lost].restart()
            assert len(front.sent("prefill-0", Meet)) == 2
            assert not await all_met(front)
            front.engine("prefill-0").meet()
            assert await all_met(front)


async def test_a_restarted_producer_takes_prompts_when_it_has_met() -> None:
    roles = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE}
    async with front_door(roles) as front:
        fresh = front.engine("prefill-0")
        front.clients["prefill-0"].kill()
        fresh.meets = False
        front.clients["prefill-0"].restart()

        async def producer() -> str:
            """Who takes a prompt that no one has seen."""
            before = {name: len(front.sent(name, Prefill)) for name in roles}
            body = {**BODY, "prompt": [97 + sum(before.values()), 98]}
            assert (await front.post("/v1/completions", body))[0] == 200
            (taken,) = [name for name in roles if len(front.sent(name, Prefill)) > before[name]]
            return taken

        assert [await producer() for _ in range(3)] == ["prefill-1"] * 3
        fresh.meet()
        assert await producer() == "prefill-0", "first of the least loaded"


async def test_a_restarted_consumer_takes_requests_at_once() -> None:
    async with front_door({**PD, "decode-1": Role.DECODE}) as front:
        front.engine("prefill-0").meets = False
        front.clients["decode-0"].kill()
        front.clients["decode-0"].restart()
        assert await front.get("/health") == (503, UNAVAILABLE)
        assert (await front.post("/v1/completions", BODY))[0] == 200
        assert front.sent("prefill-0", Prefill)[-1].consumer == "decode-0"
        front.engine("prefill-0").meet()
        await until(lambda: not front.flow._cluster.sick())
