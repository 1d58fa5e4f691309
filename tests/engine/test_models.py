"""Logits against transformers on random weights, through every way a token can be computed."""

import copy
import threading

import pytest
import torch
from model_harness import Batcher, random_tokens, small_config
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pdrelay.engine import kernels
from pdrelay.engine.communicator import ThreadGroup
from pdrelay.engine.models import build_model
from pdrelay.errors import ModelError
from pdrelay.model.config import load_model_config

torch.set_num_threads(1)

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-3.1": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": LLAMA3_ROPE, "head_dim": 32, "num_key_value_heads": 1},
    ),
    "llama-tied-biased": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-odd-sizes": (LlamaConfig, LlamaForCausalLM, {"head_dim": 12, "intermediate_size": 70}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-tied-sharded": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 16, "tie_word_embeddings": True},
    ),
}


def randomize(model):
    """Biases and norms start as constants: make every parameter matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    config_class, model_class, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    reference = model_class(config_class(**(SHAPE | changes))).eval()
    randomize(reference)
    directory = str(tmp_path_factory.mktemp(request.param))
    shards = {"max_shard_size": "60KB"} if "sharded" in request.param else {}
    reference.save_pretrained(directory, **shards)
    return directory, reference


def expected(reference, token_ids):
    with torch.inference_mode():
        return reference(torch.tensor([token_ids])).logits[0].float()


def assert_close(actual, wanted, tolerance=2e-5):
    torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("use_kernels", [True, False])
def test_prefill_chunks_and_decode_match_transformers(saved, use_kernels):
    directory, reference = saved
    config = load_model_config(directory)
    model = build_model(directory, config, use_kernels=use_kernels)
    batcher = Batcher(config, model)
    whole, chunked, decoded = (batcher.sequence(random_tokens(n, seed=n)) for n in (133, 150, 40))
    batcher.step(chunks=[(whole, 133), (chunked, 37), (decoded, 30)])
    batcher.step(decodes=[decoded], chunks=[(chunked, 1)])
    batcher.step(decodes=[decoded], chunks=[(chunked, 100)])
    batcher.step(chunks=[(chunked, 12)])
    for _ in range(8):
        batcher.step(decodes=[decoded])
    assert batcher.layers_seen[:3] == [0, 1, 2]
    for sequence in (whole, chunked, decoded):
        assert sequence.num_computed == len(sequence.token_ids)
        assert_close(batcher.logits_of(sequence), expected(reference, sequence.token_ids))


def test_bfloat16_is_as_near_as_transformers_in_bfloat16(saved):
    directory, reference = saved
    config = load_model_config(directory)
    model = build_model(directory, config, dtype=torch.bfloat16)
    batcher = Batcher(config, model, dtype="bfloat16")
    sequence = batcher.sequence(random_tokens(50))
    batcher.step(chunks=[(sequence, 30)])
    batcher.step(chunks=[(sequence, 19)])
    batcher.step(decodes=[sequence])
    exact = expected(reference, sequence.token_ids)
    rounded = expected(copy.deepcopy(reference).bfloat16(), sequence.token_ids)
    assert (batcher.logits_of(sequence) - exact).norm() < 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("use_kernels", [True, False])
def test_two_ranks_compute_what_one_does(saved, use_kernels):
    directory, reference = saved
    config = load_model_config(directory)
    if config.num_kv_heads % 2:
        with pytest.raises(ModelError, match="--tp"):
            build_model(directory, config, communicator=ThreadGroup(2).rank(0))
        return
    results = run_ranks(directory, config, use_kernels)
    assert torch.equal(results[0], results[1])
    assert_close(results[0], expected(reference, random_tokens(60)))


def run_ranks(directory, config, use_kernels):
    """Logits of a chunked prefill and decodes, by rank."""
    group, results, errors = ThreadGroup(2), [None, None], []

    def run(rank):
        try:
            model = build_model(
                directory, config, communicator=group.rank(rank), use_kernels=use_kernels
            )
            batcher = Batcher(config, model, tp_size=2)
            sequence = batcher.sequence(random_tokens(60))
            batcher.step(chunks=[(sequence, 40)])
            batcher.step(chunks=[(sequence, 17)])
            for _ in range(3):
                batcher.step(decodes=[sequence])
            results[rank] = batcher.logits_of(sequence)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    return results


def test_a_token_has_the_same_bits_in_any_batch_and_chunking():
    """What makes recomputation after preemption, prefix reuse and P/D exact."""
    assert kernels.available(), kernels.describe()
    config = small_config()
    model = build_model("small", config, load_format="dummy", seed=3)
    prompt = random_tokens(300)
    runs = []
    for chunk_lengths in ([300], [1] * 7 + [100, 128, 65], [299, 1]):
        batcher = Batcher(config, model, num_blocks=256)
        other = batcher.sequence(random_tokens(200, seed=9))
        sequence = batcher.sequence(prompt)
        for length in chunk_lengths:
            batcher.step(chunks=[(other, 3), (sequence, length)])
        runs.append(batcher.logits_of(sequence))
    batcher = Batcher(config, model, num_blocks=256)
    sequence, others = batcher.sequence(prompt), []
    batcher.step(chunks=[(sequence, 200)])
    for seed in range(6):
        others.append(batcher.sequence(random_tokens(40, seed=seed)))
        batcher.step(chunks=[(others[-1], 20)])
    for i in range(100):
        batcher.step(decodes=[sequence, *others[: i % 7]] if i < 10 else [sequence])
    runs.append(batcher.logits_of(sequence))
    for run in runs[1:]:
        assert torch.equal(run, runs[0])
