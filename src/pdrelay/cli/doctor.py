"""`pdrelay doctor`: what would stop a launch, or what stopped one."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pdrelay.cli.options import Option, add_options, choice, text
from pdrelay.errors import ConfigError

if TYPE_CHECKING:
    from pdrelay.doctor.facts import Ask

_DESCRIPTION = """\
Before a launch: check GPUs, links, memory, ports, engine versions, connector and limits for
MODEL and the flags of 'pdrelay serve'. After a failed one (--log): name the cause behind
'Engine core initialization failed', with its fix.

exit status: 0 nothing would stop the launch; 1 something would, or a log shows a failure;
2 bad usage.
"""
_EXAMPLES = """\
examples:
  pdrelay doctor ./Qwen3-0.6B --prefill 1 --decode 1
  pdrelay doctor --engine vllm --engine-python venv/bin/python --prefill 1 --decode 1
  pdrelay doctor --log prefill.log --log decode.log
"""
_ENGINES = ("native", "vllm", "sglang")
_OWN = [
    Option("engine", choice(*_ENGINES), "native (default), vllm, sglang", "NAME"),
    Option("engine-python", text, "Python of the engine's environment (default: this one)", "PATH"),
    Option("connector", text, "vLLM's KV connector: pdrelay, nixl, or its class name", "NAME"),
]
_CONNECTORS = {"auto": "", "pdrelay": "PdrelayConnector", "nixl": "NixlConnector"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from pdrelay.cli.serve_options import GROUPS

    parser = subparsers.add_parser(
        "doctor",
        help="find what would stop a launch, or what stopped one",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="directory or built-in shape")
    parser.add_argument("--config", metavar="FILE", help="TOML file of 'pdrelay serve'")
    parser.add_argument(
        "--log",
        metavar="FILE",
        action="append",
        help="read this log, or the logs under a directory, in place of the preflight; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    own = {option.name for option in _OWN}
    add_options(parser, {"doctor": _OWN})
    add_options(
        parser,
        {
            title: [option for option in options if option.name not in own]
            for title, options in GROUPS.items()
        },
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 for a failure found. Raises ConfigError."""
    return _post_mortem(args) if args.log else _preflight(args)


def _engine(args: argparse.Namespace) -> str | None:
    if args.engine is not None and args.engine not in _ENGINES:
        raise ConfigError(f"--engine is {args.engine!r}; it must be one of {', '.join(_ENGINES)}")
    engine: str | None = args.engine
    return engine


def _post_mortem(args: argparse.Namespace) -> int:
    from rich.console import Console

    from pdrelay.doctor import diagnose
    from pdrelay.doctor.logs import read_logs
    from pdrelay.doctor.render import findings_json, print_findings

    engine = _engine(args)
    report = [(log.path, diagnose(log.text, engine)) for log in read_logs(args.log)]
    if args.json:
        print(findings_json(report))
    else:
        print_findings(report, Console())
    return 1 if any(findings for _, findings in report) else 0


def _preflight(args: argparse.Namespace) -> int:
    from rich.console import Console

    from pdrelay.doctor.facts import gather
    from pdrelay.doctor.preflight import preflight, would_stop
    from pdrelay.doctor.render import checks_json, print_checks

    ask = make_ask(args)
    checks = preflight(ask, gather(ask))
    if args.json:
        print(checks_json(checks))
    else:
        print_checks(checks, Console())
    return 1 if would_stop(checks) else 0


def make_ask(args: argparse.Namespace) -> Ask:
    """From `serve`'s flags; MODEL may be left out. Raises ConfigError."""
    from pdrelay.cli.serve_options import serve_config
    from pdrelay.doctor.facts import Ask

    engine = _engine(args) or "native"
    ours = dict.fromkeys(option.key for option in _OWN)
    values = {**vars(args), **ours, "model": args.model or "tiny"}
    config = serve_config(argparse.Namespace(**values))
    if args.model is None and args.config is None:
        from dataclasses import replace

        config = replace(config, engine=replace(config.engine, model=""))
    return Ask(
        engine=engine,  # type: ignore[arg-type]  # checked by _engine
        config=config,
        connector=_CONNECTORS.get(args.connector or "", args.connector or ""),
        engine_python=args.engine_python or sys.executable,
    )
