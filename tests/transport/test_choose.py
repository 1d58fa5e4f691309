"""What is said, and used instead, where GPUs cannot do what was asked."""

from __future__ import annotations

import pytest

from pdrelay.errors import TransportError
from pdrelay.transport.choose import GpuPair, GpuProbe, choose_transport, probe_gpus


def probe(*, peer=True, nvlink=True, ipc="", nccl=""):
    pairs = [GpuPair(a, b, peer, nvlink) for a, b in ((0, 1), (1, 0))]
    return GpuProbe(pairs, ipc, nccl)


def test_nvlink_and_ipc_need_no_word():
    choice = choose_transport("mapped", [(0, 1)], probe())
    assert (choice.name, choice.notes) == ("mapped", [])


def test_one_gpu_for_both_is_mapped():
    choice = choose_transport("mapped", [(0, 0)], GpuProbe())
    assert (choice.name, choice.notes) == ("mapped", [])


def test_pcie_is_used_and_said():
    choice = choose_transport("mapped", [(0, 1)], probe(nvlink=False))
    assert choice.name == "mapped"
    assert choice.notes == ["GPUs 0 and 1 have no NVLink: KV goes over PCIe"]


@pytest.mark.parametrize("obstacle", [dict(peer=False), dict(ipc="invalid device context")])
def test_without_peer_access_or_ipc_it_is_nccl(obstacle):
    choice = choose_transport("mapped", [(0, 1)], probe(**obstacle))
    assert choice.name == "nccl"
    assert choice.notes[0].startswith("transport mapped: ")
    assert choice.notes[0].endswith("; using nccl")
    assert "no peer access" in choice.notes[0] or "invalid device context" in choice.notes[0]
    assert all("\n" not in note for note in choice.notes)


def test_without_nccl_too_it_is_tcp_and_every_reason_is_given():
    choice = choose_transport("mapped", [(0, 1)], probe(peer=False, nccl="no libnccl"))
    assert choice.name == "tcp"
    assert ["mapped" in n or "nccl" in n for n in choice.notes[:2]] == [True, True]
    assert "no libnccl" in choice.notes[1]
    assert "host memory" in choice.notes[2]


def test_one_gpu_for_both_without_ipc_is_tcp_as_nccl_refuses_it():
    choice = choose_transport("mapped", [(0, 0)], GpuProbe(ipc_error="refused"))
    assert choice.name == "tcp"
    assert any("two ranks on one GPU" in note for note in choice.notes)


def test_nothing_better_is_chosen_than_what_was_asked_for():
    assert choose_transport("nccl", [(0, 1)], probe()).name == "nccl"
    assert choose_transport("tcp", [(0, 1)], probe()).name == "tcp"
    assert choose_transport("pool", [(0, 1)], probe(peer=False)).name == "pool"


def test_one_bad_pair_decides():
    pairs = [GpuPair(0, 1, True, True), GpuPair(0, 2, False, False)]
    assert choose_transport("mapped", [(0, 1), (0, 2)], GpuProbe(pairs)).name == "nccl"


def test_without_a_driver_the_probe_says_so():
    try:
        import torch
    except ImportError:
        pass
    else:
        if torch.cuda.is_available():
            assert probe_gpus([0]).ipc_error == ""
            return
    with pytest.raises(TransportError, match="CUDA"):
        probe_gpus([0])
