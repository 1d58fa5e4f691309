"""Which instance takes a request: the least loaded, unless another holds enough of its prompt."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdrelay.core.messages import EngineRequest
from pdrelay.core.token_ids import ID_BYTES


@dataclass
class Load:
    """What the front door has given to one instance and not yet got back."""

    tokens: int = 0  # producers, replicas: prompts without a first token; consumers: all prompts
    requests: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return (self.tokens, self.requests)


LoadOf = Callable[[str], Load]


class PrefixIndex:
    """Which instance last computed a prompt prefix: chained block hashes, a bounded LRU.

    A hint and no promise: the instance may have evicted the blocks. Hashes are 128-bit BLAKE2b; a
    collision could only misplace a request.
    """

    def __init__(
        self, *, block_size: int = 64, max_blocks: int = 256, capacity: int = 1 << 16
    ) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks  # of one prompt
        self._capacity = capacity
        self._holder: OrderedDict[bytes, str] = OrderedDict()

    def keys(self, request: EngineRequest) -> list[bytes]:
        """One key a full block; the last token is always computed, so its block never counts."""
        tokens = request.prompt_token_ids
        num_blocks = min((len(tokens) - 1) // self._block_size, self._max_blocks)
        raw = memoryview(tokens[: num_blocks * self._block_size].tobytes())
        step = self._block_size * ID_BYTES
        keys: list[bytes] = []
        parent = request.cache_salt.encode()
        for start in range(0, len(raw), step):
            parent = hashlib.blake2b(
                raw[start : start + step], key=parent[:64], digest_size=16
            ).digest()
            keys.append(parent)
        return keys

    def longest(self, keys: Sequence[bytes]) -> tuple[str, int] | None:
        """(instance, matched tokens) of the longest known prefix."""
        for i in range(len(keys) - 1, -1, -1):
            instance = self._holder.get(keys[i])
            if instance is not None:
                return instance, (i + 1) * self._block_size
        return None

    def add(self, keys: Sequence[bytes], instance: str) -> None:
        for key in reversed(keys):  # so that a prefix outlives what extends it
            self._holder[key] = instance
            self._holder.move_to_end(key)
        while len(self._holder) > self._capacity:
            self._holder.popitem(last=False)

    def forget(self, instance: str) -> None:
        """Its cache is gone."""
        for key in [key for key, holder in self._holder.items() if holder == instance]:
            del self._holder[key]


def least_loaded(instances: Sequence[str], load_of: LoadOf) -> str:
    """By outstanding tokens, then requests, then the order given."""
    return min(instances, key=lambda instance: load_of(instance).key)


class PrefixAffinity:
    """The holder of the longest known prefix, when waiting there costs less than it saves.

    Both are counted in prompt tokens: the holder may be ahead of the least loaded instance by at
    most the tokens that its cache spares. Else the least loaded one.
    """

    def __init__(self, index: PrefixIndex | None = None) -> None:
        self._index = PrefixIndex() if index is None else index

    def choose(self, request: EngineRequest, instances: Sequence[str], load_of: LoadOf) -> str:
        chosen = least_loaded(instances, load_of)
        if len(instances) == 1 or request.params.prompt_logprobs is not None:
            return chosen
        keys = self._index.keys(request)
        match = self._index.longest(keys)
        if match is not None and match[0] in instances:
            holder, saved = match
            if load_of(holder).tokens - load_of(chosen).tokens <= saved:
                chosen = holder
        self._index.add(keys, chosen)
        return chosen

    def forget(self, instance: str) -> None:
        self._index.forget(instance)
