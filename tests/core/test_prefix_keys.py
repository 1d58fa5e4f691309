"""Keys on demand are the keys of `extend_keys`, and no more are hashed than were asked for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pdrelay.core.block_hash import extend_keys, tail_key
from pdrelay.core.block_manager import BlockManager
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import pack_ids


def make_request(length):
    source = EngineRequest(
        request_id="r",
        prompt_token_ids=pack_ids(range(length)),
        params=SamplingParams(max_tokens=9, seed=0),
        arrived_ns=0,
        cache_salt="s",
    )
    return Request(source)


def plain(request, block_size):
    keys: list[bytes] = []
    extend_keys(keys, request.token_ids, block_size, "s")
    return keys


@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(0, 40)), st.integers(0, 20))
def test_any_order_of_asking_gives_the_plain_keys(length, block_size, asked, num_output):
    request = make_request(length)
    prompt = plain(request, block_size)
    if length % block_size:
        prompt.append(tail_key("r"))
    request.token_ids.extend(pack_ids(range(num_output)))  # decoding went on
    keys = request.prompt_keys(block_size)
    for index in asked:
        if index < len(prompt):
            assert keys[index] == prompt[index]
    assert len(keys) == len(prompt) and list(keys) == prompt and keys[1:] == prompt[1:]
    full = plain(request, block_size)
    prefix = request.prefix_keys(block_size)
    assert list(prefix) == full[: len(prefix)]
    assert len(prefix) == (len(request.token_ids) - 1) // block_size
    request.extend_block_keys(block_size)
    assert request.block_keys == full


def test_a_search_hashes_little_more_than_it_finds():
    request = make_request(400)
    assert BlockManager(8).match(request.prompt_keys(4)) == []
    assert len(request.block_keys) == 1
    manager = BlockManager(8)  # holds three of its blocks
    for block, key in zip(manager.allocate(3), plain(request, 4), strict=False):
        manager.set_key(block, key)
    assert len(manager.match(request.prompt_keys(4))) == 3
    assert len(request.block_keys) == 4, "1, 2, and then 4"
    with pytest.raises(IndexError):
        request.prompt_keys(4)[100]
