"""What hand-overs cost the decode side alone: the lab, over a prefill that computes nothing.

    python benchmarks/paced_prefill.py --quick --topologies pd:1:1 --cases idle,interference \\
        --out runs/paced
    ... the same and --model llama-3.1-8b --device cuda --kv-cache-memory 16GiB \\
        --allow-oversubscribe

Takes the lab's options; topologies must be native P/D. Front door, hand-over protocol, scheduler
and the whole decode side are real. A prefill rank has a clock in the place of its model: a step
ends as long after the one before it as its chunks take an H200 (`PREFILL_MS`), token 1 is made up,
and what the step's kernels would store into D's pages counts as stored. So P and D share one GPU
(or two cores) without slowing each other down, and what D's streams lose is the hand-over's. D
computes its checksums and believes every page; `--verify off`, before the lab's options, leaves
them out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.scheduler import Chunk, StepPlan
from pdrelay.engine.step import LayerHook, RemoteSlots, StepTokens
from pdrelay.transport.checksum import KnownChecksum, PendingChecksum, PreparedChecksum

# By tokens of a prompt, interpolated: one replica's idle TTFT less what is not the GPU's
# (docs/results/2026-11-30-h200x2).
PREFILL_MS = {0: 5.0, 128: 6.0, 512: 12.3, 1024: 23.0, 2048: 45.7, 4096: 97.5, 8192: 211.0}
MADE_UP_TOKEN = 5
PROGRAM = (sys.executable, str(Path(__file__).resolve()))
SERVER, RANK = "server", "rank"  # what this file is started as again, with the value of --verify


def prefill_ms(num_tokens: int) -> float:
    return float(np.interp(num_tokens, list(PREFILL_MS), list(PREFILL_MS.values())))


def step_ns(chunks: Sequence[Chunk]) -> int:
    """A step's weights once, and what each chunk adds to its prompt's prefill."""
    more = (prefill_ms(one.start + one.length) - prefill_ms(one.start) for one in chunks)
    return int(1e6 * (PREFILL_MS[0] + sum(more)))


class PacedStep:
    """Done at its time."""

    def __init__(self, end_ns: int, num_sampled: int) -> None:
        self._end_ns = end_ns
        self._num_sampled = num_sampled

    def done(self) -> bool:
        return monotonic_ns() >= self._end_ns

    def result(self) -> StepTokens:
        assert self.done(), "the loop asks first"
        return StepTokens([MADE_UP_TOKEN] * self._num_sampled, [None] * self._num_sampled, {})


class PacedRunner:
    """The runner seam over a clock: as many steps in flight as on a GPU."""

    depth = 2
    has_idle_work = False

    def __init__(self, num_layers: int) -> None:
        self.broadcast: Any = None
        self.check: Callable[[], None] | None = None
        self._num_layers = num_layers
        self._end_ns = 0  # of the last step

    def launch(
        self, plan: StepPlan, after_layer: LayerHook | None, remote: RemoteSlots | None
    ) -> PacedStep:
        self._end_ns = max(monotonic_ns(), self._end_ns) + step_ns(plan.chunks)
        if after_layer is not None:
            for layer in range(self._num_layers):
                after_layer(layer)
        return PacedStep(self._end_ns, sum(chunk.samples for chunk in plan.chunks))

    def fileno(self) -> int | None:
        return None

    def drain_news(self) -> None:
        pass

    def do_idle_work(self) -> None:
        raise AssertionError("there is none")

    def pool_opened(self, pool: Any) -> None:
        pass

    def pool_closed(self, pool: Any) -> None:
        pass


class PacedEngine:
    """In the place of `CudaEngine`."""

    def __init__(self, runner: PacedRunner) -> None:
        self.runner = runner


@dataclass(frozen=True)
class Believed:
    """A checksum that is computed, and right."""

    prepared: PreparedChecksum

    def begin(self) -> BelievedPending:
        return BelievedPending(self.prepared.begin())


@dataclass(frozen=True)
class BelievedPending:
    computed: PendingChecksum

    def done(self) -> bool:
        return self.computed.done()

    def result(self) -> int:
        self.computed.result()
        return 0


def believe_pages() -> None:
    """Make this process's rank take pages that nobody wrote."""
    from pdrelay.engine import worker

    prepare = worker.prepare_checksum
    worker.prepare_checksum = lambda *args, **kwargs: Believed(prepare(*args, **kwargs))


def without_a_model() -> None:
    """Make this process's rank one over a clock."""
    from pdrelay.engine import worker

    nothing: Any = lambda *args, **kwargs: None  # noqa: E731
    replaced: dict[str, Any] = {
        "build_model": nothing,
        "prepare_backend": nothing,
        "warm_up": nothing,
        "prepare_checksum": lambda *args, **kwargs: KnownChecksum(0),
        "build_engine": lambda model, pool, *rest: PacedEngine(PacedRunner(pool.shape[0])),
        "ModelRunner": lambda model, pool, *rest: PacedRunner(pool.shape[0]),
    }
    for name, stand_in in replaced.items():
        assert hasattr(worker, name)
        setattr(worker, name, stand_in)


def rank_main(name: str) -> int:
    from pdrelay.engine import worker

    if name.startswith("prefill"):
        without_a_model()
    else:
        believe_pages()
    return worker.main()


def server_main(verify: str, argv: Sequence[str]) -> int:
    import pdrelay.serve
    from pdrelay.cli import main

    pdrelay.serve.run_server = partial(pdrelay.serve.run_server, command=(*PROGRAM, RANK))
    return main([*argv, "--kv-transfer-verify", verify])


def lab_main(verify: str, argv: Sequence[str]) -> int:
    import pdrelay.lab.server
    from pdrelay.cli import main

    launcher = partial(pdrelay.lab.server.ChildLauncher, command=(*PROGRAM, SERVER, verify))
    pdrelay.lab.server.ChildLauncher = launcher  # type: ignore[assignment,misc]
    return main(["lab", *argv])


def main() -> int:
    match sys.argv[1:]:
        case [kind, name] if kind == RANK:
            return rank_main(name)
        case [kind, verify, *rest] if kind == SERVER:
            return server_main(verify, rest)
        case ["--verify", verify, *rest]:
            return lab_main(verify, rest)
        case rest:
            return lab_main("sample", rest)


if __name__ == "__main__":
    sys.exit(main())
