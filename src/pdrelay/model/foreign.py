"""Models that another engine computes: any architecture, a directory or a name of the Hugging Face
Hub that is in the local cache. The front door needs their vocabulary, context and end tokens only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdrelay.core.kv_layout import DTYPE_BYTES
from pdrelay.errors import ModelError
from pdrelay.model.config import (
    ModelConfig,
    is_built_in,
    load_model_config,
    read_json_object,
    token_ids_of,
)

_UNKNOWN_CONTEXT = 2048


def find_model(model: str) -> str:
    """A built-in shape or directory as it is; a Hub name as its directory in the local cache.

    Raises ModelError when there is none.
    """
    if is_built_in(model) or Path(model).is_dir():
        return model
    repository = hub_cache(os.environ) / ("models--" + model.replace("/", "--"))
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except OSError:
        raise ModelError(
            f"{model!r} is no directory, built-in shape, or model in the Hugging Face cache: "
            f"download it with 'hf download {model}', or give its directory"
        ) from None
    return str(repository / "snapshots" / revision)


def hub_cache(env: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps models."""
    if env.get("HF_HUB_CACHE"):
        return Path(env["HF_HUB_CACHE"])
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def load_foreign_config(model: str) -> ModelConfig:
    """Shape of a built-in model or directory, its `architecture` "other" where the native engine
    does not know it. Raises ModelError."""
    path = Path(model) / "config.json"
    try:
        return load_model_config(model)
    except ModelError:
        if not path.is_file():
            raise
    raw = read_json_object(path)
    inner = raw.get("text_config")  # of multimodal models
    return _parse({**raw, **inner} if isinstance(inner, dict) else raw, model)


def _parse(raw: Mapping[str, Any], model: str) -> ModelConfig:
    heads = _int(raw, model, "num_attention_heads", 1)
    hidden = _int(raw, model, "hidden_size", heads)
    dtype = str(raw.get("torch_dtype", raw.get("dtype", ""))).removeprefix("torch.")
    eos, bos = (token_ids_of(raw.get(name)) for name in ("eos_token_id", "bos_token_id"))
    vocab_size = _int(raw, model, "vocab_size", None)
    return ModelConfig(
        architecture="other",
        hidden_size=hidden,
        intermediate_size=_int(raw, model, "intermediate_size", 4 * hidden),
        num_layers=_int(raw, model, "num_hidden_layers", 1),
        num_heads=heads,
        num_kv_heads=_int(raw, model, "num_key_value_heads", heads),
        head_dim=_int(raw, model, "head_dim", max(hidden // heads, 1)),
        vocab_size=vocab_size,
        max_position_embeddings=_int(raw, model, "max_position_embeddings", _UNKNOWN_CONTEXT),
        dtype=dtype if dtype in DTYPE_BYTES else "bfloat16",
        eos_token_ids=tuple(i for i in eos or () if i < vocab_size),
        bos_token_id=next((i for i in bos or () if i < vocab_size), None),
    )


def _int(raw: Mapping[str, Any], model: str, key: str, default: int | None) -> int:
    value = raw.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if default is None:
        raise ModelError(f"model {model!r}: config.json has no {key}; download it again")
    return default
