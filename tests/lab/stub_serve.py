"""Stands in for `pdrelay serve`: its model argument says how it behaves."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading


def main() -> None:
    arguments = sys.argv[1:]
    assert arguments[0] == "serve"
    behaviour = arguments[1]
    ready = arguments[arguments.index("--ready-file") + 1]
    if behaviour == "dies":
        print("pdrelay: error: model 'dies' is unknown: choose another", flush=True)
        sys.exit(2)
    done = threading.Event()
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: done.set())
    if behaviour == "damaged":
        content = "{"
    else:
        worker = {"instance": "replica-0", "pid": os.getpid(), "resolved": {"dtype": "float32"}}
        content = json.dumps({"url": "http://127.0.0.1:1", "pid": os.getpid(), "workers": [worker]})
    if behaviour != "silent":
        with open(ready + ".tmp", "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(ready + ".tmp", ready)
    print("started", flush=True)
    done.wait(60)
    print("drained", flush=True)


main()
