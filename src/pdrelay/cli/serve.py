"""`pdrelay serve`."""

from __future__ import annotations

import argparse

from pdrelay.cli.options import add_options

_DESCRIPTION = """\
Serve MODEL behind an OpenAI-compatible endpoint, one process a rank.

MODEL is a Hugging Face directory or a built-in shape: tiny, llama-3.1-8b.
Every flag may stand in a TOML file (--config) under its name; flags win over the file.
Ctrl-C or SIGTERM lets running requests finish (--drain-timeout); a second one ends them.
"""
_EXAMPLES = """\
examples:
  pdrelay serve tiny --prefill 1 --decode 1
  pdrelay serve ./Qwen3-0.6B --replicas 2 --port 0 --ready-file ready.json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from pdrelay.cli.serve_options import GROUPS

    parser = subparsers.add_parser(
        "serve",
        help="serve a model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="directory or built-in shape")
    parser.add_argument("--config", metavar="FILE", help="TOML file of the flags below")
    add_options(parser, GROUPS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop. Raises ConfigError and LaunchError."""
    from pdrelay.cli.serve_options import serve_config

    config = serve_config(args)
    from pdrelay.serve import run_server

    return run_server(config)
