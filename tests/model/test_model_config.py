import json

import pytest

from pdrelay.errors import ModelError
from pdrelay.model.config import (
    BUILT_IN,
    Llama3RopeScaling,
    check_tp,
    kv_layout,
    load_model_config,
    parse_model_config,
    to_hf_config,
)
from pdrelay.model.generation_config import load_generation_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2, 3],
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def write(directory, raw, name="config.json"):
    (directory / name).write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return str(directory)


def test_published_bytes_per_token():
    layout = kv_layout(load_model_config("llama-3.1-8b"), 16, 10, "bfloat16")
    assert layout.bytes_per_token == 131_072
    assert kv_layout(load_model_config("llama-3.1-8b"), 16, 10, "bfloat16", 2).num_kv_heads == 4


def test_reads_a_directory(tmp_path):
    config = load_model_config(write(tmp_path, LLAMA))
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (16, 2, "bfloat16")
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 3), 1)
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, None)


def test_transformers_4_and_5_forms_of_rope_mean_the_same():
    old = parse_model_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, "m")
    new = parse_model_config(LLAMA | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}, "m")
    assert old == new
    assert old.rope_scaling == Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
    )


def test_qwen3_has_head_norms():
    raw = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
    config = parse_model_config(raw | {"use_sliding_window": False, "sliding_window": 4096}, "m")
    assert config.qk_norm and config.head_dim == 32


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_hf_config_round_trip(name):
    assert parse_model_config(to_hf_config(BUILT_IN[name]), name) == BUILT_IN[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ("MambaForCausalLM", "LlamaForCausalLM")),
        ({"architectures": None}, ("no architecture",)),
        ({"architectures": [{"a": 1}]}, ("unsupported architecture",)),
        ({"quantization_config": {"quant_method": "awq"}}, ("awq", "unquantized")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("'yarn'", "llama3")),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": None}}, ("incomplete llama3",)),
        ({"rope_scaling": [1]}, ("rope_scaling", "object")),
        ({"sliding_window": 4096}, ("4096", "full attention")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"hidden_act": "gelu"}, ("gelu", "silu")),
        ({"torch_dtype": "float8_e4m3fn"}, ("float8_e4m3fn", "bfloat16")),
        ({"hidden_size": None}, ("lacks 'hidden_size'",)),
        ({"hidden_size": -4}, ("hidden_size=-4", "positive")),
        ({"num_hidden_layers": "2"}, ("num_hidden_layers='2'",)),
        ({"num_key_value_heads": 3}, ("multiple",)),
        ({"head_dim": 15}, ("odd",)),
        ({"rms_norm_eps": "x"}, ("rms_norm_eps",)),
        ({"eos_token_id": 100}, ("100", "vocabulary")),
        ({"eos_token_id": "</s>"}, ("eos_token_id",)),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings",)),
    ],
)
def test_refusals_name_the_cause_in_one_line(tmp_path, change, words):
    model = write(tmp_path, LLAMA | change)
    with pytest.raises(ModelError) as caught:
        load_model_config(model)
    message = str(caught.value)
    assert "\n" not in message and model in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("contents", "word"),
    [("{", "broken JSON"), ("[1]", "no JSON object"), ("[" * 100_000, "broken JSON")],
)
def test_damaged_files(tmp_path, contents, word):
    with pytest.raises(ModelError, match=word):
        load_model_config(write(tmp_path, contents))


def test_missing_models(tmp_path):
    with pytest.raises(ModelError, match=r"unknown model 'nope'.*llama-3\.1-8b, tiny"):
        load_model_config("nope")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model_config(str(tmp_path))


def test_tensor_parallel_size_must_divide_the_heads():
    check_tp(BUILT_IN["tiny"], 4)
    for tp_size in (0, 3, 8):
        with pytest.raises(ModelError, match="--tp"):
            check_tp(BUILT_IN["tiny"], tp_size)


def test_generation_config(tmp_path):
    model = write(tmp_path, LLAMA)
    config = load_model_config(model)
    assert load_generation_config(model, config).eos_token_ids == (2, 3)
    raw = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [3, 4], "do_sample": True}
    write(tmp_path, raw, "generation_config.json")
    defaults = load_generation_config(model, config)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, 20)
    assert (defaults.repetition_penalty, defaults.bos_token_id) == (None, 1)
    assert defaults.eos_token_ids == (2, 3, 4)


@pytest.mark.parametrize(
    "raw", [{"temperature": -1}, {"top_p": 2}, {"top_k": "x"}, {"eos_token_id": 1000}]
)
def test_bad_generation_config(tmp_path, raw):
    model = write(tmp_path, LLAMA)
    write(tmp_path, raw, "generation_config.json")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load_generation_config(model, load_model_config(model))
