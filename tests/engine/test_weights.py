import json

import pytest
import torch
from model_harness import Batcher, random_tokens, small_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pdrelay.engine.models import build_model
from pdrelay.engine.weights import (
    DummyWeights,
    SafetensorsWeights,
    open_weights,
    parameter_shapes,
    save_pretrained_dummy,
)
from pdrelay.errors import ModelError
from pdrelay.model.config import load_model_config, to_hf_config

torch.set_num_threads(1)
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def directory(tmp_path):
    """A sharded checkpoint of seeded weights."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf_config(small_config())))
    target = tmp_path / "model"
    save_pretrained_dummy(str(source), 5, target, max_shard_bytes=50_000)
    return target


def shard_of(directory, name):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def test_saved_dummy_weights_are_the_ones_in_memory(directory):
    assert len(list(directory.glob("*.safetensors"))) > 3
    config = load_model_config(str(directory))
    assert config == small_config()
    stored, seeded = SafetensorsWeights(directory), DummyWeights(5)
    for name, shape in parameter_shapes(config).items():
        assert torch.equal(stored.tensor(name, shape), seeded.tensor(name, shape))


def test_transformers_loads_what_was_saved(directory):
    config = load_model_config(str(directory))
    token_ids = random_tokens(40)
    batcher = Batcher(config, build_model(str(directory), config, load_format="dummy", seed=5))
    sequence = batcher.sequence(token_ids)
    batcher.step(chunks=[(sequence, 40)])
    reference = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    with torch.inference_mode():
        wanted = reference(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(batcher.logits_of(sequence), wanted, rtol=0, atol=1e-4)


def test_one_file_without_index(tmp_path):
    save_pretrained_dummy("tiny", 0, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    config = load_model_config(str(tmp_path))
    assert config == load_model_config("tiny")
    build_model(str(tmp_path), config)


def test_slices_are_slices_of_the_whole(directory):
    shape = (64, 96)
    for source in (SafetensorsWeights(directory), DummyWeights(5)):
        whole = source.tensor(NAME, shape)
        assert torch.equal(source.tensor(NAME, shape, 1, 48, 96), whole[:, 48:])
        assert torch.equal(source.tensor(NAME, shape, 0, 3, 5), whole[3:5])


def test_dummy_weights_depend_on_seed_and_name_alone():
    one = DummyWeights(1)
    assert torch.equal(one.tensor(NAME, (64, 96)), DummyWeights(1).tensor(NAME, (64, 96)))
    assert not torch.equal(one.tensor(NAME, (64, 96)), DummyWeights(2).tensor(NAME, (64, 96)))
    other = NAME.replace("1", "0")
    assert not torch.equal(one.tensor(NAME, (64, 96)), one.tensor(other, (64, 96)))
    assert one.tensor(NAME, (64, 96)).std().item() == pytest.approx(96**-0.5, rel=0.05)
    embedding = one.tensor("model.embed_tokens.weight", (264, 256))
    assert embedding.std().item() == pytest.approx(1.0, rel=0.02)
    assert torch.equal(one.tensor("model.norm.weight", (8,)), torch.ones(8))


def test_dummy_logits_have_spread():
    config = load_model_config("tiny")
    batcher = Batcher(config, build_model("tiny", config))
    sequence = batcher.sequence(random_tokens(64, 256))
    batcher.step(chunks=[(sequence, 64)])
    logits = batcher.logits_of(sequence)
    assert logits.isfinite().all() and 0.5 < logits.std().item() < 5
    # The same last token behind another context: attention matters.
    changed = batcher.sequence(random_tokens(63, 256, seed=1) + sequence.token_ids[-1:])
    batcher.step(chunks=[(changed, 64)])
    assert (batcher.logits_of(changed)[-1] - logits[-1]).abs().max().item() > 0.1


def test_missing_shard_is_named(directory):
    shard = shard_of(directory, NAME)
    shard.unlink()
    with pytest.raises(ModelError, match=f"missing shard .*{shard.name}"):
        open_weights(str(directory), "auto", 0)


def test_missing_tensor_is_named(directory):
    shard = shard_of(directory, NAME)
    tensors = load_file(shard)
    del tensors[NAME]
    save_file(tensors or {"other": torch.zeros(1)}, shard)
    with pytest.raises(ModelError, match=rf"{shard.name}.*{NAME}"):
        build_model(str(directory), load_model_config(str(directory)))


def test_tensor_missing_from_the_index_is_named(directory):
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    del raw["weight_map"][NAME]
    index.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=NAME):
        build_model(str(directory), load_model_config(str(directory)))


def test_wrong_shape_names_file_tensor_and_shapes(directory):
    shard = shard_of(directory, NAME)
    save_file(load_file(shard) | {NAME: torch.zeros(64, 95)}, shard)
    with pytest.raises(ModelError, match=rf"{NAME}.*{shard.name}.*\[64, 95\].*\[64, 96\]"):
        build_model(str(directory), load_model_config(str(directory)))


def test_integer_weights_are_refused(directory):
    shard = shard_of(directory, NAME)
    save_file(load_file(shard) | {NAME: torch.zeros(64, 96, dtype=torch.int8)}, shard)
    with pytest.raises(ModelError, match=rf"{NAME}.*int8"):
        build_model(str(directory), load_model_config(str(directory)))


def test_truncated_file_is_named(directory):
    shard = shard_of(directory, NAME)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match=shard.name):
        build_model(str(directory), load_model_config(str(directory)))


def test_index_may_not_leave_the_directory(directory):
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][NAME] = "../secret.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="outside"):
        open_weights(str(directory), "auto", 0)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(ModelError, match="load-format dummy"):
        open_weights(str(tmp_path), "auto", 0)
