"""The life of one request as lanes: client, router, each instance, the link."""

from __future__ import annotations

from collections.abc import Callable

from pdrelay.core.events import EventKind
from pdrelay.lab.report.figures import Lane, Segment, Timeline
from pdrelay.lab.report.gpu import counters_under
from pdrelay.lab.report.joined import Joined, joined
from pdrelay.lab.report.ttft import nominal_length
from pdrelay.lab.rundir import Run, TopologyData

WANTED_LEN = 2048
TOKENS_SHOWN = 8


def timelines(run: Run) -> list[Timeline]:
    """One request in each topology: the one of median TTFT among the idle probes."""
    chosen = ((name, _typical(run, name)) for name in run.topologies)
    return [
        timeline_of(name, request, run.topologies[name])
        for name, request in chosen
        if request is not None
    ]


def _typical(run: Run, topology: str) -> Joined | None:
    """Median TTFT at the input length nearest to WANTED_LEN; else of any joined request."""
    cases = [case for case in run.select("ttft", topology) if case.info.case == "idle"]
    cases = cases or [case for case in run.cases if case.info.topology == topology]
    requests = [request for case in cases for request in joined(run, case)]
    if not requests:
        return None
    lengths = [nominal_length(r.client) or r.client.num_prompt_tokens for r in requests]
    nearest = min(lengths, key=lambda length: (abs(length - WANTED_LEN), length))
    alike = [r for r, length in zip(requests, lengths, strict=True) if length == nearest]
    alike.sort(key=lambda request: request.client.ttft_ms or 0.0)
    return alike[(len(alike) - 1) // 2]


def timeline_of(topology: str, request: Joined, data: TopologyData) -> Timeline:
    """Lanes of one request and its GPUs' samples, in ms after its intended send."""
    zero = request.client.intended_ns
    chunks = request.client.chunk_ns[:TOKENS_SHOWN]
    until = max([*chunks, request.client.first_token_ns or zero])
    ends = [e.t_ns for e in request.server.events if e.kind is EventKind.TRANSFER_END]
    until = max([until, *ends])

    def ms(t_ns: int) -> float:
        return (min(t_ns, until) - zero) / 1e6

    return Timeline(
        topology=topology,
        request_id=request.client.request_id,
        num_prompt_tokens=request.server.num_prompt_tokens,
        ttft=request.client.ttft_ms or 0.0,
        until=ms(until),
        lanes=_Lanes(request, ms).build(until),
        counters=counters_under(data, zero, until),
    )


class _Lanes:
    """Builds the lanes; `ms` converts and clips times."""

    def __init__(self, request: Joined, ms: Callable[[int], float]) -> None:
        self._request = request
        self._ms = ms

    def build(self, until_ns: int) -> list[Lane]:
        instances = self._request.server.instances
        lanes = [self._client(until_ns), self._router()]
        lanes += [self._instance(instance, until_ns) for instance in instances]
        link = self._link()
        if link is not None:
            lanes.insert(len(lanes) - 1, link)
        return lanes

    def _time(self, kind: EventKind) -> int | None:
        event = self._request.first(kind)
        return event.t_ns if event else None

    def _segment(self, start: int | None, end: int | None, label: str, kind: str) -> list[Segment]:
        if start is None or end is None or end < start:
            return []
        return [Segment(start=self._ms(start), end=self._ms(end), label=label, kind=kind)]

    def _client(self, until_ns: int) -> Lane:
        client = self._request.client
        first = client.first_token_ns
        chunks = [t for t in client.chunk_ns if t <= until_ns]
        return Lane(
            name="client",
            segments=[
                *self._segment(client.intended_ns, first, "waits for the first token", "wait"),
                *self._segment(first, chunks[-1] if chunks else first, "reads tokens", "stream"),
            ],
            marks=[(self._ms(t), f"token {i}") for i, t in enumerate(chunks, 1)],
        )

    def _router(self) -> Lane:
        arrived, routed = self._time(EventKind.ARRIVED), self._time(EventKind.ROUTED)
        segments = self._segment(arrived, routed, "tokenize, validate, route", "route")
        return Lane(name="router", segments=segments, marks=[])

    def _instance(self, name: str, until_ns: int) -> Lane:
        segments: list[Segment] = []
        marks: list[tuple[float, str]] = []
        prefill = self._request.first(EventKind.PREFILL_START)
        if prefill is not None and prefill.instance == name:
            routed = self._time(EventKind.ROUTED)
            segments += self._segment(routed, prefill.t_ns, "waits for prefill", "wait")
            end = self._time(EventKind.PREFILL_END)
            segments += self._segment(prefill.t_ns, end, "prefill", "prefill")
        tokens = [
            e.t_ns
            for e in self._request.server.events
            if e.instance == name
            and e.kind in (EventKind.FIRST_TOKEN, EventKind.TOKEN)
            and e.t_ns <= until_ns
        ]
        marks += [(self._ms(t), "token sampled") for t in tokens]
        decode_start = self._decode_start(name, tokens)
        if tokens and decode_start is not None and tokens[-1] > decode_start:
            segments += self._segment(decode_start, tokens[-1], "decode", "decode")
        reserved = self._request.first(EventKind.RESERVED)
        if reserved is not None and reserved.instance == name:
            marks.append((self._ms(reserved.t_ns), "blocks reserved"))
        return Lane(name=name, segments=segments, marks=sorted(marks))

    def _decode_start(self, name: str, tokens: list[int]) -> int | None:
        admitted = self._request.first(EventKind.DECODE_ADMITTED)
        if admitted is not None and admitted.instance == name:
            return admitted.t_ns
        return tokens[0] if tokens else None

    def _link(self) -> Lane | None:
        start = self._request.first(EventKind.TRANSFER_START)
        end = self._request.last(EventKind.TRANSFER_END)
        if end is None:
            return None
        label = f"{end.num_bytes / 1e6:.1f} MB in {end.num_pieces} pieces ({end.transport})"
        begin = start.t_ns if start else end.t_ns
        return Lane(
            name="link", segments=self._segment(begin, end.t_ns, label, "transfer"), marks=[]
        )
