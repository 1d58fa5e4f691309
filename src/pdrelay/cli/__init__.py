"""The `pdrelay` command. Subcommands are imported only when they are asked for."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pdrelay import __version__
from pdrelay.errors import ConfigError, LaunchError

_COMMANDS = {
    "serve": "serve a model over prefill and decode workers, replicas, or tensor parallelism",
    "bench": "open-loop load generator for any OpenAI-compatible server",
    "lab": "measure the topologies against each other and write the report",
    "kv": "what handing KV over costs: bytes, bandwidth, exposed time, crossover",
    "doctor": "find what would stop a launch, or what stopped one",
    "report": "rebuild the report of a run from its raw files",
}
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Errors are one line on standard error; flags are never abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        self.exit(EXIT_USAGE, f"{self.prog}: error: {one_line} (see '{self.prog} --help')\n")


def build_parser(command: str | None) -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, with the flags of `command` only, and the parsers of all subcommands."""
    parser = Parser(
        prog="pdrelay",
        description="Serve large language models with prefill and decode on separate workers, "
        "and measure when that pays.",
    )
    parser.add_argument("--version", action="version", version=f"pdrelay {__version__}")
    subparsers: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, text in _COMMANDS.items():
        if name == command:
            importlib.import_module(f"pdrelay.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser, dict(subparsers.choices)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, with `func`, which runs them. Exits with status 2 for unknown ones."""
    command = next((arg for arg in argv if not arg.startswith("-")), None)
    parser, commands = build_parser(command)
    if command is not None and command not in commands:
        parser.error(f"no command {command!r}{suggestion(command, list(commands))}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        chosen = commands[args.command]
        flag = unknown[0].split("=", 1)[0]
        hint = suggestion(flag, list(chosen._option_string_actions))
        chosen.error(f"unknown argument {flag}{hint}")
    return args


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0, 1, 2 (bad usage or launch), 130 (Ctrl-C)."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        status: int = args.func(args)
        sys.stdout.flush()
        return status
    except (ConfigError, LaunchError) as error:
        print(f"pdrelay: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # our reader left: `pdrelay report DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
