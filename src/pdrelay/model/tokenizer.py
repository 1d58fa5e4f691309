"""Text to token ids and back, without torch and without transformers.

    Tokenizer
    ├── HfTokenizer           tokenizer.json of a Hugging Face directory
    │   └── ByteLevelTokenizer  of the built-in shape `tiny`; saved, it is the same tokenizer.json
    └── PlaceholderTokenizer  for shapes that are published without their tokenizer

Detokenization is incremental: an `IncrementalDecoder` takes one id at a time and gives the text
that is certain, so that the pieces joined are the text of all ids.
"""

from __future__ import annotations

import abc
import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from pdrelay.errors import ModelError
from pdrelay.model.config import ModelConfig, is_built_in, read_json_object

BYTE_LEVEL_SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
BYTE_LEVEL_VOCAB_SIZE = 264  # 256 bytes, 6 special tokens, padded to a multiple of 8
BYTE_LEVEL_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') }}"
    "{% if not (loop.last and continue_final_message) %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_BYTE_LEVEL_SPECIAL = re.compile("|".join(map(re.escape, BYTE_LEVEL_SPECIAL_TOKENS)))
_CONTEXT_TOKENS = 6  # of the prompt: enough to settle a leading space and an unfinished character
_MAX_UNREAD_TOKENS = 16  # longer than any character: bounds the work an id costs
_PLACEHOLDER = re.compile(r"<\|(\d{1,9})\|>")


class IncrementalDecoder(Protocol):
    """Turns a growing list of ids into text, id by id."""

    def push(self, token_id: int) -> str:
        """The text that this id makes certain; "" while a character is unfinished."""

    def finish(self) -> str:
        """What was held back: an unfinished character becomes U+FFFD."""


class Tokenizer(abc.ABC):
    """`vocab_size` is the model's, padding included: ids below it are valid prompts."""

    vocab_size: int
    bos_token: str | None = None
    eos_token: str | None = None
    chat_template: str | None = None  # Jinja source
    max_token_bytes: int | None = None  # of UTF-8 text that one id stands for at most, if bounded
    # Characters up to which `encode` may hold up an event loop; a longer text is for a thread.
    short_text: int = 1 << 15

    @abc.abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens that are spelled out become their ids."""

    @abc.abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids without a token give nothing."""

    @abc.abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """What this id alone stands for; special tokens as they are spelled."""

    @abc.abstractmethod
    def decoder(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> IncrementalDecoder:
        """A decoder of what follows `context`, whose own text is not repeated."""

    def token_text(self, token_id: int) -> str:
        """The id in logprobs. Part of a character is shown as OpenAI does: `bytes:\\xe2`."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def load_tokenizer(model: str, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a built-in shape or of a Hugging Face directory. Raises ModelError."""
    if not is_built_in(model):
        return HfTokenizer.from_directory(model, config.vocab_size)
    if config.vocab_size == BYTE_LEVEL_VOCAB_SIZE:
        return byte_level_tokenizer()
    return PlaceholderTokenizer(config.vocab_size)


# ---- tokenizers of the `tokenizers` library


class HfTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with what tokenizer_config.json adds to it.

    Encoding takes 0.2 to 0.3 ms a thousand characters.
    """

    short_text = 1 << 10

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        vocab_size: int,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.vocab_size = vocab_size
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._byte_level = _is_byte_level(backend)
        self._bytes: dict[int, bytes] = {}  # a cache, at most one entry an id
        self._char_bytes = _byte_level_alphabet()
        if backend.normalizer is None and self._byte_level:
            longest = max(map(len, backend.get_vocab()), default=1)
            self.max_token_bytes = 4 * longest  # an added token's character may be 4 bytes

    @classmethod
    def from_directory(cls, directory: str, vocab_size: int) -> HfTokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template. Raises ModelError.

        A template in a file of its own wins over one in tokenizer_config.json, as in transformers.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"no tokenizer.json in {directory!r}: save the model's fast tokenizer there"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"broken {str(path)!r}: {error}; download it again") from None
        backend.no_truncation()
        backend.no_padding()
        if backend.get_vocab_size() > vocab_size:
            raise ModelError(
                f"{str(path)!r} has {backend.get_vocab_size()} tokens but config.json has "
                f"vocab_size={vocab_size}: use the tokenizer that belongs to the model"
            )
        config_path = Path(directory) / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        return cls(
            backend,
            vocab_size,
            bos_token=_token_content(config.get("bos_token")),
            eos_token=_token_content(config.get("eos_token")),
            chat_template=_read_chat_template(Path(directory), config),
        )

    def save(self, directory: str) -> None:
        """Write the files that `from_directory` and transformers read."""
        self.backend.save(str(Path(directory) / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name in ("bos_token", "eos_token", "chat_template"):
            if getattr(self, name) is not None:
                config[name] = getattr(self, name)
        encoded = msgspec.json.format(msgspec.json.encode(config))
        (Path(directory) / "tokenizer_config.json").write_bytes(encoded)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) <= self.short_text:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        # Of the two only a batch lets go of the GIL meanwhile.
        (encoded,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoded.ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._token_bytes(token_id)
        return known

    def _token_bytes(self, token_id: int) -> bytes:
        if not self._byte_level:
            return self.decode([token_id], skip_special_tokens=False).encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._char_bytes[char] for char in token)
        except KeyError:  # an added token, which is not spelled in the byte alphabet
            return token.encode()

    def decoder(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> IncrementalDecoder:
        if self._byte_level:
            skip = self._special if skip_special_tokens else frozenset()
            return ByteDecoder(self, skip, context)
        return WindowDecoder(self, skip_special_tokens, context)


class ByteLevelTokenizer(HfTokenizer):
    """Encodes without the library, which takes 30 times as long where there are no merges."""

    short_text = 1 << 15

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        token_ids = [256] if add_special_tokens else []
        start = 0
        if "<|" in text:
            for match in _BYTE_LEVEL_SPECIAL.finditer(text):
                token_ids += text[start : match.start()].encode()
                token_ids.append(256 + BYTE_LEVEL_SPECIAL_TOKENS.index(match[0]))
                start = match.end()
        token_ids += text[start:].encode()
        return token_ids


def byte_level_tokenizer() -> ByteLevelTokenizer:
    """The tokenizer of the built-in shape `tiny`: id b is byte b, special tokens from 256 on."""
    alphabet = {byte: char for char, byte in _byte_level_alphabet().items()}
    vocab = {alphabet[byte]: byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in BYTE_LEVEL_SPECIAL_TOKENS]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 256)]
    )
    return ByteLevelTokenizer(
        backend,
        BYTE_LEVEL_VOCAB_SIZE,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=BYTE_LEVEL_CHAT_TEMPLATE,
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte in byte-level vocabularies: GPT-2's `bytes_to_unicode`, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    decoder = msgspec.json.decode(backend.to_str()).get("decoder") or {}
    if decoder.get("type") == "Sequence":
        steps = decoder.get("decoders", [])
        return len(steps) == 1 and steps[0].get("type") == "ByteLevel"
    return bool(decoder.get("type") == "ByteLevel")


def _token_content(value: Any) -> str | None:
    """A special token in tokenizer_config.json: its text, or an AddedToken object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot read {str(file)!r}: {error}; fix or remove it") from None
    legacy = directory / "chat_template.json"
    value = (read_json_object(legacy) if legacy.is_file() else config).get("chat_template")
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


# ---- incremental decoding


class ByteDecoder:
    """For tokenizers whose every id stands for bytes: a table and a UTF-8 decoder, O(1) an id.

    Python's `replace` and Rust's `from_utf8_lossy`, which `tokenizers` uses, both replace each
    maximal ill-formed part by one U+FFFD (Unicode 15, section 3.9).
    """

    def __init__(
        self, tokenizer: Tokenizer, skip: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for raw in reversed(self._unsettled(context)):
            self._utf8.decode(raw)

    def _unsettled(self, context: Sequence[int]) -> list[bytes]:
        """The ids of `context` as bytes, last first, back to where a character surely ends."""
        tail: list[bytes] = []
        for token_id in reversed(context[-_CONTEXT_TOKENS:]):
            raw = b"" if token_id in self._skip else self._token_bytes(token_id)
            if raw and raw[-1] < 0x80:
                break
            tail.append(raw)
        return tail

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class WindowDecoder:
    """For every other tokenizer: decode a short window twice, emit what it grew by.

    The window starts at the previous emission, so that decoders that treat the first token of a
    text specially (SentencePiece drops its space) see one before. The algorithm is that of Text
    Generation Inference and of vLLM's `detokenize_incrementally`.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._num_read = len(self._window)  # ids of the window whose text is out
        self._text = self._decode(self._window)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        num_unread = len(self._window) - self._num_read
        unfinished = len(text) <= len(self._text) or text.endswith("\ufffd")
        if unfinished and num_unread < _MAX_UNREAD_TOKENS:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        text = self._decode(self._window)
        return self._advance(text) if len(text) > len(self._text) else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._text) :]
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._text = self._decode(self._window)
        return new


# ---- no tokenizer at all


class PlaceholderTokenizer(Tokenizer):
    """Stands in where a built-in shape has no tokenizer files (`llama-3.1-8b`).

    Ids below 256 are bytes; every other id is spelled `<|id|>`, and such text is that id again.
    Text goes to ids and back unchanged, but the ids mean nothing to trained weights: it is for
    benchmarks with token ids and random weights. There is no special token and no BOS.
    """

    max_token_bytes = len("<|000000000|>")

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.chat_template = (
            "{% for message in messages %}{{ message['role'] + ': ' + (message['content'] or '') }}"
            "{% if not (loop.last and continue_final_message) %}{{ '\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        token_ids: list[int] = []
        start = 0
        for match in _PLACEHOLDER.finditer(text):
            token_id = int(match[1])
            if not 256 <= token_id < self.vocab_size or match[0] != f"<|{token_id}|>":
                continue
            token_ids += text[start : match.start()].encode()
            token_ids.append(token_id)
            start = match.end()
        token_ids += text[start:].encode()
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,)) if token_id < 256 else b"<|%d|>" % token_id

    def decoder(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> IncrementalDecoder:
        return ByteDecoder(self, frozenset(), context)
