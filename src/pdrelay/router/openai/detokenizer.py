"""Text of one choice, token by token, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from pdrelay.model.tokenizer import IncrementalDecoder


class Detokenizer:
    """Gives out text as soon as no stop string can begin in it.

    A stop string ends the text where it is first complete, whatever tokens it came in; of several
    complete at the same character the longest counts. Text of the first `min_tokens` tokens is not
    searched, as in vLLM.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # the longest suffix so far that could begin a stop string
        self.num_chars = 0  # decoded so far, given out or held: where the next token begins
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Text that became certain. Not to be called after `stopped_by` is set."""
        assert self.stopped_by is None
        self._num_tokens += 1
        new = self._decoder.push(token_id)
        self.num_chars += len(new)
        if not self._stop or self._num_tokens <= self._min_tokens or not new:
            return new
        text = self._held + new
        found = self._first_stop(text)
        if found is not None:
            start, end = found
            self.stopped_by = text[start:end]
            self._held = ""
            return text[: end if self._include_stop else start]
        keep = self._num_undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the tokens end before a stop string does."""
        held, self._held = self._held, ""
        if self.stopped_by is not None:
            return ""
        tail = self._decoder.finish()
        self.num_chars += len(tail)
        return held + tail

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the stop string that is complete first."""
        found: tuple[int, int] | None = None
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0:
                end = start + len(stop)
                if found is None or (end, start) < (found[1], found[0]):
                    found = start, end
        return found

    def _num_undecided(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop string."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stop):
                return length
        return 0
