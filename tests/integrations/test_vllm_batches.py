"""How much goes into one submission changes nothing but their number."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hand_over_kit import BLOCK_SIZE, BLOCKS, LAYERS, Kit, page_value, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.integrations.vllm.fake_pages import PAGE_BYTES
from pdrelay.integrations.vllm.step import Chunk, StepPlan, prompt_digest

BATCHES = (0, 4 * PAGE_BYTES, 9 * PAGE_BYTES, 1 << 30)
LENGTHS = (14, 8, 5, 16)  # tokens of each request's prompt


@dataclass
class Request:
    name: str
    prompt: list[int]
    dst: list[int]
    consumer: int
    at: int = 0  # tokens computed
    blocks: list[int] = field(default_factory=list)
    announced: bool = False
    state: str = "running"

    def chunk(self, stop: int) -> Chunk:
        digest, total = prompt_digest(self.prompt), len(self.prompt)
        blocks = self.blocks[: -(-stop // BLOCK_SIZE)]
        return Chunk(self.name, f"T-{self.name}", total, digest, blocks, stop)


class Run:
    """Some requests from one producer to two consumers."""

    def __init__(self, directory, batch_bytes: int) -> None:
        self.kit = Kit(directory)
        self.kit.source.batch_bytes = batch_bytes
        self.kit.world.eager = False
        self.free = list(range(BLOCKS))
        self.requests = []
        for i, length in enumerate(LENGTHS):
            dst = [10 * i + 3, 10 * i + 9, 10 * i, 10 * i + 1][: -(-length // BLOCK_SIZE)]
            self.requests.append(Request(f"r{i}", prompt_of(i + 1, length), dst, i % 2))
        for _ in range(2):
            self.kit.new_consumer()
        self.finished: list[set[str]] = [set(), set()]
        self.failed: list[set[int]] = [set(), set()]
        self.sent: set[str] = set()

    def announce(self, number: int) -> None:
        request = self.requests[number]
        if not request.announced:
            request.announced = True
            self.kit.load(request.name, request.prompt, request.dst, consumer=request.consumer)
            self.kit.producer.poll()

    def step(self, tokens: dict[int, int], announced: dict[int, int]) -> None:
        """`tokens`: how many each request computes; `announced`: before which layer."""
        chunks, values = [], []
        for number, count in tokens.items():
            request = self.requests[number]
            stop = min(len(request.prompt), request.at + count)
            if request.state != "running" or stop == request.at:
                continue
            while len(request.blocks) * BLOCK_SIZE < stop:
                request.blocks.append(self.free.pop())
            chunks.append(request.chunk(stop))
            begun = range(request.at // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
            values += [(request.blocks[i], request.prompt, i, stop) for i in begun]
            request.at = stop
        self.kit.producer.begin_step(StepPlan(chunks=chunks))
        for layer in range(LAYERS):
            for block, prompt, i, stop in values:
                self.kit.source.array[layer, block] = page_value(prompt, layer, i, stop)
            for number, before in announced.items():
                if before == layer:
                    self.announce(number)
            self.kit.layer_written(layer)
        self.kit.producer.end_step()

    def lose(self, number: int, how: str) -> None:
        """The blocks go to others."""
        request = self.requests[number]
        if request.state != "running" or not request.at:
            return
        if how == "preempt":
            self.kit.producer.begin_step(StepPlan(rewound=[request.name]))
        else:
            request.state = "dropped"
            self.kit.producer.begin_step(StepPlan(dropped={request.name: "aborted"}))
        self.kit.source.array[:, request.blocks] = -1
        self.free = request.blocks + self.free
        request.blocks, request.at = [], 0

    def abort(self, number: int) -> None:
        request = self.requests[number]
        if request.announced:
            plan = StepPlan(cancelled=[request.name])
            self.kit.consumers[request.consumer].begin_step(plan)
            self.kit.producer.poll()

    def collect(self) -> None:
        self.kit.pump()
        for i, consumer in enumerate(self.kit.consumers):
            for name in consumer.take_finished():
                assert name not in self.finished[i]
                self.finished[i].add(name)
                dst = next(one.dst for one in self.requests if one.name == name)
                self.kit.targets[i].forbidden.update(dst)
            self.failed[i] |= consumer.take_failed_blocks()
        self.sent |= self.kit.producer.take_finished()

    def end(self):
        """All requests end: what each side saw, and what D has of the prompts that arrived."""
        for number, request in enumerate(self.requests):
            if request.state == "running" and request.at == len(request.prompt):
                self.kit.hold(request.name)
            else:
                self.lose(number, "drop")
        for _ in range(2):
            self.kit.world.land()
            self.collect()
        for request in self.requests:
            target = self.kit.targets[request.consumer]
            whole = request.name in self.finished[request.consumer]
            if whole and not self.failed[request.consumer] & set(request.dst):
                request.state += ", told"
                if self.kit.arrived(request.prompt, request.dst, target=request.consumer):
                    request.state += ", arrived"
            else:
                target.array[:, request.dst] = 0  # nobody reads them
        states = [request.state for request in self.requests]
        arrays = [target.array.tolist() for target in self.kit.targets]
        stored = self.kit.producer.stats.num_bytes
        self.kit.close()
        return self.finished, self.failed, self.sent, states, stored, arrays


NUMBER = st.integers(0, len(LENGTHS) - 1)
EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("step"),
            st.dictionaries(NUMBER, st.sampled_from([3, 4, 8, 16]), min_size=1),
            st.dictionaries(NUMBER, st.integers(0, LAYERS - 1), max_size=2),
        ),
        st.tuples(st.just("announce"), NUMBER),
        st.tuples(st.sampled_from(["preempt", "drop", "abort"]), NUMBER),
        st.tuples(st.sampled_from(["land", "collect"])),
    ),
    min_size=2,
    max_size=12,
)


def outcome(directory, events, batch_bytes: int):
    run = Run(directory, batch_bytes)
    for event in events:
        match event:
            case ("step", tokens, announced):
                run.step(tokens, announced)
            case ("announce", number):
                run.announce(number)
            case ("abort", number):
                run.abort(number)
            case ("preempt" | "drop" as how, number):
                run.lose(number, how)
            case ("land",):
                run.kit.world.land()
            case ("collect",):
                run.collect()
    return run.end()


@settings(max_examples=150, deadline=None)
@given(events=EVENTS)
def test_equal_pages_and_verdicts(tmp_path_factory, events):
    outcomes = [outcome(tmp_path_factory.mktemp("k"), events, batch) for batch in BATCHES]
    aborted = {event[1] for event in events if event[0] == "abort"}
    for i, state in enumerate(outcomes[0][3]):
        assert ", told" not in state or ", arrived" in state or i in aborted
    for other in outcomes[1:]:
        assert other == outcomes[0]


@pytest.mark.parametrize(("batch_bytes", "calls"), [(0, LAYERS), (5 * PAGE_BYTES, 2), (1 << 30, 1)])
def test_prompts_for_one_consumer_share_submissions(tmp_path, batch_bytes, calls):
    run = Run(tmp_path, batch_bytes)
    written = []
    for number in range(len(LENGTHS)):
        run.announce(number)
    run.step({0: 6, 2: 3}, {})
    (writer,) = [link.writer for link in run.kit.producer._links.all if link.writer is not None]
    real = writer.write
    writer.write = lambda moves: written.append(moves) or real(moves)
    pushes, push = [], run.kit.producer.push
    run.kit.producer.push = lambda: (pushes.append(1), push())
    run.step({0: 6, 2: 2}, {})  # completes blocks 1 and 2 of one, both of the other
    assert len(written) == calls
    assert len(pushes) == calls - (batch_bytes > 0)  # none in vain
    assert sum(len(move.src_blocks) for moves in written for move in moves) == LAYERS * 4
    run.step({0: 2}, {})
    assert run.end()[3] == ["running, told, arrived", "running"] * 2


@pytest.mark.parametrize("batch_bytes", BATCHES)
def test_a_submission_that_fails_fails_all_in_it(tmp_path, batch_bytes):
    run = Run(tmp_path, batch_bytes)
    run.kit.targets[0].broken = True
    for number in range(len(LENGTHS)):
        run.announce(number)
    run.step(dict.fromkeys(range(len(LENGTHS)), 16), {})
    finished, failed, sent, states, _, _ = run.end()
    assert finished == [{"r0", "r2"}, {"r1", "r3"}]
    assert failed == [{*run.requests[0].dst, *run.requests[2].dst}, set()]
    assert sent == {"r0", "r1", "r2", "r3"}
    assert states == ["running", "running, told, arrived"] * 2


@pytest.mark.parametrize("batch_bytes", BATCHES)
def test_consumers_get_submissions_of_their_own(tmp_path, batch_bytes):
    run = Run(tmp_path, batch_bytes)
    for number in range(len(LENGTHS)):
        run.announce(number)
    run.step(dict.fromkeys(range(len(LENGTHS)), 16), {})
    finished, failed, sent, states, stored, _ = run.end()
    assert finished == [{"r0", "r2"}, {"r1", "r3"}]
    assert failed == [set(), set()]
    assert sent == {"r0", "r1", "r2", "r3"}
    assert states == ["running, told, arrived"] * 4
    assert stored == (4 + 2 + 2 + 4) * LAYERS * PAGE_BYTES
