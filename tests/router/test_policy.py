from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrelay.core.messages import EngineRequest, Role
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import pack_ids
from pdrelay.errors import WorkerLostError
from pdrelay.router.cluster import Cluster, Lease
from pdrelay.router.fakes.native import FakeEngine, FakeEngineClient
from pdrelay.router.policy import Load, PrefixAffinity, PrefixIndex, least_loaded

INSTANCES = ["a", "b", "c"]


def request(*token_ids: int, salt: str = "") -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_token_ids=pack_ids(token_ids),
        params=SamplingParams(max_tokens=1, seed=0),
        arrived_ns=0,
        cache_salt=salt,
    )


def cluster(**roles: Role) -> Cluster:
    clients = [FakeEngineClient(FakeEngine(name, role, auto=False)) for name, role in roles.items()]
    for client in clients:
        client.engine.start()
    return Cluster(clients, PrefixAffinity(PrefixIndex(block_size=4)))


def test_least_loaded_by_tokens_then_requests_then_order() -> None:
    loads = {"a": Load(5, 1), "b": Load(2, 9), "c": Load(2, 3)}
    assert least_loaded(INSTANCES, loads.__getitem__) == "c"
    assert least_loaded(INSTANCES, lambda instance: Load()) == "a"


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
def test_keys_agree_exactly_on_shared_full_blocks(left: list[int], right: list[int]) -> None:
    index = PrefixIndex(block_size=4)
    keys = index.keys(request(*left)), index.keys(request(*right))
    shared = 0
    while left[shared : shared + 1] and left[: shared + 1] == right[: shared + 1]:
        shared += 1
    usable = min(shared, max(len(left) - 1, 0), max(len(right) - 1, 0)) // 4
    same = [a == b for a, b in zip(*keys, strict=False)]
    assert sum(same) == usable and same == sorted(same, reverse=True)


def test_salts_share_nothing() -> None:
    index = PrefixIndex(block_size=4)
    prompt = range(9)
    assert not set(index.keys(request(*prompt))) & set(index.keys(request(*prompt, salt="s")))


def test_affinity_follows_the_prefix_until_it_costs_more_than_it_saves() -> None:
    affinity = PrefixAffinity(PrefixIndex(block_size=4))
    loads = {name: Load() for name in INSTANCES}
    prompt = list(range(17))
    loads["a"].tokens = 1
    assert affinity.choose(request(*prompt), INSTANCES, loads.__getitem__) == "b"
    loads["b"].tokens = 16
    loads["a"].tokens = 0
    assert affinity.choose(request(*prompt, 99), INSTANCES, loads.__getitem__) == "b"
    loads["b"].tokens = 17
    assert affinity.choose(request(*prompt, 98), INSTANCES, loads.__getitem__) == "a"
    loads["b"].tokens = 0
    assert affinity.choose(request(*prompt, 97), INSTANCES, loads.__getitem__) == "a"


def test_a_dead_instance_is_forgotten() -> None:
    affinity = PrefixAffinity(PrefixIndex(block_size=4))
    loads = {name: Load() for name in INSTANCES}
    loads["a"].tokens = 5
    prompt = list(range(17))
    assert affinity.choose(request(*prompt), INSTANCES, loads.__getitem__) == "b"
    affinity.forget("b")
    loads["b"].tokens = 1
    assert affinity.choose(request(*prompt), INSTANCES, loads.__getitem__) == "c"


def test_index_is_bounded_and_keeps_short_prefixes_longest() -> None:
    index = PrefixIndex(block_size=1, capacity=4)
    keys = index.keys(request(1, 2, 3, 4, 5, 6, 7))
    index.add(keys, "a")
    assert index.longest(keys) == ("a", 4)
    other = index.keys(request(9, 8, 7))
    index.add(other, "b")
    assert index.longest(keys) == ("a", 2) and index.longest(other) == ("b", 2)


async def test_pick_skips_the_dead_and_balances_pairs() -> None:
    pair = cluster(p0=Role.PREFILL, p1=Role.PREFILL, d0=Role.DECODE, d1=Role.DECODE)
    first = pair.pick(request(*range(10)))
    assert first.instances == ["p0", "d0"]
    lease = Lease(pair, first, 10)
    assert pair.pick(request(*range(100, 130))).instances == ["p1", "d1"]
    lease.prefilled()
    assert (pair.load_of("p0"), pair.load_of("d0")) == (Load(0, 1), Load(10, 1))
    lease.release("p0")
    lease.release("p0")
    lease.release_all()
    assert all(pair.load_of(name) == Load() for name in ("p0", "p1", "d0", "d1"))
    pair.client("p1").kill("x")
    pair.client("d0").kill("out of memory")
    assert pair.pick(request(1)).instances == ["p0", "d1"]
    pair.client("d1").kill("y")
    with pytest.raises(WorkerLostError, match="d0 out of memory; d1 y"):
        pair.pick(request(1))
