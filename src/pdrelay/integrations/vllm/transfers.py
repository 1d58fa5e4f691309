"""Which request is which transfer and who gets it: what the scheduler and the consumers say of it,
in any order, and how long one side is kept waiting for the other."""

from __future__ import annotations

import logging

from pdrelay.core.clock import Clock
from pdrelay.integrations.vllm.links import Early, Link, Links
from pdrelay.integrations.vllm.messages import Announce, Ask, Cancel, Closed, Done, Failed
from pdrelay.integrations.vllm.page_layout import PageLayout
from pdrelay.integrations.vllm.progress import Progress
from pdrelay.integrations.vllm.sender import Outgoing, Sender
from pdrelay.integrations.vllm.step import Chunk

_log = logging.getLogger(__name__)

_MAX_ENDED = 4096  # transfers whose end is remembered for a late consumer


class Transfers:
    def __init__(self, layout: PageLayout, links: Links, lease_s: float, clock: Clock) -> None:
        self._layout = layout
        self._links = links
        self._lease_ns = int(lease_s * 1e9)
        self._clock = clock
        self.sender = Sender(layout, links, clock, self._on_ended)
        self._by_request: dict[str, Outgoing] = {}
        self._by_transfer: dict[str, Outgoing] = {}
        self._ended: dict[str, str] = {}  # transfer -> why nothing comes of it
        self.finished: set[str] = set()  # held requests whose blocks are free to go
        self.abandoned = False

    # ---- what the scheduler says

    def rewind(self, request_id: str) -> None:
        outgoing = self._by_request.get(request_id)
        if outgoing is not None:
            outgoing.progress.rewind()
            outgoing.blocks = []

    def drop(self, request_id: str, reason: str) -> None:
        outgoing = self._by_request.pop(request_id, None)
        if outgoing is not None:
            self.sender.give_up(outgoing, reason)

    def refuse(self, transfer_id: str, reason: str) -> None:
        """There will be no prefill of this transfer."""
        if transfer_id in self._by_transfer or transfer_id in self._ended:
            return
        self._remember(transfer_id, reason)
        for link in self._links.all:
            if link.early.pop(transfer_id, None) is not None:
                link.channel.send(Failed(transfer_id, reason))

    def hold(self, request_id: str) -> None:
        outgoing = self._by_request.get(request_id)
        if outgoing is None:
            self.finished.add(request_id)  # it was given up before
            return
        outgoing.held = True
        outgoing.lease_end_ns = self._clock() + self._lease_ns
        if outgoing.ended:
            self._free(outgoing)
        elif outgoing.verdict is None and not outgoing.progress.all_ready:
            self.sender.give_up(outgoing, "the producer preempted it after its prefill")

    def add(self, chunk: Chunk) -> Outgoing:
        outgoing = self._by_request.get(chunk.request_id)
        if outgoing is None:
            outgoing = self._begin(chunk)
        outgoing.blocks, outgoing.pairs = chunk.blocks, None
        progress = outgoing.progress
        last = chunk.num_ready >= outgoing.num_tokens
        complete = chunk.num_ready // self._layout.block_size
        progress.begin_step(progress.num_blocks if last else complete)
        return outgoing

    def _begin(self, chunk: Chunk) -> Outgoing:
        layout = self._layout
        num_blocks = -(-chunk.num_tokens // layout.block_size)
        outgoing = Outgoing(
            chunk.request_id,
            chunk.transfer_id,
            chunk.num_tokens,
            chunk.digest,
            Progress(len(layout.layers), num_blocks),
        )
        self._by_request[chunk.request_id] = outgoing
        if self.abandoned:
            outgoing.ended = True
            return outgoing
        if chunk.transfer_id in self._by_transfer or chunk.transfer_id in self._ended:
            _log.warning("transfer id %s was used before: not handed over", chunk.transfer_id)
            outgoing.ended = True
            return outgoing
        self._by_transfer[chunk.transfer_id] = outgoing
        for link in self._links.all:
            early = link.early.pop(chunk.transfer_id, None)
            if early is not None:
                self._match(outgoing, link, early.announce)
        return outgoing

    # ---- what consumers say

    def on_message(self, link: Link, message: Ask | Announce | Cancel) -> None:
        match message:
            case Ask(transfer_id):
                self._on_ask(link, transfer_id)
            case Announce():
                self._on_announce(link, message)
            case Cancel(transfer_id):
                self._on_cancel(link, transfer_id)

    def _on_ask(self, link: Link, transfer_id: str) -> None:
        deadline_ns = self._clock() + self._lease_ns
        outgoing = self._by_transfer.get(transfer_id)
        if outgoing is not None:
            outgoing.lease_end_ns = deadline_ns
        early = link.early.get(transfer_id)
        if early is not None:
            early.deadline_ns = deadline_ns

    def _on_announce(self, link: Link, announce: Announce) -> None:
        outgoing = self._by_transfer.get(announce.transfer_id)
        ended = self._ended.get(announce.transfer_id)
        if outgoing is not None and outgoing.verdict is None:
            self._match(outgoing, link, announce)
        elif ended is not None or outgoing is not None:
            link.channel.send(Failed(announce.transfer_id, ended or "the producer gave it up"))
        else:
            deadline_ns = self._clock() + self._lease_ns
            link.early[announce.transfer_id] = Early(announce, deadline_ns)

    def _on_cancel(self, link: Link, transfer_id: str) -> None:
        link.early.pop(transfer_id, None)
        outgoing = self._by_transfer.get(transfer_id)
        if outgoing is None:
            # Its prefill may be yet to come: then it need not be kept.
            self._remember(transfer_id, self._ended.get(transfer_id, "it was cancelled"))
        elif outgoing.link in (None, link):
            if outgoing.verdict is None:
                outgoing.link = link
                self.sender.conclude(outgoing, Closed(transfer_id))
            return  # else its verdict is on the way, which answers as well
        link.channel.send(Closed(transfer_id))

    def lose(self, link: Link) -> bool:
        """A consumer is gone: its transfers end. Whether all that was stored into its memory has
        landed: until then its pages stay open."""
        for outgoing in [out for out in self._by_request.values() if out.link is link]:
            self.sender.give_up(outgoing, "the consumer is gone")
        return all(out.link is not link for out in self.sender.closing)

    def _match(self, outgoing: Outgoing, link: Link, announce: Announce) -> None:
        reason = self._mismatch(outgoing, link, announce)
        if reason:
            link.channel.send(Failed(announce.transfer_id, reason))
            return
        if not self._links.open(link):
            return
        outgoing.link = link
        progress = outgoing.progress
        first = min(announce.first_block, progress.num_blocks)
        progress.announce(first, announce.blocks[: progress.num_blocks - first])
        if not progress.in_step:  # else the step writes it, as it knows what is ready
            self.sender.write_all([(outgoing, progress.take_rest())])

    def _mismatch(self, outgoing: Outgoing, link: Link, announce: Announce) -> str:
        """Why `announce` cannot have the prompt's KV; empty if it can."""
        if outgoing.link is not None:
            return "another consumer has it"
        ahead = announce.num_tokens - outgoing.num_tokens
        if not 0 <= ahead < len(announce.digests) or announce.digests[ahead] != outgoing.digest:
            return "the prompts at producer and consumer differ"
        num_blocks = -(-announce.num_tokens // self._layout.block_size)
        if announce.first_block < 0 or announce.first_block + len(announce.blocks) != num_blocks:
            return "the announced blocks do not fit the prompt"
        assert link.hello is not None
        end = link.hello.layout.num_blocks
        if announce.blocks and not 0 <= min(announce.blocks) <= max(announce.blocks) < end:
            return "an announced block does not exist"
        return ""

    # ---- leases and ends

    def next_deadline_ns(self) -> int | None:
        ends = [out.lease_end_ns for out in self._by_request.values() if out.on_lease]
        ends += [early.deadline_ns for link in self._links.all for early in link.early.values()]
        return min(ends, default=None)

    def expire(self) -> None:
        now_ns = self._clock()
        for outgoing in list(self._by_request.values()):
            if outgoing.on_lease and now_ns >= outgoing.lease_end_ns:
                self.sender.stats.num_expired += 1
                _log.warning("nobody asked for transfer %s: freed", outgoing.transfer_id)
                self.sender.give_up(outgoing, "the producer's lease has ended: nobody asked for it")
        for link in self._links.all:
            for transfer_id, early in list(link.early.items()):
                if now_ns >= early.deadline_ns:
                    del link.early[transfer_id]
                    reason = "the producer got no such request"
                    link.channel.send(Failed(transfer_id, reason))

    def abandon(self) -> None:
        """Wait for what was stored, and free all blocks: nobody is told."""
        self.abandoned = True
        outgoings = [*self._by_request.values(), *self.sender.closing]
        for outgoing in outgoings:
            if outgoing.fence is not None:
                outgoing.fence.wait()
            elif outgoing.link is not None and outgoing.link.writer is not None:
                outgoing.link.writer.fence().wait()
        self.sender.closing.clear()
        for outgoing in outgoings:
            outgoing.ended, outgoing.link = True, None
            self._free(outgoing)

    def _on_ended(self, outgoing: Outgoing) -> None:
        transfer_id, verdict = outgoing.transfer_id, outgoing.verdict
        if self._by_transfer.get(transfer_id) is outgoing:
            del self._by_transfer[transfer_id]
        if isinstance(verdict, Done):
            self._remember(transfer_id, "it was handed over before")
        else:
            self._remember(transfer_id, getattr(verdict, "reason", "it was cancelled"))
        self._free(outgoing)

    def _remember(self, transfer_id: str, reason: str) -> None:
        self._ended[transfer_id] = reason
        while len(self._ended) > _MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def _free(self, outgoing: Outgoing) -> None:
        """Its blocks are not needed any more."""
        if outgoing.held and self._by_request.pop(outgoing.request_id, None) is not None:
            self.finished.add(outgoing.request_id)
