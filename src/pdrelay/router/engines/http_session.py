"""What a front door has with all its instances: connections for requests, a session for probes."""

from __future__ import annotations

import aiohttp

from pdrelay.router.engines.http_wire import CONNECT_S, IDLE_S, Wires

_READ_BYTES = 1 << 18


class HttpSession:
    """Made on first use, on the running event loop. Proxies of the environment are not asked."""

    def __init__(self) -> None:
        self.wires = Wires()
        self._session: aiohttp.ClientSession | None = None

    def get(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=_READ_BYTES,
                trust_env=False,
            )
        return self._session

    async def close(self) -> None:
        self.wires.close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()
