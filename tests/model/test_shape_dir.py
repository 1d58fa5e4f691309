"""Built-in shapes as directories for engines that need one."""

from __future__ import annotations

import pytest
import transformers

from pdrelay.model.config import BUILT_IN, load_model_config
from pdrelay.model.shape_dir import write_shape_dir


@pytest.mark.parametrize("model", sorted(BUILT_IN))
def test_the_directory_is_the_shape_and_its_tokenizer_loads(model, tmp_path):
    write_shape_dir(model, tmp_path)
    assert load_model_config(str(tmp_path)) == BUILT_IN[model]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    last = len(tokenizer) - 1
    assert last < BUILT_IN[model].vocab_size
    assert isinstance(tokenizer.decode([1, 2, 100, last]), str)
