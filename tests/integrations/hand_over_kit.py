"""A producer and consumers over real Unix sockets, fake pages and a clock that stands still."""

from __future__ import annotations

from pathlib import Path

from pdrelay.core.clock import FakeClock
from pdrelay.integrations.vllm.consumer import Consumer
from pdrelay.integrations.vllm.fake_pages import FakePages, FakeWorld, fake_layout
from pdrelay.integrations.vllm.producer import Producer
from pdrelay.integrations.vllm.step import Chunk, Load, StepPlan, prompt_digest

LAYERS, BLOCKS, BLOCK_SIZE = 3, 40, 4
LEASE_S, TIMEOUT_S = 10.0, 25.0


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    return [seed * 1000 + i for i in range(num_tokens)]


class Kit:
    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "p.sock")
        self.clock = FakeClock()
        self.world = FakeWorld()
        self.source = FakePages(self.world, fake_layout(LAYERS, BLOCKS, BLOCK_SIZE))
        self.consumers: list[Consumer] = []
        self.targets: list[FakePages] = []
        self.producer = self.new_producer()

    def new_producer(self, **changed) -> Producer:
        settings = {
            "pages": self.source,
            "address": self.address,
            "instance": "p",
            "rank": 0,
            "num_ranks": 1,
            "lease_s": LEASE_S,
            "clock": self.clock,
        }
        return Producer(**{**settings, **changed})

    def new_consumer(self, layout=None, **changed) -> Consumer:
        target = FakePages(self.world, layout or fake_layout(LAYERS, 2 * BLOCKS, BLOCK_SIZE))
        settings = {
            "pages": target,
            "instance": f"d{len(self.consumers)}",
            "rank": 0,
            "num_ranks": 1,
            "lease_s": LEASE_S,
            "load_timeout_s": TIMEOUT_S,
            "clock": self.clock,
        }
        consumer = Consumer(**{**settings, **changed})
        self.consumers.append(consumer)
        self.targets.append(target)
        return consumer

    def pump(self) -> None:
        """Let messages travel until all is quiet."""
        for _ in range(3):
            self.producer.poll()
            for consumer in self.consumers:
                consumer.poll()

    def prefill(
        self,
        request_id: str,
        prompt: list[int],
        blocks: list[int],
        *,
        start: int = 0,
        stop: int | None = None,
        transfer_id: str | None = None,
        between=lambda layer: None,
        **news,
    ) -> None:
        """One step in which P computes tokens start..stop of the prompt, layer by layer.

        A page's value tells layer and first token, so that what D holds can be checked."""
        stop = len(prompt) if stop is None else stop
        chunk = Chunk(
            request_id,
            transfer_id or f"T-{request_id}",
            len(prompt),
            prompt_digest(prompt),
            blocks[: -(-stop // BLOCK_SIZE)],
            stop,
        )
        self.producer.begin_step(StepPlan(chunks=[chunk], **news))
        for layer in range(LAYERS):
            for i in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)):
                self.source.array[layer, blocks[i]] = page_value(prompt, layer, i, stop)
            between(layer)
            self.layer_written(layer)
        self.producer.end_step()

    def layer_written(self, layer: int) -> None:
        """As `ProducerService` does, with one thread."""
        if self.producer.layer_due(layer):
            self.producer.push()

    def hold(self, *request_ids: str) -> None:
        self.producer.begin_step(StepPlan(held=list(request_ids)))

    def load(
        self,
        request_id: str,
        prompt: list[int],
        blocks: list[int],
        *,
        first: int = 0,
        consumer: int = 0,
        transfer_id: str | None = None,
        **news,
    ) -> None:
        """D announces: `blocks` for prompt blocks first.. (all of them)."""
        load = Load(
            request_id,
            transfer_id or f"T-{request_id}",
            self.address,
            first,
            blocks,
            len(prompt),
            [prompt_digest(prompt), prompt_digest(prompt[:-1])],
        )
        self.consumers[consumer].begin_step(StepPlan(loads=[load], **news))

    def arrived(self, prompt: list[int], blocks: list[int], *, first: int = 0, target=0) -> bool:
        """Whether D's blocks hold the prompt's KV."""
        array = self.targets[target].array
        return all(
            array[layer, block] == page_value(prompt, layer, first + i, len(prompt))
            for layer in range(LAYERS)
            for i, block in enumerate(blocks)
        )

    def close(self) -> None:
        self.producer.close()
        for consumer in self.consumers:
            consumer.close()


def page_value(prompt: list[int], layer: int, i: int, stop: int) -> int:
    """Of prompt block i when tokens .. stop are computed."""
    tokens = min(stop, (i + 1) * BLOCK_SIZE) - i * BLOCK_SIZE
    return ((prompt[i * BLOCK_SIZE] + 1) * 10 + layer) * 10 + tokens
