"""CUDA graphs of one short fresh prompt, padded to a bucket: about 290 launches become one.

A short prompt's kernels take less time than the host needs to launch them. Its padding rows lie
behind it: causal attention gives them nothing to change, and with slots -1 they store nothing. The
row whose logits are wanted is an input on the device.

A graph that also stores into a peer's pages has the address of that peer's pool in it, so each
peer has graphs of its own. They are reached by the pool's tensor alone, the one that the step's
caller hands over, which is what kernels launched one by one would store into as well. They are
captured between steps (`capture_next`), and `close_pool` forgets them before the mapping is
closed: no later call finds them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from pdrelay.engine.accelerator import Accelerator
from pdrelay.engine.attention.context import ForwardContext, PrefillSegment
from pdrelay.engine.kernels.gpu import GpuKernels
from pdrelay.engine.models.registry import CausalLM
from pdrelay.engine.remote_store import RemoteStore
from pdrelay.engine.step_input import Prefill, StepHeader

# From 1,024 rows on (8B parameters, one H200) the device needs longer than the launches. GEMM time
# grows in steps of about 128 rows; below that the weights' reading is nearly all of it.
_SIZES = (32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)


def prefill_buckets(max_rows: int) -> tuple[int, ...]:
    """Ascending; the last is `max_rows`, or the longest that is worth a graph."""
    assert max_rows > 0
    longest = min(max_rows, _SIZES[-1])
    return (*(size for size in _SIZES if size < longest), longest)


def prefill_header(bucket: int, *, has_remote: bool) -> StepHeader:
    """The header of a graph step as far as it fixes where its inputs lie."""
    return StepHeader(
        rows=bucket,
        num_decodes=0,
        table_width=0,
        prefills=(Prefill(0, bucket, 0, 0),),
        num_logits=1,
        is_graph=True,
        greedy=True,
        num_draws=0,
        truncates=False,
        has_min_p=False,
        has_remote=has_remote,
    )


@dataclass(frozen=True)
class StepBuffers:
    """The device's static buffers, int64. `words`: sampled tokens, then `uploaded`."""

    words: torch.Tensor
    uploaded: torch.Tensor
    sampled: torch.Tensor
    first_host_token: int


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], None]
    results: list[torch.Tensor]  # one: logits [1, vocab], valid until the next graph


@dataclass
class _Graphs:
    """Of one pool, or of none."""

    pool: torch.Tensor | None
    graphs: dict[int, _Graph] = field(default_factory=dict)  # by bucket
    missing: list[int] = field(default_factory=list)  # the next to capture last


class PrefillGraphs:
    def __init__(
        self,
        model: CausalLM,
        kv_pool: torch.Tensor,
        accelerator: Accelerator,
        buffers: StepBuffers,
        max_rows: int,
    ) -> None:
        assert model.backend.kernels is not None
        self._model = model
        self._kernels: GpuKernels = model.backend.kernels
        self._kv_pool = kv_pool
        self._accelerator = accelerator
        self._buffers = buffers
        self.buckets = prefill_buckets(max_rows)
        self.in_use = True  # False: as if there were none, to compare with
        self._own = _Graphs(None)
        # By id of the pool, which is kept alive here: no other object can have that id.
        self._of_pool: dict[int, _Graphs] = {}
        self._retired: list[_Graphs] = []  # may still run on the device

    # ---- which there are

    def bucket_of(self, num_rows: int, pool: torch.Tensor | None) -> int | None:
        """Rows that a prompt of `num_rows` is padded to; None where no graph is meant to run it.

        While a peer's graph is not captured yet, the same rows are launched one kernel at a time:
        a result's bits must not depend on when a peer came.
        """
        index = bisect_left(self.buckets, num_rows)
        graphs = self._graphs_of(pool)
        if index == len(self.buckets) or graphs is None or not self.in_use:
            return None
        bucket = self.buckets[index]
        return bucket if pool is not None or bucket in graphs.graphs else None

    def _graphs_of(self, pool: torch.Tensor | None) -> _Graphs | None:
        return self._own if pool is None else self._of_pool.get(id(pool))

    def open_pool(self, pool: torch.Tensor) -> None:
        """Steps will store into `pool`, too, until `close_pool`."""
        assert id(pool) not in self._of_pool
        self._of_pool[id(pool)] = _Graphs(pool, missing=list(reversed(self.buckets)))

    def close_pool(self, pool: torch.Tensor) -> None:
        """No step will store into `pool` again. Steps that do may still be on the device."""
        graphs = self._of_pool.pop(id(pool), None)
        if graphs is not None:
            self._retired.append(graphs)

    # ---- capturing

    def capture_own(self) -> None:
        """Largest first: the smaller ones fit into its memory."""
        for bucket in reversed(self.buckets):
            self._capture(self._own, bucket)

    @property
    def due(self) -> bool:
        """Whether `capture_next` has something to do."""
        return bool(self._retired) or any(graphs.missing for graphs in self._of_pool.values())

    def capture_next(self) -> None:
        """One graph for some peer's pool, some 10 ms. Only while no step is launched and unread."""
        self._retired.clear()
        for graphs in self._of_pool.values():
            if graphs.missing:
                self._capture(graphs, graphs.missing.pop())
                return

    def _capture(self, graphs: _Graphs, bucket: int) -> None:
        self._load_padding(bucket, has_remote=graphs.pool is not None)
        self._forward(bucket, graphs.pool)  # compiles, builds plans, picks algorithms
        self._accelerator.synchronize()
        results: list[torch.Tensor] = []
        replay = self._accelerator.capture(
            partial(self._forward_into, bucket, graphs.pool, results)
        )
        if not results:  # a device without graphs
            self._forward_into(bucket, graphs.pool, results)
        graphs.graphs[bucket] = _Graph(replay, results)

    def _load_padding(self, bucket: int, *, has_remote: bool) -> None:
        """Inputs of a step of padding rows alone."""
        at = prefill_header(bucket, has_remote=has_remote).words()
        uploaded = self._buffers.uploaded
        uploaded[: at.end] = 0
        uploaded[at.sources : at.positions] = self._buffers.first_host_token
        uploaded[at.slots : at.seq_lens] = -1
        uploaded[at.remote : at.draws] = -1

    # ---- running

    def run(self, bucket: int, pool: torch.Tensor | None, *, replays: bool = True) -> torch.Tensor:
        """Queue the step whose inputs are uploaded. Its argmax goes to `sampled[0]`; returns
        logits [1, vocab], valid until the next graph."""
        if not replays:
            return self._forward(bucket, pool)
        graphs = self._graphs_of(pool)
        assert graphs is not None and graphs.pool is pool, "a pool that is not open"
        graph = graphs.graphs.get(bucket)
        if graph is None:
            return self._forward(bucket, pool)
        graph.replay()
        return graph.results[0]

    def _forward_into(
        self, bucket: int, pool: torch.Tensor | None, results: list[torch.Tensor]
    ) -> None:
        results[:] = [self._forward(bucket, pool)]

    def _forward(self, bucket: int, pool: torch.Tensor | None) -> torch.Tensor:
        """Forward, logits and argmax of one prompt, from and to static addresses."""
        buffers, uploaded = self._buffers, self._buffers.uploaded
        at = prefill_header(bucket, has_remote=pool is not None).words()
        remote = None
        if pool is not None:
            remote = RemoteStore(pool, uploaded[at.remote : at.remote + bucket])
        context = ForwardContext(
            kv_pool=self._kv_pool,
            slot_mapping=uploaded[at.slots : at.slots + bucket],
            prefills=[PrefillSegment(0, bucket, 0, ())],
            remote=remote,
            tables=(),
        )
        hidden = self._model.forward(
            buffers.words.index_select(0, uploaded[at.sources : at.sources + bucket]),
            uploaded[at.positions : at.positions + bucket],
            context,
        )
        last = hidden.index_select(0, uploaded[at.logits_rows : at.logits_rows + 1])
        logits = self._model.raw_logits(last)
        self._kernels.argmax_rows(logits, buffers.sampled[:1])
        return logits
