"""`pdrelay serve` with the router as front door, over stub workers. STUB_MEET_S: its deadline for
workers that were introduced."""

from __future__ import annotations

import os
import sys

from stub_front_door import STUB_COMMAND

from pdrelay import cli, serve
from pdrelay.cli import serve as serve_command
from pdrelay.cli import serve_options
from pdrelay.front_door import RouterFrontDoor


def front_door(plan, down) -> RouterFrontDoor:
    return RouterFrontDoor(plan, down, meet_timeout_s=float(os.environ["STUB_MEET_S"]))


def run(args) -> int:
    config = serve_options.serve_config(args)
    return serve.run_server(config, command=STUB_COMMAND, make_front_door=front_door)


if __name__ == "__main__":
    serve_command.run = run
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
