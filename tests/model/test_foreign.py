"""Models for other engines: any architecture, found in a directory or in the Hub's cache."""

from __future__ import annotations

import json

import pytest

from pdrelay.errors import ModelError
from pdrelay.model.config import BUILT_IN
from pdrelay.model.foreign import find_model, hub_cache, load_foreign_config

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "eos_token_id": [2, 5000],
    "torch_dtype": "float16",
}


def directory(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_known_shapes_are_what_they_are():
    assert load_foreign_config("tiny") == BUILT_IN["tiny"]


def test_unknown_architectures_give_what_the_front_door_needs(tmp_path):
    config = load_foreign_config(directory(tmp_path, MIXTRAL))
    assert (config.architecture, config.vocab_size) == ("other", 1000)
    assert (config.max_position_embeddings, config.num_kv_heads, config.head_dim) == (512, 2, 16)
    assert config.eos_token_ids == (2,)
    assert config.dtype == "float16"


def test_the_text_part_of_a_multimodal_model_counts(tmp_path):
    raw = {"architectures": ["X"], "vocab_size": 7, "text_config": MIXTRAL, "quantization": 1}
    assert load_foreign_config(directory(tmp_path, raw)).vocab_size == 1000


def test_quantized_models_are_for_other_engines(tmp_path):
    llama = {**MIXTRAL, "architectures": ["LlamaForCausalLM"], "intermediate_size": 8}
    llama["quantization_config"] = {"quant_method": "fp8"}
    assert load_foreign_config(directory(tmp_path, llama)).intermediate_size == 8


def test_without_vocabulary_or_file_it_is_told(tmp_path):
    with pytest.raises(ModelError, match="vocab_size"):
        load_foreign_config(directory(tmp_path, {"architectures": ["X"]}))
    with pytest.raises(ModelError, match="unknown model"):
        load_foreign_config("/nonexistent")


def test_hub_names_are_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    assert find_model("org/name") == str(repository / "snapshots" / "abc123")
    assert find_model("tiny") == "tiny"
    assert find_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ModelError, match="hf download org/other"):
        find_model("org/other")


def test_where_the_cache_is():
    assert str(hub_cache({"HF_HUB_CACHE": "/a"})) == "/a"
    assert str(hub_cache({"HF_HOME": "/h"})) == "/h/hub"
    assert str(hub_cache({"XDG_CACHE_HOME": "/x"})) == "/x/huggingface/hub"
