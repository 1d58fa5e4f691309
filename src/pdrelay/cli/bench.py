"""`pdrelay bench`: load any OpenAI-compatible server and measure it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdrelay.core import awake
from pdrelay.errors import ConfigError, PdrelayError
from pdrelay.launch.host import inspect_host

if TYPE_CHECKING:
    from pdrelay.bench.client import LoadResult
    from pdrelay.bench.config import BenchConfig

RECORDS_FILE = "requests.jsonl"
SUMMARY_FILE = "summary.json"

_EPILOG = """\
examples:
  pdrelay bench --url http://127.0.0.1:8000 --input-len 512 --output-len 64 --rate 4
  pdrelay bench --url http://127.0.0.1:8000 --input-len 512 --output-len 64 --concurrency 8
  pdrelay bench --url http://127.0.0.1:8000 --trace conv.csv --trace-duration 60 --time-scale 2 \\
      --max-input-len 4096 --max-output-len 256 --slo llama3.1-8b --out runs/conv

Percentiles with too few samples for them are not printed (p99 needs 662 requests). The clock of
every request starts when the schedule wanted it sent."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `bench`. Numbers are parsed in `run`, so that every error is one line."""
    parser = subparsers.add_parser(
        "bench",
        help="load an OpenAI-compatible server and measure it",
        description="Open-loop load generator for any OpenAI-compatible server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(func=run)
    server = parser.add_argument_group("server")
    server.add_argument("--url", required=True, help="base URL, such as http://127.0.0.1:8000")
    server.add_argument("--model", metavar="NAME", help="default: the first of /v1/models")
    server.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="%(default)s"
    )
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    server.add_argument(
        "--timeout", metavar="SECONDS", default="600", help="per request (%(default)s)"
    )
    server.add_argument(
        "--no-ignore-eos", action="store_true", help="let answers end by themselves"
    )
    server.add_argument(
        "--return-token-ids", action="store_true", help="ask for token ids and record them"
    )
    _add_traffic(parser)
    _add_trace(parser)
    output = parser.add_argument_group("result")
    output.add_argument(
        "--goodput",
        nargs="+",
        metavar="NAME:MS",
        help="service levels, such as ttft:500 tpot:50 e2el:9000",
    )
    output.add_argument(
        "--slo", metavar="PRESET", help="service levels of MLPerf, such as llama3.1-8b-interactive"
    )
    output.add_argument("--num-gpus", metavar="N", help="for goodput per GPU")
    output.add_argument(
        "--ramp-up",
        metavar="SECONDS",
        default="0",
        help="leave requests of the first seconds out of the summary (%(default)s)",
    )
    output.add_argument(
        "--out", metavar="DIR", help=f"write {RECORDS_FILE} and {SUMMARY_FILE} there"
    )


def _add_traffic(parser: argparse.ArgumentParser) -> None:
    traffic = parser.add_argument_group("traffic (one source; --rate or --concurrency)")
    traffic.add_argument("--input-len", metavar="N", help="random prompts of N tokens")
    traffic.add_argument("--output-len", metavar="M", help="answers of M tokens")
    traffic.add_argument(
        "--shared-prefix-len", metavar="N", help="leading tokens that all random prompts share (0)"
    )
    traffic.add_argument(
        "--workload",
        metavar="FILE",
        help="JSON lines with prompt | prompt_token_ids | input_len, max_tokens | output_len, and "
        "optionally arrival_s, tag, extra_body",
    )
    traffic.add_argument("--rate", metavar="R", help="requests/s on average, or inf: all at once")
    traffic.add_argument(
        "--burstiness", metavar="B", help="shape of gamma-distributed gaps; 1 is Poisson (1)"
    )
    traffic.add_argument(
        "--concurrency", metavar="C", help="closed loop: C requests in flight (a capacity mode)"
    )
    traffic.add_argument(
        "--num-prompts", metavar="N", help="requests to send (100; of a file: all, in order)"
    )
    traffic.add_argument(
        "--num-warmups",
        metavar="N",
        default="4",
        help="requests before, not measured (%(default)s)",
    )
    traffic.add_argument("--seed", metavar="S", default="0", help="%(default)s")
    traffic.add_argument(
        "--vocab-size",
        metavar="N",
        help="prompts are token ids below N (what the server says, else 256: plain bytes in the "
        "usual tokenizers)",
    )


def _add_trace(parser: argparse.ArgumentParser) -> None:
    trace = parser.add_argument_group("trace")
    trace.add_argument("--trace", metavar="FILE", help="Azure LLM 2023 CSV or Mooncake JSONL")
    trace.add_argument(
        "--time-scale", metavar="S", help="multiply arrival times: 0.5 doubles the rate (1)"
    )
    trace.add_argument(
        "--length-scale", metavar="S", help="multiply lengths, and the blocks of hash ids (1)"
    )
    trace.add_argument("--max-input-len", metavar="N", help="cut longer prompts to N tokens")
    trace.add_argument("--max-output-len", metavar="N", help="cut longer answers to N tokens")
    trace.add_argument(
        "--trace-start", metavar="SECONDS", help="begin there, in the trace's own time (0)"
    )
    trace.add_argument(
        "--trace-duration", metavar="SECONDS", help="so much of the trace's own time (all)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the load. Returns 0, 1 when nothing was completed, 2 for bad input, 130 if stopped."""
    try:
        host = inspect_host()
        selector = awake.client_selector(gpus=host.num_gpus > 0, num_cores=host.num_cores)
        with awake.runner(selector) as runner:
            return runner.run(_run(args))
    except PdrelayError as error:
        print(f"pdrelay bench: error: {error}", file=sys.stderr)
        return 2


async def _run(args: argparse.Namespace) -> int:
    from pdrelay.bench.config import make_config
    from pdrelay.bench.job import make_plan, run_plan
    from pdrelay.bench.table import format_table

    config = make_config(vars(args))
    out = None if args.out is None else _prepare_out(Path(args.out))
    plan = await make_plan(config, args.api_key)
    if plan.trace is not None:
        print(plan.trace.describe())
    print(f"{plan.server.model} at {config.url}: {_describe(config, len(plan.requests))}")
    stop = asyncio.Event()
    with _stop_on_signals(stop), _progress_bar(len(plan.requests)) as progress:
        result, summary = await run_plan(
            plan, config, api_key=args.api_key, progress=progress, stop=stop
        )
    if out is not None:
        _write(out, result, summary)  # before anything is printed: a closed pipe loses nothing
    print(format_table(summary))
    if out is not None:
        print(f"wrote {out / RECORDS_FILE} and {out / SUMMARY_FILE}")
    if stop.is_set():
        return 130
    return 0 if summary["completed"] else 1


def _describe(config: BenchConfig, num: int) -> str:
    if config.concurrency is not None:
        return f"{num} requests, closed loop of {config.concurrency}"
    if config.rate is not None:
        return f"{num} requests, open loop at {config.rate:g} requests/s"
    return f"{num} requests, open loop at their own times"


def _prepare_out(out: Path) -> Path:
    for name in (RECORDS_FILE, SUMMARY_FILE):
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists: remove it or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f"{SUMMARY_FILE}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot write to {out} ({reason}): choose another --out") from error
    return out


def _write(out: Path, result: LoadResult, summary: dict[str, Any]) -> None:
    import msgspec

    from pdrelay.bench.record import write_records

    try:
        write_records(out / RECORDS_FILE, result.records)
        text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
        (out / SUMMARY_FILE).write_bytes(text + b"\n")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot write to {out} ({reason}): free some space there") from error


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the load early but keep what was measured."""
    loop = asyncio.get_running_loop()
    installed = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not main thread
            loop.add_signal_handler(number, stop.set)
            installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time left on a terminal, nothing elsewhere.

    It is drawn at most twice a second from the progress callback, and by no thread: a thread
    would hold the interpreter while tokens arrive.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("requests", total=total)
        last_drawn = bar.get_time()

        def advance(num_done: int, num_total: int) -> None:
            nonlocal last_drawn
            now = bar.get_time()
            due = now - last_drawn >= 0.5 or num_done == num_total
            if due:
                last_drawn = now
            bar.update(task, completed=num_done, refresh=due)

        yield advance
