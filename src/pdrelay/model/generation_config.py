"""Sampling defaults that a model's author chose: generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pdrelay.errors import ModelError
from pdrelay.model.config import ModelConfig, is_built_in, read_json_object, token_ids_of


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults for requests that leave a field out; None means the API's own default.

    `eos_token_ids` are the union of config.json's and generation_config.json's, in that order.
    `do_sample` is ignored, as vLLM does.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


# field: (smallest value, largest value or None)
_RANGES: Mapping[str, tuple[float, float | None]] = {
    "temperature": (0.0, None),
    "top_p": (0.0, 1.0),
    "top_k": (0, None),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, None),
}


def load_generation_config(model: str, config: ModelConfig) -> GenerationConfig:
    """Defaults of `model`; without the file, only config.json's token ids. Raises ModelError."""
    path = Path(model) / "generation_config.json"
    if is_built_in(model) or not path.is_file():
        return GenerationConfig(
            eos_token_ids=config.eos_token_ids, bos_token_id=config.bos_token_id
        )
    raw = read_json_object(path)
    values = {name: _number(raw, name, path) for name in _RANGES}
    top_k = values.pop("top_k")
    bos = _token_ids(raw, "bos_token_id", config, path)
    eos = _token_ids(raw, "eos_token_id", config, path)
    return GenerationConfig(
        **values,
        top_k=None if top_k is None else int(top_k),
        eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *eos))),
        bos_token_id=bos[0] if bos else config.bos_token_id,
    )


def _number(raw: Mapping[str, Any], name: str, path: Path) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    low, high = _RANGES[name]
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or value < low or (high is not None and value > high):
        raise ModelError(f"{str(path)!r} has {name}={value!r}, out of range; fix or remove it")
    return float(value)


def _token_ids(
    raw: Mapping[str, Any], name: str, config: ModelConfig, path: Path
) -> tuple[int, ...]:
    ids = token_ids_of(raw.get(name))
    if ids is None or any(i >= config.vocab_size for i in ids):
        raise ModelError(f"{str(path)!r} has {name}={raw[name]!r}, no token ids; fix it")
    return ids
