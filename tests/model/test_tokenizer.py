from __future__ import annotations

import asyncio
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from pdrelay.errors import ModelError
from pdrelay.model.config import BUILT_IN
from pdrelay.model.tokenizer import (
    BYTE_LEVEL_SPECIAL_TOKENS,
    ByteDecoder,
    HfTokenizer,
    PlaceholderTokenizer,
    Tokenizer,
    byte_level_tokenizer,
    load_tokenizer,
)

BYTES = byte_level_tokenizer()
PLACEHOLDER = PlaceholderTokenizer(128_256)


def sentence_piece() -> HfTokenizer:
    """Llama 2's shape: word-initial spaces as U+2581, byte fallback."""
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", *"abcdé", "\u2581a", "\u2581b", "ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("\u2581", "a"), ("\u2581", "b"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return HfTokenizer(backend, len(pieces))


def trained_byte_level() -> HfTokenizer:
    """Llama 3's shape: merges over bytes, so that tokens are parts of characters and words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|eot|>"],
        show_progress=False,
    )
    text = ["naïve 日本語 日本 🙂🙃 hello world, hello there; größer als groß"] * 4
    backend.train_from_iterator(text, trainer)
    backend.add_tokens([AddedToken("two words", special=False)])
    return HfTokenizer(backend, backend.get_vocab_size())


TRAINED = trained_byte_level()


def incremental(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    decoder = tokenizer.decoder(skip_special_tokens=skip)
    return "".join(map(decoder.push, ids)) + decoder.finish()


# ---- byte level


def test_byte_level_ids_are_bytes() -> None:
    assert BYTES.encode("hé", add_special_tokens=False) == list("hé".encode())
    assert BYTES.encode("hi") == [256, 104, 105]
    assert [BYTES.backend.token_to_id(token) for token in BYTE_LEVEL_SPECIAL_TOKENS] == list(
        range(256, 262)
    )
    assert BYTES.vocab_size == BUILT_IN["tiny"].vocab_size == 264
    assert BYTES.encode("a<|end|>b", add_special_tokens=False) == [97, 261, 98]


@given(st.binary(max_size=60))
def test_byte_level_decodes_any_bytes_as_python_does(data: bytes) -> None:
    assert BYTES.decode(list(data)) == data.decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_byte_level_round_trip(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text), skip_special_tokens=False) == "<|bos|>" + text


@given(
    st.lists(st.one_of(st.text(max_size=5), st.sampled_from(["<|", "<|end|>", "<|bos|>", "|>"]))),
    st.booleans(),
)
def test_byte_level_encodes_as_the_library_does(parts: list[str], special: bool) -> None:
    text = "".join(parts)
    slow = BYTES.backend.encode(text, add_special_tokens=special).ids
    assert BYTES.encode(text, add_special_tokens=special) == slow


def test_byte_level_saves_what_transformers_loads(tmp_path) -> None:
    from transformers import AutoTokenizer

    BYTES.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    ours = HfTokenizer.from_directory(str(tmp_path), 264)
    for text in ("hello", "日本 <|end|> x", " two  spaces\n"):
        assert theirs(text)["input_ids"] == ours.encode(text) == BYTES.encode(text)
    assert (theirs.bos_token, theirs.eos_token) == (ours.bos_token, ours.eos_token)
    chat = [{"role": "user", "content": "hi"}]
    assert ours.chat_template == BYTES.chat_template == theirs.chat_template
    rendered = theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, continue_final_message=False
    )
    assert rendered == "<|bos|><|user|>hi<|end|><|assistant|>"


# ---- incremental == whole


@settings(max_examples=300)
@given(st.lists(st.integers(0, 263), max_size=40), st.booleans())
def test_incremental_byte_level(ids: list[int], skip: bool) -> None:
    assert incremental(BYTES, ids, skip) == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300)
@given(st.lists(st.integers(0, TRAINED.vocab_size - 1), max_size=40), st.booleans())
def test_incremental_trained_byte_level(ids: list[int], skip: bool) -> None:
    assert incremental(TRAINED, ids, skip) == TRAINED.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=30))
def test_incremental_of_real_text(text: str) -> None:
    for tokenizer in (TRAINED, PLACEHOLDER):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert incremental(tokenizer, ids) == tokenizer.decode(ids)


SENTENCES = sentence_piece()


@settings(max_examples=200)
@given(st.text(alphabet="ab cdé日🙂", max_size=20))
def test_incremental_sentence_piece(text: str) -> None:
    ids = SENTENCES.encode(text, add_special_tokens=False)
    assert incremental(SENTENCES, ids) == SENTENCES.decode(ids)


def test_sentence_piece_keeps_the_space_after_a_prompt() -> None:
    prompt = SENTENCES.encode("a", add_special_tokens=False)
    word = SENTENCES.backend.token_to_id("\u2581b")
    assert SENTENCES.decoder(context=prompt).push(word) == " b"
    assert SENTENCES.decoder().push(word) == "b"


def test_no_piece_holds_half_a_character() -> None:
    ids = list("a🙂b".encode())
    decoder = BYTES.decoder()
    assert [decoder.push(i) for i in ids] == ["a", "", "", "", "🙂", "b"]


def test_a_character_that_the_prompt_began() -> None:
    first, *rest = "é".encode()
    assert BYTES.decoder(context=[97, first]).push(rest[0]) == "é"


@given(st.lists(st.integers(0, TRAINED.vocab_size - 1), max_size=9), st.booleans())
def test_a_context_counts_as_if_all_of_it_were_decoded(ids: list[int], skip: bool) -> None:
    for tokenizer in (TRAINED, BYTES):
        context = [each for each in ids if each < tokenizer.vocab_size]
        slow = ByteDecoder(tokenizer, tokenizer._special if skip else frozenset())
        for token_id in context[-6:]:
            slow.push(token_id)
        fast = tokenizer.decoder(skip_special_tokens=skip, context=context)
        token_id = next(i for i in range(400) if tokenizer.token_bytes(i) == b"\xa9")
        assert fast.push(token_id) == slow.push(token_id)
        assert fast.finish() == slow.finish()


def test_unfinished_tail_becomes_a_replacement_character() -> None:
    decoder = BYTES.decoder()
    assert decoder.push(0xF0) == "" and decoder.push(0x9F) == ""
    assert decoder.finish() == "\ufffd"


# ---- placeholder


@given(st.lists(st.integers(0, 128_255), max_size=20))
def test_placeholder_text_survives(ids: list[int]) -> None:
    text = PLACEHOLDER.decode(ids)
    assert PLACEHOLDER.decode(PLACEHOLDER.encode(text)) == text


@given(st.lists(st.integers(256, 128_255), max_size=20))
def test_placeholder_ids_survive(ids: list[int]) -> None:
    assert PLACEHOLDER.encode(PLACEHOLDER.decode(ids)) == ids


@pytest.mark.parametrize("text", ["<|5|>", "<|999999|>", "<|0300|>", "<|", "<||>"])
def test_placeholder_leaves_other_text_alone(text: str) -> None:
    assert PLACEHOLDER.encode(text) == list(text.encode())


# ---- loading


def test_built_in_shapes_have_tokenizers() -> None:
    for name, config in BUILT_IN.items():
        assert load_tokenizer(name, config).vocab_size == config.vocab_size


def test_special_tokens_and_template_of_a_directory(tmp_path) -> None:
    BYTES.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<|bos|>", "special": True},
                "eos_token": "<|eos|>",
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "yes"},
                ],
            }
        )
    )
    tokenizer = HfTokenizer.from_directory(str(tmp_path), 264)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|eos|>")
    assert tokenizer.chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("file wins")
    assert HfTokenizer.from_directory(str(tmp_path), 264).chat_template == "file wins"


def test_bad_directories_are_one_line_errors(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        HfTokenizer.from_directory(str(tmp_path), 264)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="download it again"):
        HfTokenizer.from_directory(str(tmp_path), 264)
    BYTES.backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="vocab_size=100"):
        HfTokenizer.from_directory(str(tmp_path), 100)


def test_token_text_of_parts_of_characters() -> None:
    assert BYTES.token_text(104) == "h"
    assert BYTES.token_text(0xE2) == "bytes:\\xe2"
    assert BYTES.token_text(257) == "<|eos|>"
    assert BYTES.token_text(263) == ""


@pytest.mark.parametrize("tokenizer", [TRAINED, SENTENCES])
@pytest.mark.parametrize("special", [False, True])
def test_long_texts_are_encoded_as_short_ones(tokenizer: HfTokenizer, special: bool) -> None:
    text = "naïve 日本語 <|eot|> 🙂 hello two words <s> größer\n\tab  b" * 100
    assert len(text) > tokenizer.short_text
    want = tokenizer.backend.encode(text, add_special_tokens=special).ids
    assert tokenizer.encode(text, add_special_tokens=special) == want


async def test_a_long_text_leaves_the_interpreter_to_others() -> None:
    """With `encode` of the library the loop has no turn until it is done."""
    text = "hello world, hello there " * 40_000
    task = asyncio.create_task(asyncio.to_thread(TRAINED.encode, text))
    num_turns = 0
    while not task.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert num_turns > 5
