"""PdrelayConnector's own code over stubs of vLLM: both halves of both sides."""

from __future__ import annotations

import select
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from vllm_stub import Role, blocks_of, config_of, request_of, step_of, stubbed_vllm  # noqa: E402

from pdrelay.errors import ConfigError  # noqa: E402

BLOCKS, SIZE, LAYERS = 64, 16, 2
PROMPT = list(range(40))  # 3 blocks
P_BLOCKS, D_BLOCKS = [5, 6, 9], [30, 11, 12]
WAIT_S = 20.0


class Instance:
    """One vLLM: a scheduler's and a worker's connector, and its caches."""

    def __init__(self, module, role: str, address: str) -> None:
        self.module = module
        config = config_of(role, address, block_size=SIZE)
        cache_config = SimpleNamespace(num_blocks=BLOCKS)
        self.scheduler, self.worker = (
            module.PdrelayConnector(config, each, cache_config)
            for each in (Role.SCHEDULER, Role.WORKER)
        )
        self.caches = {f"l{i}": torch.zeros(BLOCKS, 4, SIZE, 64) for i in range(LAYERS)}
        self.worker.register_kv_caches(self.caches)

    def step(self, new=(), cached=(), *, computes=lambda: None):
        """One step of both halves: what the worker reports, given to the scheduler."""
        meta = self.scheduler.build_connector_meta(step_of(new, cached))
        self.worker.bind_connector_metadata(meta)
        self.worker.start_load_kv(None)
        if new or cached:
            computes()
            for name, cache in self.caches.items():
                self.worker.wait_for_layer_load(name)
                self.worker.save_kv_layer(name, cache, None)
            self.worker.wait_for_save()
        sent, received = self.worker.get_finished(set())
        failed = self.worker.get_block_ids_with_load_errors()
        output = SimpleNamespace(finished_sending=sent, finished_recving=received)
        self.scheduler.update_connector_output(output)
        return sent or set(), received or set(), failed

    def until(self, check, limit=2000):
        """Idle steps, as vLLM makes them, until one's report passes."""
        for _ in range(limit):
            report = self.step()
            if check(report):
                return report
            select.select([], [], [], 0.005)  # vLLM's own pause between idle steps
        raise AssertionError(f"never: {report}")


@pytest.fixture
def pair(tmp_path):
    with stubbed_vllm() as module:
        p = Instance(module, "kv_producer", str(tmp_path / "p.sock"))
        d = Instance(module, "kv_consumer", str(tmp_path / "d.sock"))
        yield p, d
        p.worker.shutdown()
        d.worker.shutdown()
        p.scheduler.shutdown()


def compute(p: Instance, ids: list[int], value: float):
    def run() -> None:
        for i, cache in enumerate(p.caches.values()):
            cache[ids] = value + i

    return run


def start_load(d: Instance, params, prompt=PROMPT, blocks=D_BLOCKS, computed=0):
    request = request_of("d", prompt, params)
    count, is_async = d.scheduler.get_num_new_matched_tokens(request, computed)
    assert (count, is_async) == (len(prompt) - computed, True)
    d.scheduler.update_state_after_alloc(request, blocks_of(blocks), count)
    return request


@pytest.mark.parametrize("resumed_as_new", [False, True], ids=["model runner V1", "V2"])
def test_chunks_preemption_and_the_reply(pair, tmp_path, resumed_as_new):
    p, d = pair
    request = request_of("p", PROMPT, {"do_remote_decode": True, "pdrelay_transfer_id": "T"})
    assert p.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    p.scheduler.update_state_after_alloc(request, blocks_of(P_BLOCKS[:1]), 0)
    p.step(new=[("p", P_BLOCKS[:1], 0, 16)], computes=compute(p, P_BLOCKS[:1], 1))
    request.num_preemptions = 1  # its block is another's now
    p.step()
    compute(p, P_BLOCKS[:1], -9)()
    again = [20, 21]
    if resumed_as_new:
        p.step(new=[("p", again, 0, 32)], computes=compute(p, again, 1))
    else:
        p.step(cached=[("p", again, 0, 32, True)], computes=compute(p, again, 1))
    p.step(cached=[("p", [22], 32, 8, False)], computes=compute(p, [22], 1))
    request.status.name = "FINISHED_LENGTH_CAPPED"
    delayed, reply = p.scheduler.request_finished(request, [20, 21, 22])
    assert delayed
    assert reply == {
        "pdrelay_transfer_id": "T",
        "do_remote_prefill": True,
        "pdrelay_producer": str(tmp_path / "p.sock"),
    }
    assert p.scheduler.has_pending_push_work()
    assert p.step()[0] == set()
    start_load(d, reply)
    assert d.until(lambda report: report[1]) == (set(), {"d"}, set())
    for i, cache in enumerate(d.caches.values()):
        assert (cache[D_BLOCKS] == 1 + i).all()
        assert int((cache != 0).sum()) == cache[D_BLOCKS].numel()
    assert p.until(lambda report: report[0])[0] == {"p"}
    assert not p.scheduler.has_pending_push_work()
    stats = d.worker.get_kv_connector_stats()
    assert stats.data["num_transfers"] == 1
    assert stats.data["num_bytes"] == 3 * LAYERS * 4 * SIZE * 64 * 4
    assert d.worker.get_kv_connector_stats() is None
    assert not d.module.PdrelayConnector.build_kv_connector_stats(stats.data).is_empty()


def test_cached_prefix_is_not_loaded(pair, tmp_path):
    p, d = pair
    params = {
        "do_remote_prefill": True,
        "pdrelay_transfer_id": "T",
        "pdrelay_producer": str(tmp_path / "p.sock"),
    }
    start_load(d, params, computed=16)
    d.step()
    request = request_of("p", PROMPT, {"do_remote_decode": True, "pdrelay_transfer_id": "T"})
    p.scheduler.update_state_after_alloc(request, blocks_of(P_BLOCKS), 0)
    p.step(new=[("p", P_BLOCKS, 0, 40)], computes=compute(p, P_BLOCKS, 3))
    d.until(lambda report: report[1])
    assert not d.caches["l0"][D_BLOCKS[0]].any()
    assert (d.caches["l0"][D_BLOCKS[1:]] == 3).all()


def test_aborts_and_a_failed_load(pair, tmp_path):
    p, d = pair
    params = {
        "do_remote_prefill": True,
        "pdrelay_transfer_id": "T",
        "pdrelay_producer": str(tmp_path / "p.sock"),
    }
    waiting = start_load(d, params)
    d.step()
    waiting.status.name = "FINISHED_ABORTED"
    assert d.scheduler.request_finished(waiting, D_BLOCKS) == (False, None)
    assert d.until(lambda report: report[1]) == (set(), {"d"}, set())
    gone = {**params, "pdrelay_transfer_id": "U", "pdrelay_producer": str(tmp_path / "x.sock")}
    again = start_load(d, gone)
    assert d.step() == (set(), {"d"}, set(D_BLOCKS))
    assert d.scheduler.get_num_new_matched_tokens(again, 0) == (0, False)  # computed here
    d.scheduler.request_finished(again, D_BLOCKS)
    early = request_of("p", PROMPT, {"do_remote_decode": True, "pdrelay_transfer_id": "V"})
    p.scheduler.get_num_new_matched_tokens(early, 0)
    early.status.name = "FINISHED_ABORTED"
    assert p.scheduler.request_finished(early, []) == (False, None)
    p.step()
    start_load(d, {**params, "pdrelay_transfer_id": "V"})
    assert d.until(lambda report: report[1])[2] == set(D_BLOCKS)


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_params_of_the_other_role_or_none_are_ignored(tmp_path, role):
    address = str(tmp_path / "s.sock")
    with stubbed_vllm() as module:
        config = config_of(role, address, block_size=SIZE)
        scheduler = module.PdrelayConnector(config, Role.SCHEDULER, None)
        other = (
            {"do_remote_prefill": True, "pdrelay_transfer_id": "T", "pdrelay_producer": address}
            if role == "kv_producer"
            else {"do_remote_decode": True}
        )
        for params in (other, None, {"do_remote_prefill": 1}, "x"):
            request = request_of("r", PROMPT, params)
            scheduler.on_new_request(request)
            assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
            scheduler.update_state_after_alloc(request, blocks_of(P_BLOCKS), 0)
            plan = scheduler.build_connector_meta(step_of(new=[("r", P_BLOCKS, 0, 40)])).plan
            assert plan == type(plan)()
            assert scheduler.request_finished(request, P_BLOCKS) == (False, None)


@pytest.mark.parametrize(
    "parallel", [{"pipeline_parallel_size": 2}, {"decode_context_parallel_size": 2}]
)
def test_topologies_that_are_not_supported_are_named(tmp_path, parallel):
    config = config_of("kv_both", str(tmp_path / "s"), block_size=SIZE, **parallel)
    with stubbed_vllm() as module, pytest.raises(ConfigError, match="does not support"):
        module.PdrelayConnector(config, Role.SCHEDULER, None)
