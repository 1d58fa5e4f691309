"""A built-in shape as a Hugging Face directory without weights, for engines that need one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from pdrelay.model.config import BUILT_IN, to_hf_config
from pdrelay.model.tokenizer import BYTE_LEVEL_VOCAB_SIZE, byte_level_tokenizer

_FORMAT = 1  # of what write_shape_dir writes


def shape_dir(model: str, otherwise: Path) -> Path:
    """Such a directory of a built-in shape, the same at every call, written once.

    Below `$XDG_CACHE_HOME/pdrelay/shapes` (`~/.cache`): engines name their compile caches after
    the model's path. `model` in `otherwise` where the cache cannot be written.
    """
    content = json.dumps(to_hf_config(BUILT_IN[model]), sort_keys=True)
    version = f"{_FORMAT} {tokenizers.__version__} {content}"
    name = f"{model}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    try:
        return _written_once(model, _cache_dir() / name)
    except (OSError, RuntimeError):  # no home, or not ours to write
        write_shape_dir(model, otherwise / "model")
        return otherwise / "model"


def _written_once(model: str, directory: Path) -> Path:
    """The directory, whole or not there at all for other processes. Raises OSError."""
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write_shape_dir(model, fresh)
        fresh.rename(directory)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not directory.is_dir():  # else another process was first
            raise
    return directory


def _cache_dir() -> Path:
    """Raises RuntimeError without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "pdrelay" / "shapes"


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
