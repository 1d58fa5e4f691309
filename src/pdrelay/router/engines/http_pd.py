"""One request on two HTTP engines: who is asked what, and how their tokens become one stream.

    nixl       vLLM: the producer, then the consumer with what the producer answered
    pdrelay    vLLM: one transfer id to both, one after the other or at the same time
    sglang     one body with one bootstrap room to both, at the same time

vLLM's first token comes from the producer's answer and is streamed at once. What the consumer is
asked for is one of two seams:

    continue   it gets the prompt and token 1, and gives tokens 2..
    resample   it gets the prompt, and gives tokens 1..; its token 1 is dropped when it is the
               producer's, as it is for equal logits and noise. Where rounding made it another, the
               consumer is asked again, to continue after the producer's.

`continue` is right for all sampling parameters but presence and frequency penalties, which count
output tokens; `resample` is right for these too, and the only one that lets both start at once.
SGLang's producer answers when its KV has moved, and hands token 1 over with it: all tokens come
from its consumer, with how many of the prompt's the producer had cached; the prompt's
log-probabilities are in the producer's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import cached_property
from typing import Any, Protocol

from pdrelay.core.endpoint import Dispatch, HttpEndpoint
from pdrelay.core.messages import EngineRequest
from pdrelay.errors import WorkerLostError
from pdrelay.router.engines.piece import Leg, Piece, prompt_json

_log = logging.getLogger(__name__)
_NIXL_PRODUCER: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

Work = Callable[[], Awaitable[None]]


class Caller(Protocol):
    """An instance, as a hand-over uses it (`HttpEngineClient`)."""

    @property
    def instance(self) -> str: ...

    @property
    def endpoint(self) -> HttpEndpoint: ...

    async def once(self, request: EngineRequest, leg: Leg) -> Piece: ...

    def stream(self, request: EngineRequest, leg: Leg) -> AsyncGenerator[Piece, None]: ...

    def emit(self, request_id: str, piece: Piece) -> None: ...


class HandOver:
    """What the two legs of a request share; it lives as long as one of them does.

    `transfer_id` and `room` are drawn here: nobody outside can guess another request's.
    """

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self._producer: Caller | None = None
        self.begun = asyncio.Event()  # the producer's leg
        self.transfer_id = secrets.token_hex(16)
        self.room = secrets.randbits(62)
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[Piece] = loop.create_future()  # token 1
        self.produced: asyncio.Future[Piece] = loop.create_future()  # SGLang's producer's answer

    @cached_property
    def prompt_json(self) -> bytes:
        """The prompt as both legs send it."""
        return prompt_json(self.request)

    @property
    def producer(self) -> Caller:
        assert self._producer is not None, "no leg runs before both are known"
        return self._producer

    @producer.setter
    def producer(self, producer: Caller) -> None:
        assert self._producer is None
        self._producer = producer


class Style(Protocol):
    """What two instances of one engine, with one connector, are asked."""

    async def produce(self, hand_over: HandOver) -> None: ...

    async def consume(self, hand_over: HandOver, consumer: Caller) -> None: ...


class HandOvers:
    """Joins the flow's two messages, `Expect` and `Prefill`, into one hand-over.

    In either order, but the producer's leg begins first: everyone waits for its prefill. A
    consumer's leg whose producer never gets a message waits until the flow aborts it.
    """

    def __init__(self, style: Style) -> None:
        self._style = style
        self._running: weakref.WeakValueDictionary[str, HandOver] = weakref.WeakValueDictionary()

    def produce(self, request: EngineRequest, producer: Caller) -> Work:
        hand_over = self._of(request)
        hand_over.producer = producer
        return functools.partial(self._produce, hand_over)

    def consume(self, request: EngineRequest, consumer: Caller) -> Work:
        return functools.partial(self._consume, self._of(request), consumer)

    def _of(self, request: EngineRequest) -> HandOver:
        hand_over = self._running.get(request.request_id)
        if hand_over is None:
            hand_over = self._running[request.request_id] = HandOver(request)
        return hand_over

    async def _produce(self, hand_over: HandOver) -> None:
        hand_over.begun.set()
        await self._style.produce(hand_over)

    async def _consume(self, hand_over: HandOver, consumer: Caller) -> None:
        await hand_over.begun.wait()
        await self._style.consume(hand_over, consumer)


# ---- vLLM


class VllmStyle:
    """The producer samples token 1; subclasses say how the consumer finds the KV."""

    def starts_both(self, hand_over: HandOver) -> bool:
        """Whether the consumer is asked before the producer has answered."""
        return False

    def resamples(self, hand_over: HandOver) -> bool:
        """The seam: `resample` or `continue`."""
        raise NotImplementedError

    def producer_params(self, hand_over: HandOver) -> dict[str, Any]:
        raise NotImplementedError

    def consumer_params(
        self, hand_over: HandOver, answered: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """`answered`: the producer's kv_transfer_params, None before or without an answer."""
        raise NotImplementedError

    async def produce(self, hand_over: HandOver) -> None:
        request, producer = hand_over.request, hand_over.producer
        alone = request.params.max_tokens == 1  # nothing is left for the consumer
        leg = Leg(
            max_tokens=1,
            min_tokens=min(request.params.min_tokens, 1),
            stream=False,
            prompt_json=hand_over.prompt_json,
            needs_seed=not alone and self.resamples(hand_over),
            kv_transfer_params=None if alone else self.producer_params(hand_over),
        )
        first = await producer.once(request, leg)
        if len(first.token_ids) != 1:
            raise ValueError(f"{len(first.token_ids)} tokens where one was asked for")
        if first.finish_reason == "length" and not alone:
            first.finish_reason = None
        producer.emit(request.request_id, first)
        hand_over.first.set_result(first)

    async def consume(self, hand_over: HandOver, consumer: Caller) -> None:
        request = hand_over.request
        if request.params.max_tokens == 1:
            return
        answered = None
        if not self.starts_both(hand_over):
            first = await hand_over.first
            if first.finish_reason is not None:
                return
            answered = first.kv_transfer_params
        kv = self.consumer_params(hand_over, answered)
        if self.resamples(hand_over):
            if await self._resample(hand_over, consumer, kv):
                return
            _log.info("%s: token 1 differs; %s continues", request.request_id, consumer.instance)
            kv = None
        await self._continue(hand_over, consumer, kv)

    async def _resample(
        self, hand_over: HandOver, consumer: Caller, kv: dict[str, Any] | None
    ) -> bool:
        """Whether the consumer's token 1 was the producer's, and the rest is relayed."""
        request = hand_over.request
        leg = Leg(
            max_tokens=request.params.max_tokens,
            min_tokens=request.params.min_tokens,
            prompt_json=hand_over.prompt_json,
            needs_seed=True,
            wants_prompt_logprobs=False,
            kv_transfer_params=kv,
        )
        joined = False
        async with contextlib.aclosing(consumer.stream(request, leg)) as pieces:
            async for piece in pieces:
                if not joined:
                    first = await hand_over.first
                    if piece.token_ids[:1] != first.token_ids:
                        return False
                    joined = True
                    piece = piece.without_first()
                if piece.token_ids or piece.finish_reason is not None:
                    consumer.emit(request.request_id, piece)
        return True

    async def _continue(
        self, hand_over: HandOver, consumer: Caller, kv: dict[str, Any] | None
    ) -> None:
        request = hand_over.request
        first = await hand_over.first
        leg = Leg(
            max_tokens=request.params.max_tokens - 1,
            min_tokens=max(request.params.min_tokens - 1, 0),
            prompt_json=hand_over.prompt_json,
            more_prompt=tuple(first.token_ids),
            wants_prompt_logprobs=False,
            kv_transfer_params=kv,
        )
        async with contextlib.aclosing(consumer.stream(request, leg)) as pieces:
            async for piece in pieces:
                consumer.emit(request.request_id, piece)


class NixlStyle(VllmStyle):
    """NixlConnector: the consumer's prompt must be the producer's, block for block."""

    def resamples(self, hand_over: HandOver) -> bool:
        return True

    def producer_params(self, hand_over: HandOver) -> dict[str, Any]:
        return _NIXL_PRODUCER

    def consumer_params(
        self, hand_over: HandOver, answered: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        if answered is None:
            raise WorkerLostError(
                f"{hand_over.producer.instance} answered without kv_transfer_params: is it started "
                "with NixlConnector?"
            )
        return answered


class PdrelayStyle(VllmStyle):
    """PdrelayConnector: producer and consumer meet by transfer id, whoever comes first."""

    def __init__(self, dispatch: Dispatch = "auto") -> None:
        self._dispatch = dispatch

    def starts_both(self, hand_over: HandOver) -> bool:
        """With "auto": where both draw the same token 1 for sure, or have to resample anyway.

        Never when only the producer's answer tells where it is.
        """
        if not hand_over.producer.endpoint.producer_address:
            return False
        if self._dispatch == "auto":
            return hand_over.request.params.greedy or _counts_output(hand_over.request)
        return self._dispatch == "concurrent"

    def resamples(self, hand_over: HandOver) -> bool:
        return self.starts_both(hand_over) or _counts_output(hand_over.request)

    def producer_params(self, hand_over: HandOver) -> dict[str, Any]:
        return {"pdrelay_transfer_id": hand_over.transfer_id, "do_remote_decode": True}

    def consumer_params(
        self, hand_over: HandOver, answered: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        known = hand_over.producer.endpoint.producer_address
        address = known or (answered or {}).get("pdrelay_producer")
        if not address:
            raise WorkerLostError(
                f"{hand_over.producer.instance} did not say where it is: is it started with "
                "PdrelayConnector?"
            )
        return {
            "pdrelay_transfer_id": hand_over.transfer_id,
            "do_remote_prefill": True,
            "pdrelay_producer": address,
        }


def _counts_output(request: EngineRequest) -> bool:
    params = request.params
    return bool(params.presence_penalty or params.frequency_penalty)


# ---- SGLang


class SglangStyle:
    """Both legs start at once; the consumer gives every token."""

    def _leg(self, hand_over: HandOver, *, stream: bool) -> Leg:
        endpoint, params = hand_over.producer.endpoint, hand_over.request.params
        return Leg(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stream=stream,
            prompt_json=hand_over.prompt_json,
            needs_seed=True,
            bootstrap=(endpoint.bootstrap_host, endpoint.bootstrap_port, hand_over.room),
        )

    async def produce(self, hand_over: HandOver) -> None:
        """Its answer says that the KV has moved."""
        request, producer = hand_over.request, hand_over.producer
        try:
            answer = await producer.once(request, self._leg(hand_over, stream=False))
        except Exception:
            if not hand_over.first.done():
                raise
            _log.info("%s: the producer failed late", request.request_id, exc_info=True)
        else:
            hand_over.produced.set_result(answer)

    async def consume(self, hand_over: HandOver, consumer: Caller) -> None:
        request_id = hand_over.request.request_id
        leg = self._leg(hand_over, stream=True)
        async with contextlib.aclosing(consumer.stream(hand_over.request, leg)) as pieces:
            async for piece in pieces:
                if hand_over.first.done():
                    consumer.emit(request_id, piece)
                    continue
                if hand_over.request.params.prompt_logprobs is not None:
                    piece.prompt_logprobs = (await hand_over.produced).prompt_logprobs
                # Token 1 is the producer's, whoever told it.
                hand_over.first.set_result(piece)
                first, rest = piece.split_first()
                hand_over.producer.emit(request_id, first)
                if rest is not None:
                    consumer.emit(request_id, rest)
