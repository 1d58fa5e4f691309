"""The runner seam: a step is launched, and later read.

    handle = runner.launch(plan, after_layer, remote)     plan's inputs are on their way
    handle.done()                                         whether result() returns at once
    handle.result() -> StepTokens                         waits; called once

A synchronous runner computes in `launch` and its handles are always done. An asynchronous one
returns while a device computes: the loop plans and launches step N+1 before it reads step N, and
a chunk whose input token is still being sampled (`Chunk.token_pending`) takes it on the device.
Steps are launched and read in the same order, at most `depth` of them unread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pdrelay.core.messages import TokenLogprobs
from pdrelay.core.request import Request
from pdrelay.core.scheduler import StepPlan

LayerHook = Callable[[int], None]


@dataclass(frozen=True)
class StepTokens:
    """`token_ids[i]` and `logprobs[i]` belong to sampling chunk i of the plan."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: dict[str, list[TokenLogprobs]]  # of the chunk's tokens but position 0


@dataclass(frozen=True)
class RemoteSlots:
    """A peer's pages that a step's kernels store its K and V into besides the own ones.

    `tensor`: the peer's pool as this rank's device reaches it (`RemotePool.tensor`). `slots`: int64
    [T] in host memory, block * block_size + offset in that pool for each row of the flat batch; -1:
    that row is not for the peer.
    """

    tensor: Any
    slots: npt.NDArray[np.int64]


class StepHandle(Protocol):
    """A launched step."""

    def done(self) -> bool: ...

    def result(self) -> StepTokens: ...


class Runner(Protocol):
    """What the loop needs of a model runner; tests give a fake."""

    @property
    def depth(self) -> int:
        """How many steps may be launched and unread: 1 for a synchronous runner."""

    def launch(
        self, plan: StepPlan, after_layer: LayerHook | None, remote: RemoteSlots | None
    ) -> StepHandle:
        """Start the plan's step. `after_layer(l)` is called when layer l's K and V are written,
        or queued on the device's stream. `remote`: a peer's pages to store into as well."""

    def fileno(self) -> int | None:
        """Readable when a launched step is done; None for a synchronous runner."""

    def drain_news(self) -> None:
        """Make `fileno` unreadable until the next step is done."""

    @property
    def has_idle_work(self) -> bool:
        """Whether `do_idle_work` has something to do."""

    def do_idle_work(self) -> None:
        """Some 10 ms of work that makes later steps faster. Only while no step is unread."""


@dataclass(frozen=True)
class DoneStep:
    """The handle of a synchronous runner."""

    tokens: StepTokens

    def done(self) -> bool:
        return True

    def result(self) -> StepTokens:
        return self.tokens


def needs_host_tokens(request: Request) -> bool:
    """Whether the choice of its next token depends on its earlier output tokens on the host.

    Such a request is planned only when its previous step has been read. Seeds, `min_tokens` and
    `logit_bias` need the token's index alone.
    """
    params = request.params
    return (
        params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.repetition_penalty != 1.0
    )
