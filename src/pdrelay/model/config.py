"""What a model is: its shape, read from a Hugging Face directory or taken from a built-in name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pdrelay.core.kv_layout import DTYPE_BYTES, KVLayout
from pdrelay.errors import ModelError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}


class Llama3RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Frequency-dependent stretching of RoPE, as published with Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a decoder-only transformer. Lengths are in tokens, sizes in elements."""

    architecture: str  # a value of ARCHITECTURES
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"  # of the checkpoint; a key of DTYPE_BYTES
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


_LLAMA_31_ROPE = Llama3RopeScaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)

BUILT_IN: Mapping[str, ModelConfig] = {
    "tiny": ModelConfig(
        architecture="llama",
        hidden_size=256,
        intermediate_size=768,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        vocab_size=264,
        max_position_embeddings=16_384,
        rope_theta=500_000.0,
        eos_token_ids=(257,),
        bos_token_id=256,
    ),
    # config.json of meta-llama/Llama-3.1-8B
    "llama-3.1-8b": ModelConfig(
        architecture="llama",
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling=_LLAMA_31_ROPE,
        dtype="bfloat16",
        eos_token_ids=(128_001,),
        bos_token_id=128_000,
    ),
    # config.json of meta-llama/Llama-3.1-70B
    "llama-3.1-70b": ModelConfig(
        architecture="llama",
        hidden_size=8192,
        intermediate_size=28_672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling=_LLAMA_31_ROPE,
        dtype="bfloat16",
        eos_token_ids=(128_001,),
        bos_token_id=128_000,
    ),
}


def is_built_in(model: str) -> bool:
    """Whether `model` names a built-in shape, which has seeded random weights only."""
    return model in BUILT_IN


def load_model_config(model: str) -> ModelConfig:
    """Shape of a built-in model, or of a Hugging Face directory's config.json.

    Raises ModelError, one line, for anything that cannot be served.
    """
    if is_built_in(model):
        return BUILT_IN[model]
    directory = Path(model)
    if not directory.is_dir():
        raise ModelError(
            f"unknown model {model!r}: pass a Hugging Face model directory or one of "
            f"{', '.join(sorted(BUILT_IN))}"
        )
    return parse_model_config(read_json_object(directory / "config.json"), model)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError when it is missing, unreadable or no object."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"no {path.name} in {str(path.parent)!r}: is it a Hugging Face model directory?"
        ) from None
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror}; fix its access") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelError(f"broken JSON in {str(path)!r}: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{str(path)!r} holds no JSON object; download it again")
    return value


def parse_model_config(raw: Mapping[str, Any], model: str) -> ModelConfig:
    """ModelConfig from the contents of a config.json (transformers 4 and 5 forms).

    `model` is only for messages. Raises ModelError.
    """
    return _Parser(raw, model).parse()


def kv_layout(
    config: ModelConfig, block_size: int, num_blocks: int, dtype: str, tp_size: int = 1
) -> KVLayout:
    """One rank's KV pool. Raises ModelError when heads do not divide among `tp_size` ranks."""
    check_tp(config, tp_size)
    assert dtype in DTYPE_BYTES
    return KVLayout(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=config.num_kv_heads // tp_size,
        head_dim=config.head_dim,
        dtype=dtype,
    )


def check_tp(config: ModelConfig, tp_size: int) -> None:
    """Raises ModelError when the model cannot be cut into `tp_size` equal shards."""
    for size, what in (
        (config.num_kv_heads, "KV heads"),
        (config.intermediate_size, "intermediate channels"),
    ):
        if tp_size < 1 or size % tp_size:
            raise ModelError(
                f"{size} {what} do not divide among {tp_size} ranks: choose a --tp that divides "
                f"{config.num_kv_heads}"
            )


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json that other engines read for this shape."""
    name = next(hf for hf, ours in ARCHITECTURES.items() if ours == config.architecture)
    scaling = config.rope_scaling
    raw: dict[str, Any] = {
        "architectures": [name],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {"rope_type": "llama3", **msgspec.structs.asdict(scaling)},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": config.dtype,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if config.eos_token_ids:
        ids = config.eos_token_ids
        raw["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids)
    if config.bos_token_id is not None:
        raw["bos_token_id"] = config.bos_token_id
    return raw


def token_ids_of(value: Any) -> tuple[int, ...] | None:
    """An id, a list of ids, or nothing, as config files spell it; None when it is neither."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        return None
    return tuple(dict.fromkeys(ids))


class _Parser:
    """Reads one config.json, field by field."""

    def __init__(self, raw: Mapping[str, Any], model: str) -> None:
        self._raw = raw
        self._model = model

    def parse(self) -> ModelConfig:
        architecture = self._architecture()
        self._refuse_unsupported()
        heads = self._int("num_attention_heads")
        hidden = self._int("hidden_size")
        rope = self._rope_parameters()
        config = ModelConfig(
            architecture=architecture,
            hidden_size=hidden,
            intermediate_size=self._int("intermediate_size"),
            num_layers=self._int("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=self._int("num_key_value_heads", heads),
            head_dim=self._int("head_dim", hidden // heads),
            vocab_size=self._int("vocab_size"),
            max_position_embeddings=self._int("max_position_embeddings", 2048),
            rms_norm_eps=self._float("rms_norm_eps", 1e-6),
            rope_theta=self._rope_theta(rope),
            rope_scaling=self._rope_scaling(rope),
            tie_word_embeddings=self._bool("tie_word_embeddings"),
            attention_bias=self._bool("attention_bias"),
            mlp_bias=self._bool("mlp_bias") if architecture == "llama" else False,
            qk_norm=architecture == "qwen3",
            dtype=self._dtype(),
            eos_token_ids=self._token_ids("eos_token_id"),
            bos_token_id=next(iter(self._token_ids("bos_token_id")), None),
        )
        self._check_sizes(config)
        return config

    def _error(self, text: str) -> ModelError:
        return ModelError(f"model {self._model!r}: {text}")

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self._error(f"config.json lacks {key!r}; download it again")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(f"config.json has {key}={value!r}; it must be a positive integer")
        return value

    def _float(self, key: str, default: float, raw: Mapping[str, Any] | None = None) -> float:
        value = (self._raw if raw is None else raw).get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self._error(f"config.json has {key}={value!r}; it must be a positive number")
        return float(value)

    def _bool(self, key: str) -> bool:
        value = self._raw.get(key)
        if not isinstance(value, bool | None):
            raise self._error(f"config.json has {key}={value!r}; it must be true or false")
        return bool(value)

    def _token_ids(self, key: str) -> tuple[int, ...]:
        ids = token_ids_of(self._raw.get(key))
        if ids is None:
            raise self._error(
                f"config.json has {key}={self._raw[key]!r}; it must be a token id or a list of them"
            )
        return ids

    def _architecture(self) -> str:
        names = self._raw.get("architectures")
        supported = ", ".join(ARCHITECTURES)
        if not isinstance(names, list) or not names:
            raise self._error(f"config.json names no architecture; supported: {supported}")
        for name in names:
            if isinstance(name, str) and name in ARCHITECTURES:
                return ARCHITECTURES[name]
        raise self._error(f"unsupported architecture {names[0]}; supported: {supported}")

    def _refuse_unsupported(self) -> None:
        quantization = self._raw.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise self._error(
                f"unsupported quantization {method or 'unknown'}; supported: unquantized "
                f"{', '.join(DTYPE_BYTES)} weights"
            )
        if self._raw.get("use_sliding_window") or (
            self._raw.get("sliding_window") is not None and "use_sliding_window" not in self._raw
        ):
            raise self._error(
                f"unsupported sliding window of {self._raw.get('sliding_window')}; supported: "
                "full attention"
            )
        kinds = self._raw.get("layer_types")
        if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
            raise self._error("unsupported layer_types; supported: full_attention in every layer")
        activation = self._raw.get("hidden_act", "silu")
        if activation != "silu":
            raise self._error(f"unsupported hidden_act {activation!r}; supported: silu")

    def _rope_parameters(self) -> Mapping[str, Any]:
        """transformers 5 has one `rope_parameters`; 4 has `rope_theta` beside `rope_scaling`."""
        for key in ("rope_parameters", "rope_scaling"):
            value = self._raw.get(key)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise self._error(f"config.json has {key}={value!r}; it must be an object")
            return value
        return {}

    def _rope_theta(self, rope: Mapping[str, Any]) -> float:
        return self._float("rope_theta", self._float("rope_theta", 10_000.0), rope)

    def _rope_scaling(self, rope: Mapping[str, Any]) -> Llama3RopeScaling | None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise self._error(f"unsupported rope type {kind!r}; supported: default, llama3")
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factors = {name: self._float(name, 0.0, rope) for name in names}
        original = rope.get("original_max_position_embeddings")
        if (
            0.0 in factors.values()
            or factors["high_freq_factor"] <= factors["low_freq_factor"]
            or not isinstance(original, int)
            or original < 1
        ):
            raise self._error("config.json has incomplete llama3 rope scaling; download it again")
        return Llama3RopeScaling(**factors, original_max_position_embeddings=original)

    def _dtype(self) -> str:
        value = self._raw.get("torch_dtype", self._raw.get("dtype"))
        name = str(value or "float32").removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise self._error(f"unsupported dtype {name!r}; supported: {', '.join(DTYPE_BYTES)}")
        return name

    def _check_sizes(self, config: ModelConfig) -> None:
        if config.num_heads % config.num_kv_heads:
            raise self._error(
                f"{config.num_heads} attention heads are no multiple of {config.num_kv_heads} KV "
                "heads; fix config.json"
            )
        if config.head_dim % 2:
            raise self._error(
                f"head_dim {config.head_dim} is odd, RoPE needs pairs; fix config.json"
            )
        ids = (
            *config.eos_token_ids,
            *(() if config.bos_token_id is None else [config.bos_token_id]),
        )
        for token_id in ids:
            if token_id >= config.vocab_size:
                raise self._error(
                    f"special token id {token_id} is outside the vocabulary of "
                    f"{config.vocab_size}; fix config.json"
                )
