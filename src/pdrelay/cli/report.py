"""`pdrelay report`: rebuild the report of a run of `lab` or `kv` from its raw files."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `report`."""
    parser = subparsers.add_parser(
        "report",
        help="rebuild the report of a run from its raw files",
        description="Write report.html, summary.json, summary.txt and trace.json (for Perfetto) "
        "into DIR from the raw files that `pdrelay lab` or `pdrelay kv` left there, and print the "
        "tables.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a run directory")
    parser.add_argument(
        "--export",
        metavar="TO",
        type=Path,
        help="also copy run.json, environment.json and summary.json, which documents quote, into "
        "the new directory TO",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print no tables")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for a directory that is no run or holds a damaged file."""
    from pdrelay.lab.kv.rundir import is_kv_run

    if is_kv_run(args.directory):
        _kv(args)
    else:
        _lab(args)
    if args.export is not None:
        from pdrelay.lab.export import export_summary

        export_summary(args.directory, args.export)
        print(f"exported: {args.export}")
    return 0


def _lab(args: argparse.Namespace) -> None:
    from pdrelay.lab.report.build import build_report
    from pdrelay.lab.report.tables import console, print_summary

    built = build_report(args.directory)
    if not args.quiet:
        print_summary(built.summary, console())
    print(f"report: {built.report}")


def _kv(args: argparse.Namespace) -> None:
    from pdrelay.lab.kv.build import build_kv_report
    from pdrelay.lab.kv.tables import print_kv_summary
    from pdrelay.lab.report.tables import console

    built = build_kv_report(args.directory)
    if not args.quiet:
        print_kv_summary(built.summary, console())
    print(f"report: {built.report}")
