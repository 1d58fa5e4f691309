"""A client's record joined with the server's record of the same request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdrelay.bench.record import ClientRecord
from pdrelay.core.events import Event, EventKind, RequestRecord
from pdrelay.lab.rundir import Case, Run


@dataclass(frozen=True)
class Joined:
    """One request as both ends saw it."""

    case: Case
    client: ClientRecord
    server: RequestRecord

    def first(self, kind: EventKind) -> Event | None:
        return next((event for event in self.server.events if event.kind is kind), None)

    def last(self, kind: EventKind) -> Event | None:
        return next((event for event in reversed(self.server.events) if event.kind is kind), None)


def joined(run: Run, case: Case) -> Iterator[Joined]:
    """Complete, measured requests of a case that the server's record knows."""
    topology = run.topologies.get(case.info.topology)
    for client in case.measured:
        server = topology.by_client_id.get(client.request_id) if topology else None
        if client.ok and client.first_token_ns is not None and server is not None:
            yield Joined(case, client, server)
