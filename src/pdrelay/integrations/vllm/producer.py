"""The producer rank's side: pushes prompts' KV into consumers' blocks while prefill computes it.

This file says when to look and when to push; `transfers.py`, whose a prompt is; `sender.py`, how it
gets there; `links.py`, who is connected.

No thread and no clock of their own. Not thread-safe: `service.py` shares one lock between the
engine's thread and its own. Either may `look` and `poll`; begin_step, layer_due, push, end_step and
take_finished are the engine's. Where launching kernels bounds a prefill, what it does here is time
to the first token: a layer is noted without the lock, and what can be is done once a chunk, when
there is enough to submit.
"""

from __future__ import annotations

from pdrelay.core.clock import Clock
from pdrelay.integrations.vllm.links import Link, Links
from pdrelay.integrations.vllm.pages import Fence, Pages
from pdrelay.integrations.vllm.sender import Outgoing
from pdrelay.integrations.vllm.step import StepPlan
from pdrelay.integrations.vllm.transfers import Transfers

_LOOKS_A_STEP = 8  # by layers, at what consumers say; one takes 2 to 4 µs if it is nothing
_NEVER = 1 << 62


class Producer:
    def __init__(
        self,
        *,
        pages: Pages,
        address: str,
        instance: str,
        rank: int,
        num_ranks: int,
        lease_s: float,
        clock: Clock,
    ) -> None:
        """Listen at `address`. Raises ConfigError when that cannot be."""
        self._pages = pages
        self._links = Links(pages, address, instance, (rank, num_ranks))
        self._transfers = Transfers(pages.layout, self._links, lease_s, clock)
        self._sender = self._transfers.sender
        self.stats = self._sender.stats
        self._num_layers = len(pages.layout.layers)
        self._page_bytes = max(layer.block_bytes for layer in pages.layout.layers)
        self._step: list[Outgoing] = []  # what this step computes
        self._written: dict[int, None] = {}  # layers of this step; engine's thread only
        self._push_stride = 0  # layers between two submissions of this step
        self._push_at = 0  # layers at which the next may be worth it; engine's thread only
        self._look_stride = -(-self._num_layers // _LOOKS_A_STEP)
        self._look_at = 0  # as _push_at
        self._due_at = _NEVER  # layers at which push has something to do

    # ---- the engine's thread

    def begin_step(self, plan: StepPlan) -> None:
        """Apply what the scheduler decided, before the step's forward."""
        if plan.rewound or plan.dropped:
            self._pages.before_overwrite()
        for left in self._step:
            left.progress.abandon_step()  # as a rule there is none: the last step did end
        self._step = []
        for request_id in plan.rewound:
            self._transfers.rewind(request_id)
        for request_id, reason in plan.dropped.items():
            self._transfers.drop(request_id, reason)
        for transfer_id, reason in plan.refused.items():
            self._transfers.refuse(transfer_id, reason)
        for request_id in plan.held:
            self._transfers.hold(request_id)
        self._step = [self._transfers.add(chunk) for chunk in plan.chunks]
        self._written.clear()
        self._push_stride = self._push_at = self._layers_a_push()
        self._look_at = self._look_stride
        self._due_at = self._next_due()

    def layer_due(self, layer: int) -> bool:
        """The step's KV of `layer` is issued; whether `push` should follow. Needs no lock."""
        self._written[layer] = None
        return len(self._written) >= self._due_at

    def push(self) -> None:
        """Look for consumers, and send what the layers written so far complete, to those for whom
        that is worth a submission."""
        written = list(self._written)
        if len(written) >= self._look_at:
            self._look_at = len(written) + self._look_stride
            self.look()
        if len(written) >= self._push_at:
            self._push_at = len(written) + self._push_stride
            due = self._due(len(written))
            if due:
                self._pages.kv_written()
                self._sender.write_all([(out, out.progress.take(written)) for out in due])
        self._due_at = self._next_due()

    def _next_due(self) -> int:
        """After how many of the step's layers `push` should come."""
        due_at = self._look_at if self._sender.closing else _NEVER
        for out in self._step:
            if out.live:
                due_at = min(due_at, self._look_at if out.link is None else self._push_at)
        return due_at

    def end_step(self) -> None:
        """The forward is issued: layers that did not report (graph replay) are written too."""
        if not self._step:
            return
        step, self._step = self._step, []
        self._written.update(dict.fromkeys(range(self._num_layers)))
        written = list(self._written)
        self._pages.kv_written()
        self._sender.write_all([(out, out.progress.end_step(written)) for out in step])

    @property
    def _pages_a_push(self) -> int:
        """Pages of one layer that are worth a submission."""
        return max(1, -(-self._pages.batch_bytes // self._page_bytes))

    def _layers_a_push(self) -> int:
        """After how many layers at the earliest `push` finds something due."""
        num_blocks = sum(out.progress.blocks_a_layer for out in self._step if out.live)
        return -(-self._pages_a_push // max(1, num_blocks))

    def _due(self, num_written: int) -> list[Outgoing]:
        """What the step computes for consumers for whom together there is enough."""
        by_link: dict[Link, list[Outgoing]] = {}
        for out in self._step:
            if out.live and out.link is not None:
                by_link.setdefault(out.link, []).append(out)
        return [
            out
            for outs in by_link.values()
            if sum(out.progress.num_due(num_written) for out in outs) >= self._pages_a_push
            for out in outs
        ]

    @property
    def has_finished(self) -> bool:
        return bool(self._transfers.finished)

    def take_finished(self) -> set[str]:
        """Held requests whose blocks are free to go, each once."""
        finished, self._transfers.finished = self._transfers.finished, set()
        return finished

    # ---- whoever attends

    def fileno(self) -> int:
        """Readable when consumers have something to say; until `close`."""
        return self._links.inbox.fileno()

    def open_fences(self) -> list[Fence]:
        return [out.fence for out in self._sender.closing if out.fence is not None]

    def next_deadline_ns(self) -> int | None:
        return self._transfers.next_deadline_ns()

    def look(self) -> None:
        """Read what consumers say, tell them what has landed. Never blocks."""
        if self._transfers.abandoned:
            return
        ready = self._links.inbox.ready()
        if not ready and not self._sender.closing:
            return
        for fd in ready:
            self._links.read(fd, self._transfers.on_message)
        self._sender.end_landed()
        self._due_at = self._next_due()

    def poll(self) -> None:
        """`look`, enforce leases, and let go of consumers that are gone. Never blocks."""
        if self._transfers.abandoned:
            return
        self.look()
        self._transfers.expire()
        for link in list(self._links.all):
            self._links.watch(link)
            if link.channel.closed and self._transfers.lose(link):
                self._links.let_go(link)

    def close(self) -> None:
        """Stop handing over: consumers see the sockets end, held blocks are freed."""
        if not self._transfers.abandoned:
            self._transfers.abandon()
            self._links.close()
