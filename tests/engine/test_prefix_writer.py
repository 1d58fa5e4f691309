"""Replicas share prefixes through the pool."""

from __future__ import annotations

from pd_harness import FrontDoor, Instance
from pd_transports import TransportKit

from pdrelay.engine.fake_runner import expected_tokens


def test_a_replica_starts_from_what_another_computed(tmp_path):
    with TransportKit("pool", tmp_path) as kit:
        replicas = [Instance(f"replica-{i}", transport_factory=kit.factory) for i in range(2)]
        door = FrontDoor(*replicas)
        shared = list(range(100, 124))
        for number, replica in enumerate(replicas):
            prompt = [*shared, number]
            door.submit(replica, door.request(f"r{number}", prompt, 4))
            door.finish(f"r{number}")
            assert door.seen[f"r{number}"].tokens() == expected_tokens(prompt, 4)
        assert door.stats(replicas[0]).prefix_cache_hits == 0
        assert door.stats(replicas[1]).prefix_cache_hits == 24
        for number in range(40):  # more than the pool holds: leases and slots must come back
            prompt = [number * 7 + i for i in range(30)]
            door.submit(replicas[number % 2], door.request(f"s{number}", prompt, 2))
            door.finish(f"s{number}")
        door.settle()
        door.drain()
