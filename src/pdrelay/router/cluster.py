"""The engine instances behind the front door, and who takes the next request."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from pdrelay.core.messages import EngineRequest, Meet, Role
from pdrelay.errors import WorkerLostError
from pdrelay.router.engine_client import EngineClient, Listener
from pdrelay.router.policy import Load, PrefixAffinity, least_loaded


@dataclass(frozen=True)
class Route:
    """Where one request goes. Co-located: `consumer` is None."""

    producer: EngineClient  # or the replica
    consumer: EngineClient | None = None

    @property
    def instances(self) -> list[str]:
        clients = [self.producer] if self.consumer is None else [self.producer, self.consumer]
        return [client.instance for client in clients]


class Lease:
    """The load one request puts on its instances. Every call is idempotent."""

    def __init__(self, cluster: Cluster, route: Route, num_tokens: int) -> None:
        self._cluster = cluster
        self._num_tokens = num_tokens
        self._held = {instance: num_tokens for instance in route.instances}
        self._producer = route.producer.instance
        for instance in self._held:
            load = cluster.load_of(instance)
            load.tokens += num_tokens
            load.requests += 1

    def prefilled(self) -> None:
        """The first token is here: its prompt waits no longer."""
        tokens = self._held.get(self._producer, 0)
        if tokens:
            self._cluster.load_of(self._producer).tokens -= tokens
            self._held[self._producer] = 0

    def release(self, instance: str) -> None:
        tokens = self._held.pop(instance, None)
        if tokens is not None:
            load = self._cluster.load_of(instance)
            load.tokens -= tokens
            load.requests -= 1

    def release_all(self) -> None:
        for instance in list(self._held):
            self.release(instance)


class Cluster:
    """Either co-located instances (role both), or producers and consumers."""

    def __init__(
        self, clients: Sequence[EngineClient], affinity: PrefixAffinity | None = None
    ) -> None:
        self.clients = tuple(clients)
        self._by_instance = {client.instance: client for client in clients}
        assert len(self._by_instance) == len(clients) > 0, "instance ids are unique"
        self._replicas = [client for client in clients if client.role is Role.BOTH]
        self._producers = [client for client in clients if client.role is Role.PREFILL]
        self._consumers = [client for client in clients if client.role is Role.DECODE]
        assert bool(self._replicas) != bool(self._producers and self._consumers)
        assert len(self._replicas) in (0, len(clients))
        self._loads = {client.instance: Load() for client in clients}
        self._affinity = PrefixAffinity() if affinity is None else affinity

    def client(self, instance: str) -> EngineClient:
        return self._by_instance[instance]

    def load_of(self, instance: str) -> Load:
        return self._loads[instance]

    def attach(self, listener: Listener) -> None:
        for client in self.clients:
            client.attach(listener)
        for consumer in self._consumers:  # `on_ready` introduces those that are ready later
            self.introduce(consumer.instance)

    def sick(self) -> dict[str, str]:
        """Instance to reason, of those that are not alive."""
        return {client.instance: client.reason for client in self.clients if not client.alive}

    def forget(self, instance: str) -> None:
        """The instance died, and its prefix cache with it."""
        self._affinity.forget(instance)

    def pick(self, request: EngineRequest) -> Route:
        """Raises WorkerLostError when no instance of a needed role is alive."""
        first = self._alive(self._replicas or self._producers)
        chosen = self._affinity.choose(request, first, self.load_of)
        if self._replicas:
            return Route(self.client(chosen))
        consumer = least_loaded(self._alive(self._consumers), self.load_of)
        return Route(self.client(chosen), self.client(consumer))

    def introduce(self, instance: str) -> None:
        """Producers connect to consumers as soon as both are there: what a connection needs made
        (a GPU's graphs that store into the consumer's pages) is made before prompts come."""
        for consumer in self._consumers:
            ready = consumer.ready
            if ready is None or not ready.peer_address:
                continue
            for producer in self._producers:
                if producer.alive and instance in (consumer.instance, producer.instance):
                    with contextlib.suppress(WorkerLostError):
                        producer.send(Meet(consumer.instance, ready.peer_address))

    def _alive(self, clients: Sequence[EngineClient]) -> list[str]:
        alive = [client.instance for client in clients if client.alive]
        if not alive:
            reasons = "; ".join(f"{client.instance} {client.reason}" for client in clients)
            raise WorkerLostError(f"no worker can take the request ({reasons}); try again")
        return alive
