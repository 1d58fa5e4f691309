"""`pdrelay lab`: measure the topologies against each other and write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdrelay.cli.options import (
    Option,
    add_options,
    byte_count,
    choice,
    integer,
    number,
    read_options,
    switch,
    text,
)
from pdrelay.errors import ConfigError

if TYPE_CHECKING:
    from pdrelay.bench.slo import Slo
    from pdrelay.lab.config import LabConfig, TraceConfig

DEFAULT_TOPOLOGIES = "replicas:2,tp:2,pd:1:1,replicas:1"
DEFAULT_MODEL = "tiny"
# For `tiny` on CPU cores: a few times what an idle server needs. On GPUs: MLPerf's interactive TTFT
# of Llama-3.1-8B, and half its TPOT: vLLM 0.26.0 decodes 64 streams of that model in 6.6 ms a token
# on an H200 (2026-11-23, 512 in / 128 out), so that 15 is missed by requests that stalls held up.
# Else: MLPerf's levels.
TINY_SLO = ("ttft:250", "tpot:10")
GPU_SLO = ("ttft:500", "tpot:15")
GPU_MAX_MODEL_LEN = 16_384  # as long as the experiments need: long contexts cost KV memory
FULL_REPEATS = 5

_DESCRIPTION = """\
Start each topology in turn, run the experiments on it, and write the run directory and its report
(report.html, summary.json, summary.txt, trace.json).

experiments: 1 TTFT against input length, 2 traffic up to saturation and a trace,
             3 long prompts over running streams, 4 three shapes side by side, and
             ITL of many streams at once
sizes, rates and the service level are those of --scale: cpu is made for `tiny` on CPU cores, gpu
for 8B models on GPUs
"""
_EXAMPLES = """\
examples:
  pdrelay lab --quick
  pdrelay lab --topologies replicas:2,pd:1:1 --experiments 1,3 --out runs/hand-over
  pdrelay lab --engines native,vllm --engine-python ~/vllm/bin/python --topologies replicas:2,pd:1:1
  pdrelay lab --experiments 2 --trace conv.csv --time-scale 0.5 --max-input-len 4096
  pdrelay lab --quick --model llama-3.1-8b --dry-run
  pdrelay lab --model llama-3.1-8b --repeats 1 --cases fixed --topologies replicas:2,pd:1:1
"""

ENGINES = ("native", "vllm", "sglang")  # lab.topology's, which would load too much for --help


def _by_engine(value: object) -> dict[str, str]:
    """`VALUE` for every production engine, `vllm=VALUE` for one; several of them."""
    wanted = "a value, or one for an engine as in vllm=VALUE"
    found: dict[str, str] = {}
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, str) or not each.strip():
            raise ValueError(wanted)
        engine, separator, rest = each.partition("=")
        if separator and engine in ENGINES[1:]:
            found[engine] = rest
        else:
            found |= {name: each for name in ENGINES[1:] if name not in found}
    return found


GROUPS: Mapping[str, Sequence[Option]] = {
    "what": [
        Option("model", text, f"directory or built-in shape ({DEFAULT_MODEL})", "M"),
        Option(
            "topologies",
            text,
            f"comma-separated replicas:N, tp:N, pd:PREFILL:DECODE ({DEFAULT_TOPOLOGIES}); an "
            "engine may stand before them: vllm/pd:1:1, vllm+nixl/pd:1:1",
            "LIST",
        ),
        Option("experiments", text, "which of the four (1,2,3,4)", "LIST"),
        Option(
            "cases",
            text,
            "only cases of these names, as --dry-run lists them: fixed, poisson-*, streams-64; of "
            "some topologies: *pd-1-1/fixed",
            "LIST",
        ),
        Option(
            "scale",
            choice("auto", "cpu", "gpu"),
            "sizes of the experiments: auto (default: gpu where the servers run on GPUs), cpu, gpu",
            "NAME",
        ),
        Option(
            "repeats",
            integer(1, 100),
            f"repeats, each on fresh servers (quick: 1, else {FULL_REPEATS}; intervals across "
            "repeats need 5)",
            "N",
        ),
        Option("seed", integer(0, (1 << 31) - 1), "seed of prompts and arrivals (0)", "S"),
        Option("out", text, "run directory, new or empty (runs/<time>)", "DIR"),
        Option(
            "time-limit",
            number(1.0, 1e6),
            "leave out what would not fit into so many seconds (quick: 330; on GPUs 480)",
            "S",
        ),
    ],
    "trace": [
        Option("trace", text, "Azure 2023 CSV or Mooncake JSONL for experiment 2", "FILE"),
        Option("time-scale", number(1e-6, 1e6), "arrival times are multiplied by it (1)", "S"),
        Option("max-input-len", integer(1, 1 << 24), "cap of prompt tokens", "N"),
        Option("max-output-len", integer(1, 1 << 24), "cap of output tokens", "N"),
        Option("trace-duration", number(0.001, 1e9), "seconds of the trace to use", "S"),
    ],
    "servers": [
        Option(
            "transport",
            choice("mapped", "nccl", "tcp", "pool"),
            "how KV moves on the native engine (mapped)",
            "T",
        ),
        Option(
            "engines",
            text,
            "comma-separated native, vllm, sglang, for topologies that name none (native)",
            "LIST",
        ),
        Option("engine", choice(*ENGINES), "the same for one engine", "NAME"),
        Option(
            "engine-python",
            _by_engine,
            "interpreter that has the engine: PATH, or vllm=PATH; repeat it",
            "PATH",
            repeats=True,
        ),
        Option(
            "engine-args",
            _by_engine,
            "more arguments for the engine's instances: ARGS, or vllm=ARGS; repeat it",
            "ARGS",
            repeats=True,
        ),
        Option("device", choice("auto", "cpu", "cuda"), "auto (default), cpu, cuda", "NAME"),
        Option("dtype", choice("auto", "float32", "bfloat16"), "auto (default)", "NAME"),
        Option("load-format", choice("auto", "dummy"), "auto (default), dummy", "NAME"),
        Option(
            "max-model-len",
            integer(1, 1 << 24),
            f"longest prompt + output (--scale gpu: {GPU_MAX_MODEL_LEN}, or the model's)",
            "N",
        ),
        Option(
            "gpu-memory-utilization",
            number(0.01, 1.0),
            "part of each GPU's memory, for all instances on it together (0.9)",
            "X",
        ),
        Option(
            "kv-cache-memory",
            byte_count,
            "KV pool of each rank, such as 16GiB; give it where instances of vllm share a GPU: "
            "either takes what the other loads meanwhile for its own",
            "BYTES",
        ),
        Option(
            "allow-oversubscribe",
            switch,
            "more ranks than cores (GPUs): their latencies mean little",
            is_switch=True,
        ),
    ],
}
_TO_SERVERS = (
    "device",
    "dtype",
    "load_format",
    "max_model_len",
    "gpu_memory_utilization",
    "kv_cache_memory",
)
_TRACE_ONLY = ("time_scale", "max_input_len", "max_output_len", "trace_duration")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `lab`."""
    parser = subparsers.add_parser(
        "lab",
        help="measure the topologies against each other and write the report",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one repeat with few samples, within 6 minutes (on GPUs 8)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the cases with their estimated seconds, and start nothing",
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="go on in the run directory --out, made with the same settings on the same machine: "
        "topologies that it has whole are left out",
    )
    parser.add_argument(
        "--goodput",
        nargs="+",
        metavar="NAME:MS",
        help=f"service level (--scale gpu: {' '.join(GPU_SLO)}; tiny: {' '.join(TINY_SLO)}; else "
        "ttft:500 tpot:30)",
    )
    add_options(parser, GROUPS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError, and LaunchError when no server starts."""
    config = lab_config(args)
    from pdrelay.lab.report.tables import console, print_summary

    if args.dry_run:
        from pdrelay.lab.plan import plan
        from pdrelay.lab.report.plan_table import print_plan

        print_plan(plan(config), config.scale, console())
        return 0
    from pdrelay.lab.progress import RichReporter
    from pdrelay.lab.report.build import build_report
    from pdrelay.lab.run import run_lab_blocking
    from pdrelay.lab.server import ChildLauncher

    with RichReporter() as reporter:
        run_lab_blocking(config, ChildLauncher(config.startup_timeout_s), reporter)
    built = build_report(config.out)
    print_summary(built.summary, console())
    print(f"report: {built.report}")
    return 0


def lab_config(args: argparse.Namespace) -> LabConfig:
    """Validated settings. Raises ConfigError."""
    from dataclasses import replace

    from pdrelay.lab.config import LabConfig
    from pdrelay.lab.scale import choose_scale
    from pdrelay.lab.topology import on_engines, parse_topologies

    options = [option for group in GROUPS.values() for option in group]
    values = read_options(options, vars(args), None)
    scale = choose_scale(_scale_name(values), quick=args.quick)
    if "time_limit" in values:
        scale = replace(scale, budget_s=values["time_limit"])
    model = values.get("model", DEFAULT_MODEL)
    topologies = parse_topologies(values.get("topologies", DEFAULT_TOPOLOGIES))
    return LabConfig(
        model=model,
        topologies=tuple(on_engines(topologies, _engines(values))),
        out=_out(values),
        scale=scale,
        quick=args.quick,
        add=args.add,
        slo=_slo(args.goodput, model, scale.name),
        experiments=_experiments(values.get("experiments", "1,2,3,4")),
        cases=tuple(part.strip() for part in values.get("cases", "").split(",") if part.strip()),
        repeats=values.get("repeats", 1 if args.quick else FULL_REPEATS),
        seed=values.get("seed", 0),
        trace=_trace(values),
        serve_args=tuple(_serve_args(values, model, scale.name)),
        engine_serve_args={engine: _engine_args(engine, values) for engine in ENGINES},
        argv=("pdrelay", *sys.argv[1:]),
    )


def _out(values: Mapping[str, Any]) -> Path:
    if "out" in values:
        return Path(values["out"])
    return Path("runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def _scale_name(values: Mapping[str, Any]) -> str:
    """ "cpu" or "gpu": as asked for, else where the servers will run."""
    name: str = values.get("scale", "auto")
    if name != "auto":
        return name
    device = values.get("device", "auto")
    if device == "auto":
        from pdrelay.launch.host import inspect_host

        device = "cuda" if inspect_host().num_gpus else "cpu"
    return "gpu" if device == "cuda" else "cpu"


def _slo(goodput: list[str] | None, model: str, scale: str) -> Slo:
    from pdrelay.bench.slo import parse_goodput, slo_preset

    if goodput:
        return parse_goodput(goodput)
    if scale == "gpu":
        return parse_goodput(GPU_SLO)
    if model == DEFAULT_MODEL:
        return parse_goodput(TINY_SLO)
    return slo_preset("llama3.1-8b-interactive")


def _experiments(given: str) -> tuple[str, ...]:
    from pdrelay.lab.rundir import EXPERIMENTS

    numbers = {str(index): name for index, name in enumerate(EXPERIMENTS, 1)}
    chosen = [part.strip() for part in given.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in numbers]
    if unknown or not chosen:
        raise ConfigError(
            f"--experiments is {given!r}; it must name some of 1, 2, 3, 4, such as 1,3"
        )
    return tuple(name for number_, name in numbers.items() if number_ in chosen)


def _trace(values: Mapping[str, Any]) -> TraceConfig | None:
    from pdrelay.lab.config import TraceConfig

    if "trace" not in values:
        alone = [key for key in _TRACE_ONLY if key in values]
        if alone:
            flag = alone[0].replace("_", "-")
            raise ConfigError(f"--{flag} needs --trace: give the trace file, or leave it out")
        return None
    path = Path(values["trace"])
    if not path.is_file():
        raise ConfigError(f"--trace {path} is no file: give an Azure CSV or Mooncake JSONL file")
    return TraceConfig(
        path=path,
        time_scale=values.get("time_scale", 1.0),
        max_input_len=values.get("max_input_len"),
        max_output_len=values.get("max_output_len"),
        duration_s=values.get("trace_duration"),
    )


def _engines(values: Mapping[str, Any]) -> list[str]:
    """Raises ConfigError."""
    if "engines" in values and "engine" in values:
        raise ConfigError("--engine and --engines exclude each other: give one of them")
    given = values.get("engines", values.get("engine", "native"))
    engines = [part.strip() for part in given.split(",") if part.strip()]
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown or not engines:
        raise ConfigError(f"--engines is {given!r}; it must name some of {', '.join(ENGINES)}")
    return engines


def _serve_args(values: Mapping[str, Any], model: str, scale: str) -> list[str]:
    """Flags for every `pdrelay serve`. Raises ModelError for a model that cannot be read."""
    arguments: list[str] = []
    if scale == "gpu" and "max_model_len" not in values:
        from pdrelay.model.config import load_model_config

        longest = min(GPU_MAX_MODEL_LEN, load_model_config(model).max_position_embeddings)
        values = {**values, "max_model_len": longest}
    for key in _TO_SERVERS:
        if key in values:
            arguments += [f"--{key.replace('_', '-')}", str(values[key])]
    if values.get("allow_oversubscribe"):
        arguments.append("--allow-oversubscribe")
    return arguments


def _engine_args(engine: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags for servers on one engine; `=` because a value may begin with a dash."""
    if engine == "native":
        return ("--transport", values["transport"]) if "transport" in values else ()
    return tuple(
        f"--{key.replace('_', '-')}={values[key][engine]}"
        for key in ("engine_python", "engine_args")
        if engine in values.get(key, {})
    )
