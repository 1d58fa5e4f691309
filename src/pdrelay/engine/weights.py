"""Where weights come from: safetensors files, or a seed. Also: writing seeded weights to disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pdrelay.errors import ModelError
from pdrelay.model.config import (
    ModelConfig,
    is_built_in,
    load_model_config,
    read_json_object,
    to_hf_config,
)

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_Shape = tuple[int, ...]


class WeightSource(Protocol):
    """Parameters by their Hugging Face names."""

    def tensor(
        self, name: str, shape: _Shape, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """`start .. stop` along `dim` of the parameter whose full shape is `shape`.

        Raises ModelError, naming file and tensor.
        """


def open_weights(
    model: str, load_format: str, seed: int, device: torch.device | None = None
) -> WeightSource:
    """`load_format` "dummy" is the seeded weights; "auto" reads files, unless the shape is
    built in. Tensors come on `device` (default: CPU). Raises ModelError.
    """
    assert load_format in ("auto", "safetensors", "dummy")
    device = torch.device("cpu") if device is None else device
    if load_format == "dummy" or is_built_in(model):
        return DummyWeights(seed, device)
    return SafetensorsWeights(Path(model), device)


def parameter_shapes(config: ModelConfig) -> dict[str, _Shape]:
    """Every parameter of the model: name to full shape, in checkpoint order."""
    hidden, head_dim = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes: dict[str, _Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        for name, out_features, in_features, bias in (
            ("self_attn.q_proj", q_width, hidden, config.attention_bias),
            ("self_attn.k_proj", kv_width, hidden, config.attention_bias),
            ("self_attn.v_proj", kv_width, hidden, config.attention_bias),
            ("self_attn.o_proj", hidden, q_width, config.attention_bias),
            ("mlp.gate_proj", config.intermediate_size, hidden, config.mlp_bias),
            ("mlp.up_proj", config.intermediate_size, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, config.intermediate_size, config.mlp_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (out_features,)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


class SafetensorsWeights:
    """A directory with model.safetensors, or shards and their index; read through mmap."""

    def __init__(self, directory: Path, device: torch.device | None = None) -> None:
        self._directory = directory
        self._device = "cpu" if device is None else str(device)
        self._file_of: dict[str, str] = {}
        index = directory / _INDEX
        if index.is_file():
            weight_map = read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{str(index)!r} has no weight_map; download it again")
            self._file_of = {str(name): str(file) for name, file in weight_map.items()}
            for file in sorted(set(self._file_of.values())):
                self._check_shard(file)
        elif not (directory / _SINGLE).is_file():
            raise ModelError(
                f"no {_SINGLE} or {_INDEX} in {str(directory)!r}: download the weights, or pass "
                "--load-format dummy"
            )

    def tensor(
        self, name: str, shape: _Shape, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        file = self._file(name)
        with self._open(file, name) as handle:
            stored = handle.get_slice(name)
            found = tuple(stored.get_shape())
            if found != shape:
                raise ModelError(
                    f"tensor {name!r} in {self._path(file)} has shape {list(found)}, config.json "
                    f"asks for {list(shape)}: the files do not belong together"
                )
            index = [slice(None)] * len(shape)
            index[dim] = slice(start, shape[dim] if stop is None else stop)
            tensor: torch.Tensor = stored[tuple(index)]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ModelError(
                f"tensor {name!r} in {self._path(file)} has dtype {tensor.dtype}; supported: "
                "float32, bfloat16, float16"
            )
        return tensor

    def _path(self, file: str) -> str:
        return repr(str(self._directory / file))

    def _check_shard(self, file: str) -> None:
        if Path(file).name != file:
            raise ModelError(f"{_INDEX} points outside its directory: {file!r}")
        if not (self._directory / file).is_file():
            raise ModelError(f"missing shard {self._path(file)}: download it again")

    def _file(self, name: str) -> str:
        if not self._file_of:
            return _SINGLE
        file = self._file_of.get(name)
        if file is None:
            index = str(self._directory / _INDEX)
            raise ModelError(f"{index!r} lists no tensor {name!r}: download the model again")
        return file

    @contextlib.contextmanager
    def _open(self, file: str, name: str) -> Iterator[safe_open]:
        try:
            with safe_open(self._directory / file, framework="pt", device=self._device) as handle:
                if name not in handle.keys():  # noqa: SIM118 (no container)
                    raise ModelError(
                        f"{self._path(file)} holds no tensor {name!r}: download it again"
                    )
                yield handle
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot read tensor {name!r} from {self._path(file)}: {error}; download it again"
            ) from error


class DummyWeights:
    """Random weights, a function of (seed, parameter name, shape) alone.

    Projections N(0, 1 / fan_in), embeddings N(0, 1), norms 1, biases N(0, 0.02^2): activations
    keep unit variance, so attention and logits have structure. Ranks draw the full parameter and
    cut their part out of it.

    They are drawn on the device, 8 billion in about a second: a CUDA device gives other numbers
    than a CPU for the same seed. `save_pretrained_dummy` writes the CPU's.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._seed = seed
        self._device = torch.device("cpu") if device is None else device

    def tensor(
        self, name: str, shape: _Shape, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        full = self._draw(name, shape)
        stop = shape[dim] if stop is None else stop
        return full.narrow(dim, start, stop - start)

    def _draw(self, name: str, shape: _Shape) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device=self._device)
        if name.endswith(".bias"):
            return values.mul_(0.02)
        return values if name == EMBEDDING else values.mul_(shape[-1] ** -0.5)


def save_pretrained_dummy(
    model: str, seed: int, directory: Path, max_shard_bytes: int | None = None
) -> None:
    """Write the seeded weights of `model` (built-in name or directory with a config.json) as a
    Hugging Face directory that other engines load: config.json and safetensors, in shards of at
    most `max_shard_bytes` (one tensor at least). The tokenizer is not written.
    """
    config = load_model_config(model)
    source = DummyWeights(seed)
    dtype = getattr(torch, config.dtype)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_hf_config(config), indent=2) + "\n")
    shapes = parameter_shapes(config)
    shards = _split(shapes, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: source.tensor(name, shapes[name]).to(dtype) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(shapes: dict[str, _Shape], itemsize: int, max_bytes: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if room is not None and max_bytes is not None:
            if size > room and shards[-1]:
                shards.append([])
                room = max_bytes
            room -= size
        shards[-1].append(name)
    return shards
