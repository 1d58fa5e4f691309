"""A built-in shape as a Hugging Face directory without weights, for engines that need one."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from pdrelay.model.config import BUILT_IN, to_hf_config
from pdrelay.model.tokenizer import BYTE_LEVEL_VOCAB_SIZE, byte_level_tokenizer


def write_shape_dir(model: str, directory: Path) -> None:
    """config.json and the tokenizer of a built-in shape; made to be loaded with random weights.

    Shapes that are published without their tokenizer get one token an id, spelled `<|id|>`.
    """
    config = BUILT_IN[model]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_hf_config(config), indent=2) + "\n")
    if config.vocab_size == BYTE_LEVEL_VOCAB_SIZE:
        byte_level_tokenizer().save(str(directory))
    else:
        _write_placeholders(config.vocab_size, directory)


def _write_placeholders(vocab_size: int, directory: Path) -> None:
    vocab = {f"<|{i}|>": i for i in range(vocab_size)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<|0|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|[0-9]+\|>"), "isolated")
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<|0|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
