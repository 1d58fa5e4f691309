"""Built-in shapes as directories for engines that need one."""

from __future__ import annotations

import pytest
import transformers

from pdrelay.model.config import BUILT_IN, load_model_config
from pdrelay.model.shape_dir import shape_dir, write_shape_dir


@pytest.mark.parametrize("model", sorted(BUILT_IN))
def test_the_directory_is_the_shape_and_its_tokenizer_loads(model, tmp_path):
    write_shape_dir(model, tmp_path)
    assert load_model_config(str(tmp_path)) == BUILT_IN[model]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    last = len(tokenizer) - 1
    assert last < BUILT_IN[model].vocab_size
    assert isinstance(tokenizer.decode([1, 2, 100, last]), str)


def test_every_call_finds_the_same_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = shape_dir("tiny", tmp_path)
    assert first == shape_dir("tiny", tmp_path / "other")
    assert load_model_config(str(first)) == BUILT_IN["tiny"]
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_without_a_cache_it_is_written_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    directory = shape_dir("tiny", tmp_path)
    assert directory == tmp_path / "model"
    assert load_model_config(str(directory)) == BUILT_IN["tiny"]
