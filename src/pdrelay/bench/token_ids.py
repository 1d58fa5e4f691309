"""Random token ids that are a pure function of a seed and a key.

Two prompts share a prefix exactly where their keys agree: the content of a block depends on
(seed, key, position in the block) alone, and its first tokens spell the key in base
`vocab_size - low`, so different keys differ by construction and not by luck.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from pdrelay.errors import ConfigError

# Ids that are plain tokens in the common byte-level tokenizers, whose bytes lie in 0..255 (GPT-2,
# Llama 3, Qwen) or 3..258 after unk, bos and eos (Llama 2). Used when the server's vocabulary
# size is not known.
DEFAULT_LOW = 3
DEFAULT_VOCAB_SIZE = 256

_KEY_BITS = 32  # keys below 2**32 are told apart exactly
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

U64 = npt.NDArray[np.uint64]


def check_vocab(low: int, vocab_size: int) -> None:
    """Raises ConfigError unless [low, vocab_size) holds at least two ids."""
    if low < 0 or vocab_size < low + 2:
        raise ConfigError(
            f"token ids [{low}, {vocab_size}) hold fewer than two values: raise the vocabulary size"
        )


def _mix(x: U64) -> U64:
    """SplitMix64's output function (Steele, Lea, Flood 2014; constants of Vigna), elementwise."""
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_seed(seed: int, domain: str) -> np.uint64:
    word = np.array([(seed & _MASK64) ^ (zlib.crc32(domain.encode()) << 32)], dtype=np.uint64)
    return np.uint64(_mix(_mix(word))[0])


def _num_digits(span: int) -> int:
    """How many tokens it takes to spell any key below 2**32 in base `span`."""
    digits = 1
    while span**digits < 1 << _KEY_BITS:
        digits += 1
    return digits


def token_blocks(
    keys: list[int], block_len: int, *, seed: int, low: int, vocab_size: int, domain: str
) -> npt.NDArray[np.int64]:
    """Blocks of token ids, one for each key.

    Args:
        keys: non-negative integers below 2**63.
        domain: separates uses of one seed, such as "trace" and "warm-up".

    Returns:
        int64 of shape (len(keys), block_len), every value in [low, vocab_size).
    """
    check_vocab(low, vocab_size)
    span = vocab_size - low
    base = _stream_seed(seed, domain)
    key = np.array(keys, dtype=np.uint64)
    rows = _mix(key ^ base)
    positions = np.arange(block_len, dtype=np.uint64) * np.uint64(_GOLDEN)
    values = (_mix(rows[:, None] + positions[None, :]) % np.uint64(span)).astype(np.int64)
    digits = _num_digits(span)
    offset = int(base) % (1 << _KEY_BITS)
    code = (key + np.uint64(offset)) % np.uint64(min(span**digits, _MASK64))
    for digit in range(min(digits, block_len)):
        values[:, digit] = (code % np.uint64(span)).astype(np.int64)
        code //= np.uint64(span)
    return values + low


def token_prompt(
    key: int, length: int, *, seed: int, low: int, vocab_size: int, domain: str
) -> list[int]:
    """One prompt of `length` ids; prompts of different keys differ within their first tokens."""
    blocks = token_blocks([key], length, seed=seed, low=low, vocab_size=vocab_size, domain=domain)
    ids: list[int] = blocks[0].tolist()
    return ids
