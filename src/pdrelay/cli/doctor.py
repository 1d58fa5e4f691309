"""`pdrelay doctor`: what would stop a launch, or what stopped one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from pdrelay.cli.options import add_options, read_options

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
_CONNECTORS = {
    "auto": "",
    "pdrelay": "PdrelayConnector",
    "pdrelay-nccl": "PdrelayConnector",
    "nixl": "NixlConnector",
}


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
    add_options(parser, GROUPS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 for a failure found. Raises ConfigError."""
    return _post_mortem(args) if args.log else _preflight(args)


def _post_mortem(args: argparse.Namespace) -> int:
    from rich.console import Console

    from pdrelay.cli.serve_options import OPTIONS
    from pdrelay.doctor import diagnose
    from pdrelay.doctor.logs import read_logs
    from pdrelay.doctor.render import findings_json, print_findings

    engines = [option for option in OPTIONS if option.key == "engine"]
    engine = read_options(engines, vars(args), None).get("engine")
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

    no_model = args.model is None and args.config is None
    config = serve_config(argparse.Namespace(**{**vars(args), "model": args.model or "tiny"}))
    if no_model:
        config = replace(config, engine=replace(config.engine, model=""))
    asked = config.external.connector
    return Ask(
        engine=config.engine.engine,
        config=config,
        connector=_CONNECTORS.get(asked, asked),
        engine_python=config.external.engine_python or sys.executable,
    )
