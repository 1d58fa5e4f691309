"""Instances that were started elsewhere: reached, watched, never started or ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import Ready
from pdrelay.errors import LaunchError
from pdrelay.launch.topology import InstanceSpec


class AttachedInstance:
    """What the front door reports to, and the ready file reads, as of a launched instance."""

    def __init__(
        self, spec: InstanceSpec, endpoint: HttpEndpoint, on_ready: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.endpoint = endpoint
        self.ready: Ready | None = None
        self.last_alive_s = time.monotonic()
        self.pids: list[int] = []
        self._on_ready = on_ready

    @property
    def instance(self) -> str:
        return self.spec.instance

    def report_ready(self, ready: Ready) -> None:
        self.ready = ready
        self._on_ready()

    def report_alive(self) -> None:
        self.last_alive_s = time.monotonic()

    def report_fatal(self, message: str) -> None:
        pass

    def report_closed(self) -> None:
        pass


class Attachments:
    """All of them; stands where a `Supervisor` stands for launched ones."""

    def __init__(
        self,
        endpoints: Sequence[tuple[InstanceSpec, HttpEndpoint]],
        connect: Callable[[AttachedInstance, HttpEndpoint], None],
        *,
        startup_timeout_s: float,
    ) -> None:
        self._connect = connect
        self._startup_timeout_s = startup_timeout_s
        self._all_ready = asyncio.Event()
        self._instances = [
            AttachedInstance(spec, endpoint, self._became_ready) for spec, endpoint in endpoints
        ]

    def _became_ready(self) -> None:
        if all(each.ready is not None for each in self._instances):
            self._all_ready.set()

    def instances(self) -> list[AttachedInstance]:
        return self._instances

    def down(self) -> dict[str, str]:
        return {
            each.instance: f"is not reached yet at {each.endpoint.url}"
            for each in self._instances
            if each.ready is None
        }

    async def start(self) -> None:
        """Wait until all answer. Raises LaunchError that names the first which does not."""
        for each in self._instances:
            self._connect(each, each.endpoint)
        try:
            await asyncio.wait_for(self._all_ready.wait(), self._startup_timeout_s)
        except TimeoutError:
            missing = next(each for each in self._instances if each.ready is None)
            raise LaunchError(
                f"{missing.instance} at {missing.endpoint.url} did not answer /health within "
                f"{self._startup_timeout_s:g} s: start it, or correct --attach"
            ) from None

    async def stop(self, drain_s: float = 0.0) -> None:
        """They go on: they are not ours."""

    def kill_all(self) -> None:
        """They go on."""
