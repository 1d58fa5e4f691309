"""What the tests of real production engines behind the front door share."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from serve_harness import Server

PROMPTS = [list(range(1 + i, 30 + 7 * i)) for i in range(4)]


def interpreter(variable, engine):
    """The Python that `variable` names, of an environment with `engine`, and the mark of a module
    that needs it."""
    python = os.environ.get(variable, "")
    reason = f"{variable} names no interpreter of an environment with {engine}"
    return python, pytest.mark.skipif(not python or not Path(python).exists(), reason=reason)


def save_tiny(directory):
    """`tiny` with its seeded weights and its tokenizer as a Hugging Face directory."""
    from pdrelay.engine.weights import save_pretrained_dummy
    from pdrelay.model.tokenizer import byte_level_tokenizer

    save_pretrained_dummy("tiny", 0, directory)
    byte_level_tokenizer().save(str(directory))
    return str(directory)


def production_server(directory, model, engine, python, engine_args, start_s, *args, **more):
    """`engine` of the environment of `python`, on the CPU, with room for PROMPTS."""
    return Server(
        directory,
        model,
        *("--engine", engine, "--engine-python", python, "--device", "cpu"),
        *("--max-model-len", "1024", "--startup-timeout", str(start_s)),
        *(f"--engine-args={engine_args}", *args),
        start_s=start_s,
        **more,
    )


def ask(server, path, body):
    """The status and the body: JSON, or the events of a stream."""
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = response.read()
            if response.headers.get_content_type() == "text/event-stream":
                return response.status, _events(answer.decode())
            return response.status, json.loads(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _events(text):
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def post(server, **fields):
    body = {"max_tokens": 12, "temperature": 0, "return_token_ids": True, **fields}
    return ask(server, "/v1/completions", body)


def tokens(server, prompt, **fields):
    status, answer = post(server, prompt=prompt, **fields)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def port_of(pids):
    """Of the instance that these processes are."""
    for pid in pids:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--port" in arguments:
            return int(arguments[arguments.index(b"--port") + 1])
    raise AssertionError("no process of the instance has a --port")


def status_without_key(port, path):
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, b"{}", {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def gone(pids):
    """Whether all have ended within 30 s."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
