"""Small models, and a slow client of the forward pass: chunks, pages in random order, decodes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from pdrelay.engine.attention import DecodeSegment, ForwardContext, PrefillSegment
from pdrelay.model.config import kv_layout, load_model_config, parse_model_config

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}


def small_config(**changes):
    return parse_model_config(SMALL | changes, "small")


@dataclass
class Sequence:
    token_ids: list[int]
    block_table: list[int]
    num_computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)  # one row a computed token


class Batcher:
    """Owns a KV pool filled with rubbish, deals out its blocks in random order, runs steps."""

    def __init__(self, config, model, *, block_size=8, num_blocks=64, tp_size=1, dtype="float32"):
        layout = kv_layout(config, block_size, num_blocks, dtype, tp_size)
        self.model = model
        self.block_size = block_size
        self.pool = torch.full(layout.shape, 7.5, dtype=getattr(torch, dtype))
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.layers_seen = []

    def sequence(self, token_ids, room=32):
        count = -(-(len(token_ids) + room) // self.block_size)
        return Sequence(list(token_ids), [self.free.pop() for _ in range(count)])

    def step(self, decodes=(), chunks=()):
        """`decodes`: sequences with one token left to compute; `chunks`: (sequence, length)."""
        work = [(s, 1) for s in decodes] + list(chunks)
        token_ids, positions, slots, prefills, start = [], [], [], [], 0
        for i, (s, length) in enumerate(work):
            span = range(s.num_computed, s.num_computed + length)
            token_ids += [s.token_ids[p] for p in span]
            positions += span
            bs = self.block_size
            slots += [s.block_table[p // bs] * bs + p % bs for p in span]
            if i >= len(decodes):
                prefills.append(PrefillSegment(start, length, s.num_computed, s.block_table))
            start += length
        decode = None
        if decodes:
            tables = [s.block_table for s in decodes]
            width = max(map(len, tables))
            tables = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
            seq_lens = torch.tensor([s.num_computed + 1 for s in decodes], dtype=torch.int32)
            decode = DecodeSegment(0, tables, seq_lens)
        context = ForwardContext(
            self.pool, torch.tensor(slots), prefills, decode, self.layers_seen.append
        )
        hidden = self.model.forward(torch.tensor(token_ids), torch.tensor(positions), context)
        logits = self.model.logits(hidden)
        row = 0
        for s, length in work:
            s.logits += list(logits[row : row + length])
            s.num_computed += length
            row += length

    def logits_of(self, sequence):
        return torch.stack(sequence.logits)


def random_tokens(n, vocab_size=101, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(n)]


def tiny_config():
    return load_model_config("tiny")
