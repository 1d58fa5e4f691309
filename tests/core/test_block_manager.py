"""Block states under random use, against a model that is a plain dictionary."""

from __future__ import annotations

import hashlib
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdrelay.core.block_hash import extend_keys
from pdrelay.core.block_manager import BlockManager
from pdrelay.core.token_ids import pack_ids


class BlockManagerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.manager = BlockManager(12)
        self.tables: list[list[int]] = []
        self.transfers: list[list[int]] = []
        self.contents: dict[bytes, int] = {}
        self.counter = 0

    @rule(count=st.integers(1, 6))
    def allocate(self, count):
        before = self.manager.num_available
        blocks = self.manager.allocate(count)
        assert (blocks is None) == (count > before)
        if blocks is not None:
            held = {b for table in self.tables for b in table}
            assert not held & set(blocks)
            self.contents = {k: b for k, b in self.contents.items() if b not in blocks}
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data):
        table = data.draw(st.sampled_from(self.tables))
        block = data.draw(st.sampled_from(table))
        if block in self.contents.values():
            return
        self.counter += 1
        key = b"%032d" % self.counter
        self.manager.set_key(block, key)
        self.contents[key] = block

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def reuse(self, data):
        key = data.draw(st.sampled_from(sorted(self.contents)))
        matched = self.manager.match([key])
        assert matched == [self.contents[key]]
        self.manager.acquire(matched)
        self.tables.append(matched)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        if self.tables[index] in self.transfers:
            self.manager.end_transfer(self.tables[index])
            self.transfers.remove(self.tables[index])
        self.manager.release(self.tables.pop(index))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def transfer(self, data):
        table = data.draw(st.sampled_from(self.tables))
        if table not in self.transfers:
            self.manager.begin_transfer(table)
            self.transfers.append(table)

    @invariant()
    def consistent(self):
        self.manager.check_integrity(self.tables)


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestBlockManager = BlockManagerMachine.TestCase


def test_prefers_consecutive_blocks():
    manager = BlockManager(16)
    first = manager.allocate(4)
    second = manager.allocate(4)
    assert first == [0, 1, 2, 3]
    manager.release(first)
    manager.release(second)
    assert manager.allocate(8) == list(range(8))


def test_evicts_least_recently_released_tail_first():
    manager = BlockManager(4)
    blocks = manager.allocate(4)
    keys: list[bytes] = []
    extend_keys(keys, pack_ids(range(8)), 2)
    for block, key in zip(blocks, keys, strict=True):
        manager.set_key(block, key)
    manager.release(blocks)
    assert manager.match(keys) == blocks
    taken = manager.allocate(1)
    assert taken == [blocks[3]], "the tail of a prefix goes before its head"
    assert manager.match(keys) == blocks[:3]


def test_double_release_is_caught():
    manager = BlockManager(2)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        manager.release(blocks)


def test_release_during_transfer_is_caught():
    manager = BlockManager(2)
    blocks = manager.allocate(1)
    manager.begin_transfer(blocks)
    with pytest.raises(AssertionError, match="freed in transfer"):
        manager.release(blocks)


def test_keys_name_whole_prefixes():
    a: list[bytes] = []
    b: list[bytes] = []
    salted: list[bytes] = []
    extend_keys(a, pack_ids([1, 2, 3, 4, 5]), 2)
    extend_keys(b, pack_ids([9, 2, 3, 4, 5]), 2)
    extend_keys(salted, pack_ids([1, 2, 3, 4, 5]), 2, "tenant")
    assert len(a) == 2
    assert a[1] != b[1], "same block, other prefix"
    assert a[0] != salted[0]
    extended = a[:1]
    extend_keys(extended, pack_ids([1, 2, 3, 4, 5]), 2)
    assert extended == a


def plain_keys(token_ids, block_size, salt):
    """The definition, a block at a time."""
    keys, parent = [], hashlib.sha256(b"pdrelay-block-v1:" + salt.encode()).digest()
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        content = b"".join(i.to_bytes(4, sys.byteorder) for i in token_ids[start:][:block_size])
        parent = hashlib.sha256(parent + content).digest()
        keys.append(parent)
    return keys


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=40),
    st.integers(1, 9),
    st.sampled_from(["", "tenant"]),
    st.integers(0, 40),
)
def test_keys_are_their_plain_definition_however_they_are_extended(ids, block_size, salt, cut):
    keys: list[bytes] = []
    extend_keys(keys, pack_ids(ids[:cut]), block_size, salt)
    extend_keys(keys, pack_ids(ids), block_size, salt)
    assert keys == plain_keys(ids, block_size, salt)
