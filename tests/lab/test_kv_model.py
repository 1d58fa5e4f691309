"""The predictive model against hand arithmetic and a slow pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrelay.errors import ModelError
from pdrelay.lab.kv.model import Compute, Link, Roofline, kv_bytes
from pdrelay.model.config import load_model_config

LLAMA_8B = load_model_config("llama-3.1-8b")
LLAMA_70B = load_model_config("llama-3.1-70b")
TINY = load_model_config("tiny")
GPU = Compute("GPU", 660e12, 4e12, "assumed")
NVLINK = Link("NVLink", 390e9, True, "assumed")
NET_100G = Link("100 Gb/s", 12.5e9, False, "assumed")


def roofline(model=LLAMA_8B, tp=1, compute=GPU, link=NET_100G, dtype="bfloat16"):
    return Roofline(model, dtype, tp, compute, link)


def test_llama_8b_by_hand():
    kv = kv_bytes(LLAMA_8B, "bfloat16")
    assert kv.per_token == 131_072
    assert "2 (K, V) × 32 layers × 8 KV heads × 128 head_dim × 2 B" in kv.arithmetic
    model = roofline()
    assert model.transfer_bytes(2048) == 268_435_456  # 268 MB
    assert model.transfer_s(2048) == pytest.approx(21.5e-3, rel=2e-3)
    assert model.linear_flop == pytest.approx(13.96e9, rel=1e-3)
    assert model.attention_flop == 262_144


def test_llama_70b_on_four_ranks_by_hand():
    kv = kv_bytes(LLAMA_70B, "bfloat16", tp=4)
    assert (kv.per_token, kv.per_token_rank) == (327_680, 81_920)
    model = roofline(LLAMA_70B, tp=4)
    assert model.transfer_bytes(32_768) == pytest.approx(10.7e9, rel=5e-3)
    assert model.transfer_s(32_768) == pytest.approx(0.859, rel=1e-3)
    # Each rank has its own NVLink, the network card is the host's.
    fast = replace(model, link=NVLINK)
    assert fast.transfer_s(32_768) == pytest.approx(10.74e9 / (4 * 390e9), rel=1e-3)


def test_ranks_must_divide_the_heads():
    with pytest.raises(ModelError, match="do not divide among 3 ranks"):
        kv_bytes(LLAMA_8B, "bfloat16", tp=3)
    assert kv_bytes(TINY, "float32").per_token == 4096


def test_prefill_is_a_roofline():
    model = roofline()
    assert model.prefill_s(1) == model.prefill_floor_s
    weights = 6.98e9 + 128_256 * 4096
    assert model.prefill_floor_s == pytest.approx(weights * 2 / 4e12, rel=1e-3)
    flop = 13.96e9 * 8192 + 262_144 * 8192**2
    assert model.prefill_s(8192) == pytest.approx(flop / 660e12, rel=1e-3)
    assert roofline(tp=2).prefill_s(8192) == model.prefill_s(8192) / 2
    assert model.kv_production(2048) == pytest.approx(131_072 / (13.96e9 / 660e12), rel=0.05)


def pipeline_exposed(layers, computed, moved):
    """Layer by layer: a layer starts to move when it is computed and the link is free."""
    free = 0.0
    for layer in range(1, layers + 1):
        free = max(free, layer * computed) + moved
    return free - layers * computed


@given(
    st.sampled_from([TINY, LLAMA_8B, LLAMA_70B]),
    st.integers(1, 200_000),
    st.floats(1e8, 1e12),
    st.sampled_from([1, 2, 4]),
)
def test_exposed_part_is_a_two_stage_pipelines(model, tokens, bytes_per_s, tp):
    one = roofline(model, tp, link=Link("x", bytes_per_s, False, ""))
    layers = model.num_layers
    slow = pipeline_exposed(layers, one.prefill_s(tokens) / layers, one.transfer_s(tokens) / layers)
    assert one.exposed_s(tokens) == pytest.approx(slow, rel=1e-6, abs=1e-12)


@given(st.sampled_from([TINY, LLAMA_8B, LLAMA_70B]), st.floats(1e8, 1e11), st.floats(1e11, 1e15))
def test_crossovers_are_where_the_curves_cross(model, bytes_per_s, flops_per_s):
    one = roofline(
        model,
        link=Link("x", bytes_per_s, False, ""),
        compute=Compute("", flops_per_s, 1e12, ""),
    )
    for found, longer in (
        (one.crossover(), lambda t: one.transfer_s(t) > one.prefill_s(t)),
        (one.layerwise_crossover(), lambda t: one.exposed_s(t) > one.prefill_s(t)),
    ):
        if not found.exists:
            assert not any(longer(2**k) for k in range(1, 30))
            continue
        middle = (found.above + found.below) / 2
        inside = [found.above * 1.001 + 1, middle, found.below * 0.999 - 1]
        for tokens in (t for t in inside if found.above < t < found.below):
            assert longer(tokens)
        assert not longer(found.below * 1.001 + 1)
        assert not longer(found.above * 0.999)


def test_a_slow_network_is_caught_up_by_attention():
    """A crossover is an upper bound too: prefill grows with the square, the transfer does not."""
    slow = roofline(link=Link("1 Gb/s", 0.125e9, False, ""))
    found = slow.crossover()
    assert found.above < 10 < 2_000_000 < found.below


def test_the_exercises_70b_crossover_does_not_exist():
    model = roofline(LLAMA_70B, tp=4)
    assert not model.crossover().exists
    shares = [model.transfer_s(t) / model.prefill_s(t) for t in (4096, 32_768, 100_000, 500_000)]
    assert shares == sorted(shares, reverse=True) and shares[0] < 1
