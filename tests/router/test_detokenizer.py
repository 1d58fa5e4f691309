from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pdrelay.model.tokenizer import byte_level_tokenizer
from pdrelay.router.openai.detokenizer import Detokenizer

TOKENIZER = byte_level_tokenizer()
TEXTS = st.text(alphabet="abé ", max_size=24)
STOPS = st.lists(st.text(alphabet="abé ", min_size=1, max_size=4), max_size=3)


def run(text: str, **options) -> tuple[list[str], str | None, int]:
    """(pieces, stop string, tokens taken)"""
    detokenizer = Detokenizer(TOKENIZER.decoder(), **options)
    pieces, taken = [], 0
    for token_id in text.encode():
        pieces.append(detokenizer.push(token_id))
        taken += 1
        if detokenizer.stopped_by is not None:
            return pieces, detokenizer.stopped_by, taken
    return [*pieces, detokenizer.finish()], None, taken


def slow_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """The obvious way: the shortest prefix of the text that ends in a stop string."""
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return end - max(map(len, matching)), end
    return None


@given(st.binary(max_size=40))
def test_without_stop_strings_it_is_the_text(data: bytes) -> None:
    detokenizer = Detokenizer(TOKENIZER.decoder())
    text = "".join(map(detokenizer.push, data)) + detokenizer.finish()
    assert text == data.decode("utf-8", "replace")
    assert detokenizer.num_chars == len(text)


@settings(max_examples=500)
@given(TEXTS, STOPS, st.booleans())
def test_stop_strings_against_the_slow_way(text: str, stops: list[str], include: bool) -> None:
    pieces, stopped_by, taken = run(text, stop=stops, include_stop=include)
    found = slow_stop(text, stops)
    if found is None:
        assert stopped_by is None and "".join(pieces) == text
        return
    start, end = found
    assert stopped_by == text[start:end]
    assert "".join(pieces) == text[: end if include else start]
    assert taken == len(text[:end].encode())


class Pieces:
    """A decoder whose ids stand for given pieces of text."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def finish(self) -> str:
        return ""


@settings(max_examples=500)
@given(st.lists(TEXTS, max_size=6), STOPS)
def test_tokens_of_several_characters_stop_where_single_ones_do(
    pieces: list[str], stops: list[str]
) -> None:
    detokenizer = Detokenizer(Pieces(pieces), stop=stops)
    text = ""
    for i in range(len(pieces)):
        text += detokenizer.push(i)
        if detokenizer.stopped_by is not None:
            break
    text += detokenizer.finish()
    whole = "".join(pieces)
    found = slow_stop(whole, stops)
    assert text == (whole if found is None else whole[: found[0]])
    assert detokenizer.stopped_by == (None if found is None else whole[found[0] : found[1]])


@settings(max_examples=200)
@given(TEXTS, STOPS)
def test_nothing_is_held_longer_than_it_must(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER.decoder(), stop=stops)
    given_out = ""
    for i, char in enumerate(text):
        for token_id in char.encode():
            given_out += detokenizer.push(token_id)
        if detokenizer.stopped_by is not None:
            return
        so_far = text[: i + 1]
        held = so_far[len(given_out) :]
        assert so_far == given_out + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_min_tokens_hides_text_from_the_search() -> None:
    assert run("abab", stop=["ab"])[1] == "ab"
    pieces, stopped_by, taken = run("ababab", stop=["ab"], min_tokens=3)
    assert (stopped_by, taken) == ("ab", 6)
    assert "".join(pieces) == "abab"


def test_stop_string_over_several_tokens_of_one_character() -> None:
    pieces, stopped_by, _ = run("xéy", stop=["é"])
    assert (pieces, stopped_by) == (["x", "", ""], "é")
