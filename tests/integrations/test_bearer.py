"""The middleware that guards an instance of vLLM."""

from __future__ import annotations

import pytest

from pdrelay.integrations.bearer import KEY_VARIABLE, RequireKey


class Asked:
    """An application that says it was reached, and the messages that a client got."""

    def __init__(self):
        self.sent = []

    async def app(self, scope, receive, send):
        self.sent.append("app")

    async def send(self, message):
        self.sent.append(message)

    async def ask(self, path="/v1/completions", *headers, kind="http", root=""):
        scope = {"type": kind, "path": path, "headers": list(headers), "root_path": root}
        await RequireKey(self.app)(scope, None, self.send)
        return self.sent


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "k3y")


@pytest.mark.parametrize(
    "header", [(), ((b"authorization", b"Bearer k3"),), ((b"x", b"Bearer k3y"),)]
)
async def test_without_the_key_nothing_is_generated_or_told(header):
    for path in ("/v1/completions", "/inference/v1/generate", "/", "/health/../v1", "/healthy"):
        start, body = await Asked().ask(path, *header)
        assert start["status"] == 401
        assert b"Unauthorized" in body["body"]
    assert (await Asked().ask("/root/v1/x", *header, root="/root"))[0]["status"] == 401


async def test_with_the_key_and_where_none_is_needed():
    header = (b"Authorization", b"Bearer k3y")
    assert await Asked().ask("/v1/completions", header) == ["app"]
    for path in ("/health", "/metrics", "/metrics/", "/version", "/root/health"):
        assert await Asked().ask(path, root="/root") == ["app"]
    assert await Asked().ask("", kind="lifespan") == ["app"]


async def test_a_socket_needs_the_key_too():
    (message,) = await Asked().ask("/v1/realtime", kind="websocket")
    assert message == {"type": "websocket.close", "code": 1008}


def test_no_server_starts_open(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(KeyError):
        RequireKey(None)
