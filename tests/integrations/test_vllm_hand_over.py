"""Producer and Consumer of the vLLM connector, without vLLM, torch or threads."""

from __future__ import annotations

import pytest
from hand_over_kit import (
    BLOCK_SIZE,
    BLOCKS,
    LAYERS,
    LEASE_S,
    TIMEOUT_S,
    Kit,
    prompt_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.errors import ConfigError
from pdrelay.integrations.vllm.fake_pages import PAGE_BYTES, fake_layout
from pdrelay.integrations.vllm.step import Interest, StepPlan

PROMPT = prompt_of(1, 14)  # 4 blocks, the last one with 2 tokens
P_BLOCKS, D_BLOCKS = [9, 3, 4, 20], [60, 61, 50, 7]


@pytest.fixture
def kit(tmp_path):
    built = Kit(tmp_path)
    built.new_consumer()
    yield built
    built.close()


def ended(kit: Kit, consumer: int = 0) -> tuple[set[str], set[int]]:
    side = kit.consumers[consumer]
    return side.take_finished(), side.take_failed_blocks()


def test_announced_before_the_prefill(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert ended(kit) == (set(), set())
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())
    assert kit.producer.take_finished() == set()  # vLLM has not given the blocks up yet
    kit.hold("r")
    assert kit.producer.take_finished() == {"r"}
    assert kit.producer.stats.num_bytes == 4 * kit.source.layout.block_bytes
    assert kit.consumers[0].stats.num_bytes == kit.producer.stats.num_bytes


def test_announced_after_the_prefill(kit):
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    kit.pump()
    assert kit.producer.take_finished() == set()
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())
    assert kit.producer.take_finished() == {"r"}


def test_announced_between_two_layers(kit):
    def announce(layer):
        if layer == 1:
            kit.load("r", PROMPT, D_BLOCKS)
            kit.producer.poll()

    landed = []
    real = kit.layer_written
    kit.layer_written = lambda layer: (real(layer), landed.append(kit.world.num_landed))
    kit.prefill("r", PROMPT, P_BLOCKS, between=announce)
    assert landed == [0, 2, 3]  # it need not wait for the step's end
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())


def test_a_step_that_never_ended_is_no_obstacle(kit):
    """Its engine failed in between, say: nothing of the blocks that it lost then is sent."""
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    end_step, kit.producer.end_step = kit.producer.end_step, lambda: None
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.producer.end_step = end_step
    kit.source.array[:, P_BLOCKS] = -1
    kit.prefill("r", PROMPT, [30, 31, 32, 33], rewound=["r"])
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())


def test_each_layer_leaves_when_it_is_written(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    landed = []
    kit.prefill("r", PROMPT, P_BLOCKS, between=lambda layer: landed.append(kit.world.num_landed))
    assert landed == list(range(LAYERS))


def test_chunks_send_whole_blocks_and_the_last_one_the_rest(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS, stop=6)  # one whole block
    assert kit.targets[0].array[:, D_BLOCKS[1]].tolist() == [0] * LAYERS
    kit.prefill("r", PROMPT, P_BLOCKS, start=6, stop=12)
    kit.prefill("r", PROMPT, P_BLOCKS, start=12)
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())
    assert kit.producer.stats.num_bytes == 4 * kit.source.layout.block_bytes  # none twice


def test_layers_that_do_not_report_leave_at_the_end_of_the_step(kit):
    """A replayed graph calls no hook."""
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.layer_written = lambda layer: None
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())


def test_cached_blocks_are_not_moved(kit):
    kit.load("r", PROMPT, D_BLOCKS[2:], first=2)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS[2:], first=2)
    assert kit.producer.stats.num_bytes == 2 * kit.source.layout.block_bytes
    assert not kit.targets[0].array[:, D_BLOCKS[:2]].any()


@pytest.mark.parametrize("num_tokens", [11, 12])
def test_consumer_has_the_first_token_too(kit, num_tokens):
    """The proxy sends prompt + token 1 to D: one token more, sometimes one block more."""
    prompt, longer = prompt_of(2, num_tokens), prompt_of(2, num_tokens + 1)
    kit.prefill("r", prompt, P_BLOCKS)
    kit.load("r", longer, D_BLOCKS[: -(-(num_tokens + 1) // BLOCK_SIZE)])
    kit.pump()
    assert kit.arrived(prompt, D_BLOCKS[:3])
    assert ended(kit) == ({"r"}, set())


def test_consumer_that_has_all_of_the_producers_blocks_needs_none(kit):
    longer = prompt_of(2, 13)
    kit.load("r", longer, [D_BLOCKS[3]], first=3)
    kit.pump()
    kit.prefill("r", longer[:12], P_BLOCKS)
    kit.pump()
    assert ended(kit) == ({"r"}, set())
    assert kit.world.num_landed == 0


@pytest.mark.parametrize("other", [prompt_of(3, 14), PROMPT[:13], [*PROMPT, 1, 2]])
def test_another_prompt_gets_nothing(kit, other):
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    kit.load("x", other, list(range(-(-len(other) // BLOCK_SIZE))), transfer_id="T-r")
    kit.pump()
    assert ended(kit) == ({"x"}, set(range(-(-len(other) // BLOCK_SIZE))))
    assert kit.world.num_landed == 0
    kit.load("r", PROMPT, D_BLOCKS)  # the rightful one still gets it
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)


@pytest.mark.parametrize(
    "blocks", [D_BLOCKS[:3], [*D_BLOCKS, 2], [1, 2, 3, 2 * BLOCKS], [-1, 1, 2, 3]]
)
def test_impossible_blocks_are_refused(kit, blocks):
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.load("r", PROMPT, blocks)
    kit.pump()
    assert ended(kit) == ({"r"}, set(blocks))
    assert kit.world.num_landed == 0


def test_a_transfer_goes_to_one_consumer(kit):
    kit.new_consumer()
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.load("r", PROMPT, D_BLOCKS, consumer=1)
    kit.pump()
    assert ended(kit) == ({"r"}, set())
    assert ended(kit, 1) == ({"r"}, set(D_BLOCKS))


def test_abort_at_the_consumer_before_the_prefill(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))
    assert ended(kit) == (set(), set())  # the producer may still store
    kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))  # idempotent
    kit.pump()
    assert ended(kit) == ({"r"}, set())
    kit.targets[0].forbidden.update(D_BLOCKS)
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    assert kit.producer.take_finished() == {"r"}  # nobody will ask: no lease
    assert kit.consumers[0].num_loading == 0


def test_abort_at_the_consumer_waits_for_copies_in_flight(kit):
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS, stop=8)
    kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))
    kit.pump()
    assert ended(kit) == (set(), set())
    kit.world.land(1)
    kit.pump()
    assert ended(kit) == (set(), set())
    kit.world.land()
    kit.pump()
    assert ended(kit) == ({"r"}, set())
    kit.targets[0].forbidden.update(D_BLOCKS)
    kit.prefill("r", PROMPT, P_BLOCKS, start=8)
    kit.world.land()


def test_done_waits_for_copies_in_flight(kit):
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    kit.pump()
    assert ended(kit) == (set(), set())
    assert kit.producer.take_finished() == set()
    kit.producer.open_fences()[0].wait()
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())
    assert kit.producer.take_finished() == {"r"}


def test_abort_at_the_producer(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS, stop=8)
    kit.producer.begin_step(StepPlan(dropped={"r": "aborted"}))
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))
    assert kit.producer.take_finished() == set()  # vLLM has freed them itself


def test_abort_at_the_producer_before_the_announcement(kit):
    kit.prefill("r", PROMPT, P_BLOCKS, stop=8)
    kit.producer.begin_step(StepPlan(dropped={"r": "aborted"}))
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))


@pytest.mark.parametrize("announced_first", [True, False])
def test_abort_at_the_producer_before_its_prefill(kit, announced_first):
    refused = StepPlan(refused={"T-r": "aborted before its prefill"})
    if announced_first:
        kit.load("r", PROMPT, D_BLOCKS)
        kit.pump()
        kit.producer.begin_step(refused)
    else:
        kit.producer.begin_step(refused)
        kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))
    assert kit.producer.next_deadline_ns() is None


def test_preempted_producer_sends_what_it_computes_again(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS, stop=8)
    kit.producer.begin_step(StepPlan(rewound=["r"]))
    kit.source.array[:, P_BLOCKS] = -1  # another request has them now
    kit.prefill("r", PROMPT, [30, 31, 32, 33])
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"r"}, set())


def test_preempted_producer_sends_nothing_of_the_blocks_it_lost(kit):
    kit.prefill("r", PROMPT, P_BLOCKS, stop=8)
    kit.producer.begin_step(StepPlan(rewound=["r"]))
    kit.source.array[:, P_BLOCKS] = -1
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert kit.world.num_landed == 0
    kit.prefill("r", PROMPT, [30, 31, 32, 33])
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)


def test_preempted_after_its_prefill_and_finished_is_a_failure(kit):
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.producer.begin_step(StepPlan(rewound=["r"], held=["r"]))
    assert kit.producer.take_finished() == {"r"}
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))


def test_copies_in_flight_land_before_blocks_are_overwritten(kit):
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS, stop=8)
    kit.producer.begin_step(StepPlan(rewound=["r"]))
    kit.source.array[:, P_BLOCKS] = -1
    kit.prefill("r", PROMPT, [30, 31, 32, 33])
    kit.world.land()
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)


def test_lease_ends_when_nobody_asks(kit):
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    kit.clock.advance(LEASE_S - 0.1)
    kit.pump()
    assert kit.producer.take_finished() == set()
    kit.clock.advance(0.2)
    kit.pump()
    assert kit.producer.take_finished() == {"r"}
    assert kit.producer.stats.num_expired == 1
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))


def test_lease_is_renewed_while_the_consumer_waits_for_blocks(kit):
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    for _ in range(5):
        kit.clock.advance(LEASE_S * 0.6)
        kit.consumers[0].begin_step(StepPlan(waiting=[Interest("T-r", kit.address)]))
        kit.pump()
        assert kit.producer.take_finished() == set()
    kit.consumers[0].begin_step(StepPlan(released=[Interest("T-r", kit.address)]))
    kit.pump()
    assert kit.producer.take_finished() == {"r"}


def test_early_announcement_is_renewed_until_the_load_times_out(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    for _ in range(4):
        kit.pump()
        kit.clock.advance(TIMEOUT_S / 5)
    kit.pump()
    assert ended(kit) == (set(), set())
    kit.clock.advance(TIMEOUT_S / 5)
    kit.consumers[0].poll()
    assert ended(kit) == (set(), set())  # given up, but the producer may store until it answers
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))
    assert kit.producer.next_deadline_ns() is None


def test_early_announcement_of_a_silent_consumer_ends(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.producer.poll()
    kit.clock.advance(LEASE_S)
    kit.producer.poll()
    assert kit.producer.next_deadline_ns() is None
    kit.consumers[0].poll()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))


def test_kv_that_comes_with_the_deadline_is_taken(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.producer.poll()
    kit.clock.advance(TIMEOUT_S)
    consumer = kit.consumers[0]
    consumer._give_up(consumer._incoming["r"])
    consumer._incoming["r"].error = "late"
    kit.pump()
    assert ended(kit) == ({"r"}, set())


def test_producer_dies(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS, stop=8)
    kit.producer.close()
    kit.consumers[0].poll()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))
    kit.load("q", PROMPT, D_BLOCKS)
    assert ended(kit) == ({"q"}, set(D_BLOCKS))  # at once: nobody listens
    kit.producer = kit.new_producer(instance="p again")
    kit.load("s", PROMPT, D_BLOCKS)
    kit.prefill("s", PROMPT, P_BLOCKS)
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)
    assert ended(kit) == ({"s"}, set())


def test_producer_dies_while_an_abort_waits_for_it(kit):
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))
    kit.producer.close()
    kit.consumers[0].poll()
    assert ended(kit) == ({"r"}, set())


def test_consumer_dies(kit):
    kit.world.eager = False
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    kit.consumers[0].close()
    kit.producer.poll()
    assert kit.producer.take_finished() == set()  # its blocks are still being read
    kit.world.land()
    kit.producer.poll()
    assert kit.producer.take_finished() == {"r"}
    assert not kit.producer._links.all
    assert not kit.producer._links._by_fd


def test_broken_pages_fail_the_load(kit):
    kit.targets[0].broken = True
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.hold("r")
    kit.pump()
    assert ended(kit) == ({"r"}, set(D_BLOCKS))
    assert kit.producer.take_finished() == {"r"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"layout": fake_layout(LAYERS, BLOCKS, 8)}, "tokens here"),
        ({"layout": fake_layout(LAYERS + 1, BLOCKS, BLOCK_SIZE)}, "layers of KV"),
        ({"num_ranks": 2}, "tensor-parallel-size"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(kit, changed, why, caplog):
    kit.new_consumer(**changed)
    kit.load("r", PROMPT, [1] * -(-14 // BLOCK_SIZE), consumer=1)
    kit.pump()
    assert ended(kit, 1) == ({"r"}, {1})
    assert why in caplog.text


def test_a_reused_transfer_id_is_not_handed_over(kit):
    kit.prefill("r", PROMPT, P_BLOCKS)
    kit.prefill("q", PROMPT, [10, 11, 12, 13], transfer_id="T-r")
    kit.hold("r", "q")
    assert kit.producer.take_finished() == {"q"}
    kit.load("r", PROMPT, D_BLOCKS)
    kit.pump()
    assert kit.arrived(PROMPT, D_BLOCKS)


def test_unknown_bytes_end_one_connection_only(kit):
    import socket

    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(kit.address)
        stranger.sendall(b"\xff" * 64)
        kit.pump()
        assert stranger.recv(4096) != b""  # the reason
    test_announced_before_the_prefill(kit)


def test_two_producers_cannot_share_an_address(kit):
    with pytest.raises(ConfigError, match="its own address"):
        kit.new_producer()


EVENTS = st.lists(
    st.sampled_from(
        [
            *("load", "prefill", "prefill", "hold", "pump", "land", "land1"),
            *("abort-d", "abort-p", "preempt", "late", "die-d"),
        ]
    ),
    max_size=14,
)


BATCHES = (0, 5 * PAGE_BYTES, 1 << 30)  # every layer; a chunk's pages or two layers'; at the end


@settings(max_examples=300)
@given(events=EVENTS, batch_bytes=st.sampled_from(BATCHES))
def test_any_order_ends_with_all_blocks_back(tmp_path_factory, events, batch_bytes):
    """One request, any order of events: each side reports it once, D's blocks are untouched
    after that, and what is reported as arrived has arrived."""
    kit = Kit(tmp_path_factory.mktemp("k"))
    kit.source.batch_bytes = batch_bytes
    kit.new_consumer()
    kit.world.eager = False
    sent, finished, failed = [], [], set()
    state = {"at": 0, "loaded": False, "p": "idle", "d_dead": False, "d_aborted": False}

    def collect():
        sent.extend(kit.producer.take_finished())
        done, bad = ended(kit)
        finished.extend(done)
        failed.update(bad)
        if done:
            kit.targets[0].forbidden.update(D_BLOCKS)

    for event in [*events, "pump", "land", "pump"]:
        if event == "load" and not state["loaded"] and not state["d_dead"]:
            state["loaded"] = True
            kit.load("r", PROMPT, D_BLOCKS)
        elif event == "prefill" and state["p"] in ("idle", "running") and state["at"] < 14:
            stop = min(14, state["at"] + 8)
            kit.prefill("r", PROMPT, P_BLOCKS, start=state["at"], stop=stop)
            state["at"], state["p"] = stop, "running"
        elif event == "hold" and state["at"] == 14 and state["p"] == "running":
            state["p"] = "held"
            kit.hold("r")
        elif event == "abort-p" and state["p"] == "running":
            state["p"] = "dropped"
            kit.producer.begin_step(StepPlan(dropped={"r": "aborted"}))
            kit.source.array[:, P_BLOCKS] = -1
        elif event == "preempt" and state["p"] == "running":
            state["at"] = 0
            kit.producer.begin_step(StepPlan(rewound=["r"]))
            kit.source.array[:, P_BLOCKS] = -1
        elif event == "abort-d" and state["loaded"] and not state["d_dead"]:
            state["d_aborted"] = True
            kit.consumers[0].begin_step(StepPlan(cancelled=["r"]))
        elif event == "die-d":
            state["d_dead"] = True
            kit.consumers[0].close()
        elif event == "late":
            kit.clock.advance(LEASE_S * 0.7)
        elif event == "pump":
            kit.pump()
        elif event == "land":
            kit.world.land()
        elif event == "land1":
            kit.world.land(1)
        collect()
    for _ in range(4):
        kit.clock.advance(max(LEASE_S, TIMEOUT_S))
        kit.pump()
        kit.world.land()
        kit.pump()
        collect()
    assert finished.count("r") == int(state["loaded"] and not state["d_dead"]) or state["d_dead"]
    assert sent == (["r"] if state["p"] == "held" else [])
    if finished and not failed and not state["d_aborted"]:
        assert kit.arrived(PROMPT, D_BLOCKS)
    kit.close()
