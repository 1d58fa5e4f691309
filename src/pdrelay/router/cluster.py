"""The engine instances behind the front door, and who takes the next request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdrelay.core.messages import EngineRequest, Meet, Met, Role
from pdrelay.errors import WorkerLostError
from pdrelay.router.engine_client import EngineClient, Listener
from pdrelay.router.introductions import MEET_TIMEOUT_S, Introductions, Pair
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
    """Either co-located instances (role both), or producers and consumers.

    An instance of P/D is healthy once the pairs that its becoming ready made have met, or
    `meet_timeout_s` later.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        affinity: PrefixAffinity | None = None,
        *,
        meet_timeout_s: float = MEET_TIMEOUT_S,
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
        self._introductions = Introductions(meet_timeout_s)

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
        """Instance to reason, of those that are not alive or still prepare for each other."""
        reasons = {client.instance: self._ailment(client) for client in self.clients}
        return {instance: reason for instance, reason in reasons.items() if reason}

    def _ailment(self, client: EngineClient) -> str:
        meeting = self._introductions.is_meeting(client.instance)
        return client.reason or ("prepares hand-overs" if meeting else "")

    def forget(self, instance: str) -> None:
        """The instance died, and its prefix cache and connections with it."""
        self._affinity.forget(instance)
        self._introductions.lost(instance)

    def pick(self, request: EngineRequest) -> Route:
        """Raises WorkerLostError when no instance of a needed role is alive.

        While another can, a restarted producer takes no prompts until it has met the consumers:
        undisturbed, it makes at once what its hand-overs use. A restarted consumer takes requests
        at once: producers make the same for it wherever prompts go, and under load only in gaps,
        which may not come.
        """
        first = self._alive(self._replicas or self._producers)
        first = [each for each in first if not self._introductions.is_meeting(each)] or first
        chosen = self._affinity.choose(request, first, self.load_of)
        if self._replicas:
            return Route(self.client(chosen))
        consumer = least_loaded(self._alive(self._consumers), self.load_of)
        return Route(self.client(chosen), self.client(consumer))

    def introduce(self, instance: str) -> None:
        """Producers connect to consumers as soon as both are there: what a connection needs made
        (a GPU's graphs that store into the consumer's pages) is made before prompts come."""
        pairs = [pair for pair in self._pairs() if instance in (pair.producer, pair.consumer)]
        self._introductions.begin(instance, pairs)
        for pair in pairs:
            try:
                self.client(pair.producer).send(Meet(pair.consumer, pair.address))
            except WorkerLostError:
                self._introductions.lost(pair.producer)

    def _pairs(self) -> list[Pair]:
        """All that can meet now."""
        return [
            Pair(producer.instance, consumer.instance, consumer.ready.peer_address)
            for consumer in self._consumers
            if consumer.ready is not None and consumer.ready.peer_address
            for producer in self._producers
            if producer.alive
        ]

    def met(self, producer: str, met: Met) -> None:
        self._introductions.met(Pair(producer, met.consumer, met.consumer_address))

    async def all_met(self) -> None:
        """Returns when no instance prepares hand-overs; after `meet_timeout_s` at the latest."""
        await self._introductions.all_met()

    def _alive(self, clients: Sequence[EngineClient]) -> list[str]:
        alive = [client.instance for client in clients if client.alive]
        if not alive:
            reasons = "; ".join(f"{client.instance} {client.reason}" for client in clients)
            raise WorkerLostError(f"no worker can take the request ({reasons}); try again")
        return alive
