"""What `serve` does about GPUs that cannot reach each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pdrelay.errors import ConfigError, TransportError
from pdrelay.launch.config import EngineConfig, ServeConfig, TransportConfig
from pdrelay.launch.host import Host
from pdrelay.launch.resolve import ResolvedConfig, resolve
from pdrelay.launch.topology import PrefillDecode, gpu_of, instances
from pdrelay.launch.transport_choice import settle_connector, settle_transport
from pdrelay.model.config import load_model_config
from pdrelay.transport.choose import GpuPair, GpuProbe


def resolved(transport="mapped", num_gpus=2):
    fields = dict.fromkeys(ResolvedConfig.__dataclass_fields__)
    fields |= dict(transport=transport, num_gpus=num_gpus, notes=("first",))
    return ResolvedConfig(**fields)


def settle(ask, topology=None, **changes):
    return settle_transport(resolved(**changes), instances(topology or PrefillDecode(1, 1)), ask)


def never(ordinals):
    raise AssertionError("asked")


@pytest.mark.parametrize("changes", [dict(num_gpus=0), dict(transport="tcp"), dict(transport="")])
def test_nothing_is_asked_where_nothing_is_to_choose(changes):
    assert settle(never, **changes) == resolved(**changes)


def test_gpus_that_reach_each_other_keep_mapped():
    seen = SimpleNamespace(ordinals=None)

    def ask(ordinals):
        seen.ordinals = list(ordinals)
        return GpuProbe([GpuPair(a, b, True, True) for a, b in ((0, 1), (1, 0))])

    found = settle(ask)
    assert (found.transport, found.notes) == ("mapped", ("first",))
    assert seen.ordinals == [0, 1]


def test_the_fallback_is_noted():
    found = settle(lambda ordinals: GpuProbe(ipc_error="no", nccl_error="none"))
    assert found.transport == "tcp"
    assert len(found.notes) == 4 and found.notes[0] == "first"


def test_every_pair_counts():
    probe = GpuProbe([GpuPair(0, 2, True, True)])
    found = settle(lambda ordinals: probe, PrefillDecode(2, 1), num_gpus=3)
    assert found.transport == "nccl"  # GPU 1 does not reach GPU 2
    assert "GPU 1" in found.notes[1]


def test_a_driver_that_gives_no_answer_is_said():
    def ask(ordinals):
        raise TransportError("silent")

    found = settle(ask)
    assert found.transport == "mapped"
    assert "unchecked: silent" in found.notes[-1]


def test_nccl_on_cpu_is_refused_before_any_process_starts():
    config = ServeConfig(engine=EngineConfig("tiny"), transport=TransportConfig("nccl"))
    host = Host(2, 1 << 34, 1 << 34, 0, 1024, None)
    with pytest.raises(ConfigError, match="on CPU, use mapped or tcp"):
        resolve(config, load_model_config("tiny"), host)


def test_gpus_in_topology_order_and_over_again():
    specs = instances(PrefillDecode(2, 2))
    assert [gpu_of(spec, 0, 3) for spec in specs] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("probe", "expected", "words"),
    [
        (GpuProbe([GpuPair(0, 1, True, True)]), "pdrelay", ""),
        (GpuProbe([GpuPair(0, 1, False, False)], nccl_error="no"), "pdrelay-nccl", "peer access"),
        (GpuProbe([GpuPair(0, 1, True, True)], ipc_error="seccomp"), "pdrelay-nccl", "seccomp"),
    ],
)
def test_vllms_connector_goes_over_nccl_where_memory_cannot_be_shared(probe, expected, words):
    specs = instances(PrefillDecode(1, 1))
    found = settle_connector(resolved("pdrelay"), specs, lambda ordinals: probe)
    assert found.transport == expected
    assert words in "".join(found.notes[1:])


def test_a_connector_is_not_chosen_on_cpu_or_for_others():
    specs = instances(PrefillDecode(1, 1))
    for changes in ({"transport": "nixl"}, {"transport": "pdrelay", "num_gpus": 0}):
        assert settle_connector(resolved(**changes), specs, never) == resolved(**changes)

    def hangs(ordinals):
        raise TransportError("no answer")

    found = settle_connector(resolved("pdrelay"), specs, hangs)
    assert found.transport == "pdrelay" and "unchecked: no answer" in found.notes[-1]
