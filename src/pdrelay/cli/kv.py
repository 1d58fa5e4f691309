"""`pdrelay kv`: what handing KV over costs, measured and predicted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdrelay.cli.options import Option, add_options, choice, integer, number, read_options, text
from pdrelay.errors import ConfigError

if TYPE_CHECKING:
    from pdrelay.lab.kv.config import KvConfig, ServeConfig
    from pdrelay.lab.kv.model import Compute, Link
    from pdrelay.model.config import ModelConfig

_DESCRIPTION = """\
KV bytes a token of a model; transfers of whole prompts between two processes, measured by length,
page size and transport, at once and layer by layer, beside a plain copy; the same inside real
servers; and the prompt lengths at which moving KV would take longer than computing it.

MODEL is a Hugging Face directory or a built-in shape.
"""
_EXAMPLES = """\
examples:
  pdrelay kv tiny
  pdrelay kv llama-3.1-8b --predict-only
  pdrelay kv llama-3.1-70b --tp 4 --predict-only --links nvlink=390/rank,ib=25
  pdrelay kv tiny --lengths 512,2048,8192 --block-sizes 16,64,256 --transport mapped,tcp --no-serve
"""
_SERVED_LENGTHS = (128, 512, 2048, 8192)
_SERVE_REQUESTS = 12
_SERVE_REPEATS = 2
_SHARE_OF_MEMORY = 0.6  # of what is available, for the pools

GROUPS: Mapping[str, Sequence[Option]] = {
    "model": [
        Option("tp", integer(1, 64), "tensor-parallel ranks on each side (1)", "N"),
        Option(
            "dtype",
            choice("auto", "float32", "bfloat16", "float16"),
            "of the KV cache (auto: the model's; on GPUs bfloat16 for built-in shapes)",
            "NAME",
        ),
    ],
    "measurement": [
        Option(
            "device",
            choice("auto", "cpu", "cuda"),
            "auto: cuda with two GPUs, else cpu; cuda with one GPU puts both processes on it",
            "D",
        ),
        Option("transport", text, "comma-separated, all of the device's by default", "LIST"),
        Option("lengths", text, "prompt lengths, tokens (64,128,...,8192)", "LIST"),
        Option("block-sizes", text, "page sizes, tokens (16,64)", "LIST"),
        Option("repeats", integer(1, 1000), "of every combination; a median needs 11 (12)", "N"),
        Option("seed", integer(0, (1 << 31) - 1), "of block placement and prompts (0)", "S"),
        Option("out", text, "run directory, new or empty (runs/kv-<time>)", "DIR"),
    ],
    "prediction": [
        Option("tflops", number(1e-6, 1e6), "one rank's prefill rate, TFLOP/s (660, assumed)", "X"),
        Option("memory-gbs", number(1e-3, 1e6), "one rank's memory, GB/s (4000, assumed)", "X"),
        Option(
            "links",
            text,
            "NAME=GB/s, or NAME=GB/s/rank where every rank has one (NVLink 390, PCIe 5 x16 63, "
            "400 and 100 Gb/s)",
            "LIST",
        ),
    ],
    "servers": [
        Option(
            "servers",
            choice("both", "side-by-side", "apart"),
            "side-by-side: P/D and one replica at once, requests in turn (how much the hand-over "
            "slows prefill); apart: one after the other, as the lab does; both (default)",
            "WHICH",
        ),
        Option("serve-repeats", integer(1, 100), f"fresh servers ({_SERVE_REPEATS})", "N"),
        Option("serve-requests", integer(1, 10_000), f"a length ({_SERVE_REQUESTS})", "N"),
        Option("max-model-len", integer(1, 1 << 24), "longest prompt + output", "N"),
    ],
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `kv`."""
    parser = subparsers.add_parser(
        "kv",
        help="what handing KV over costs: bytes, bandwidth, exposed time, crossover",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a model directory or a built-in shape")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing")
    parser.add_argument("--no-serve", action="store_true", help="start no servers")
    add_options(parser, GROUPS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError, and LaunchError when nothing could be measured."""
    config, shape = kv_config(args)
    from pdrelay.lab.kv.build import build_kv_report
    from pdrelay.lab.kv.run import run_kv
    from pdrelay.lab.kv.tables import print_kv_summary
    from pdrelay.lab.progress import RichReporter
    from pdrelay.lab.report.tables import console
    from pdrelay.lab.server import ChildLauncher

    timeout_s = config.serve.startup_timeout_s if config.serve else 1.0
    with RichReporter() as reporter:
        run_kv(config, shape, ChildLauncher(timeout_s), reporter)
    built = build_kv_report(config.out)
    print_kv_summary(built.summary, console())
    print(f"report: {built.report}")
    return 0


def kv_config(args: argparse.Namespace) -> tuple[KvConfig, ModelConfig]:
    """Validated settings, and the model's shape. Raises ConfigError."""
    from pdrelay.lab.kv.config import DEFAULT_BLOCK_SIZES, DEFAULT_REPEATS, KvConfig
    from pdrelay.model.config import check_tp, load_model_config

    options = [option for group in GROUPS.values() for option in group]
    values = read_options(options, vars(args), None)
    shape = load_model_config(args.model)
    tp = values.get("tp", 1)
    check_tp(shape, tp)
    num_gpus = _num_gpus(args.predict_only)
    device = _device(values.get("device", "auto"), args.predict_only, num_gpus)
    lengths = _lengths(values, shape)
    transports = _transports(values, device, num_gpus)
    dtype = _dtype(values.get("dtype", "auto"), args.model, shape, device)
    config = KvConfig(
        model=args.model,
        dtype=dtype,
        tp=tp,
        device=device,
        out=_out(values),
        transports=transports,
        lengths=lengths,
        num_gpus=num_gpus if device == "cuda" else 0,
        block_sizes=_numbers(values, "block-sizes", DEFAULT_BLOCK_SIZES, 1 << 16),
        repeats=values.get("repeats", DEFAULT_REPEATS),
        predict_only=args.predict_only,
        serve=None
        if args.no_serve or args.predict_only
        else _serve(values, lengths, device, transports[0], num_gpus),
        compute=_compute(values),
        links=_links(values),
        seed=values.get("seed", 0),
        argv=("pdrelay", *sys.argv[1:]),
    )
    if not config.predict_only and device == "cpu":
        _check_memory(config, shape)
    return config, shape


def _num_gpus(predict_only: bool) -> int:
    from pdrelay.launch.host import inspect_host

    return 0 if predict_only else inspect_host().num_gpus


def _device(asked: str, predict_only: bool, num_gpus: int) -> str:
    if predict_only:
        return "cpu" if asked == "auto" else asked
    if asked == "cuda" and num_gpus == 0:
        raise ConfigError(
            "--device cuda needs a GPU (two to measure a link), the driver lists none: use "
            "--device cpu or --predict-only"
        )
    if asked == "auto":
        return "cuda" if num_gpus >= 2 else "cpu"
    return asked


def _dtype(asked: str, model: str, shape: ModelConfig, device: str) -> str:
    from pdrelay.model.config import is_built_in

    if asked != "auto":
        return asked
    return "bfloat16" if device == "cuda" and is_built_in(model) else shape.dtype


def _transports(values: Mapping[str, Any], device: str, num_gpus: int) -> tuple[str, ...]:
    from pdrelay.lab.kv.config import CPU_TRANSPORTS, CUDA_TRANSPORTS
    from pdrelay.transport.registry import TRANSPORTS

    of_device: Sequence[str] = CPU_TRANSPORTS if device == "cpu" else CUDA_TRANSPORTS
    possible = [name for name in of_device if name in TRANSPORTS]
    if device == "cuda" and num_gpus == 1:
        possible.remove("nccl")  # it refuses two ranks on one GPU
    chosen = _parts(values.get("transport", ",".join(possible)))
    unknown = [name for name in chosen if name not in possible]
    if unknown or not chosen:
        name = unknown[0] if unknown else ""
        raise ConfigError(
            f"--transport {name!r} cannot be measured on {_where(device, num_gpus)}: choose among "
            f"{', '.join(possible)}"
        )
    return tuple(dict.fromkeys(chosen))


def _where(device: str, num_gpus: int) -> str:
    return "one GPU" if device == "cuda" and num_gpus == 1 else device


def _parts(given: str) -> list[str]:
    return [part.strip() for part in given.split(",") if part.strip()]


def _numbers(
    values: Mapping[str, Any], name: str, default: Sequence[int], high: int
) -> tuple[int, ...]:
    """A comma-separated list of integers, sorted. Raises ConfigError."""
    given = values.get(name.replace("-", "_"))
    if given is None:
        return tuple(default)
    read: Callable[[object], int] = integer(1, high)
    try:
        numbers = sorted({read(part) for part in _parts(given)})
    except ValueError as error:
        raise ConfigError(f"--{name} is {given!r}; each must be {error}") from None
    if not numbers:
        raise ConfigError(f"--{name} is {given!r}; name at least one, such as {default[0]}")
    return tuple(numbers)


def _lengths(values: Mapping[str, Any], shape: ModelConfig) -> tuple[int, ...]:
    from pdrelay.lab.kv.config import DEFAULT_LENGTHS

    longest = shape.max_position_embeddings
    default = tuple(n for n in DEFAULT_LENGTHS if n <= longest) or (longest,)
    lengths = _numbers(values, "lengths", default, 1 << 24)
    if lengths[-1] > longest:
        raise ConfigError(
            f"--lengths has {lengths[-1]}, the model's context is {longest} tokens: lower it"
        )
    return lengths


def _serve(
    values: Mapping[str, Any],
    lengths: tuple[int, ...],
    device: str,
    transport: str,
    num_gpus: int,
) -> ServeConfig:
    """Servers hand over by the first of the transports."""
    from pdrelay.lab.kv.config import ServeConfig

    args = ["--device", device, "--transport", transport]
    if device == "cuda" and num_gpus == 1:
        args.append("--allow-oversubscribe")
    which = values.get("servers", "both")
    if values.get("dtype") in ("float32", "bfloat16"):
        args += ["--dtype", values["dtype"]]
    if "max_model_len" in values:
        args += ["--max-model-len", str(values["max_model_len"])]
    served = (
        tuple(n for n in lengths if n in _SERVED_LENGTHS) if "lengths" not in values else lengths
    )
    return ServeConfig(
        lengths=served or lengths,
        requests=values.get("serve_requests", _SERVE_REQUESTS),
        repeats=values.get("serve_repeats", _SERVE_REPEATS),
        args=tuple(args),
        side_by_side=which != "apart",
        apart=which != "side-by-side",
    )


def _compute(values: Mapping[str, Any]) -> Compute:
    from pdrelay.lab.kv.config import GPU
    from pdrelay.lab.kv.model import Compute

    given = [f"--{key}" for key in ("tflops", "memory-gbs") if key.replace("-", "_") in values]
    if not given:
        return GPU
    return Compute(
        "given rates",
        values.get("tflops", GPU.flops_per_s / 1e12) * 1e12,
        values.get("memory_gbs", GPU.bytes_per_s / 1e9) * 1e9,
        f"given: {' and '.join(given)}; the rest as assumed for a GPU",
    )


def _links(values: Mapping[str, Any]) -> tuple[Link, ...]:
    from pdrelay.lab.kv.config import LINKS
    from pdrelay.lab.kv.model import Link

    if "links" not in values:
        return LINKS
    read: Callable[[object], float] = number(1e-6, 1e6)
    links = []
    for part in _parts(values["links"]):
        name, _, rate = part.partition("=")
        try:
            gb_per_s = read(rate.removesuffix("/rank"))
        except ValueError:
            gb_per_s = 0.0
        if not name.strip() or not gb_per_s:
            raise ConfigError(
                f"--links has {part!r}; write NAME=GB/s or NAME=GB/s/rank, such as ib=25"
            )
        source = "given: --links"
        links.append(Link(name.strip(), gb_per_s * 1e9, rate.endswith("/rank"), source))
    if not links:
        raise ConfigError("--links names none; write NAME=GB/s, such as ib=25")
    return tuple(links)


def _out(values: Mapping[str, Any]) -> Path:
    if "out" in values:
        return Path(values["out"])
    return Path("runs") / datetime.now(UTC).strftime("kv-%Y%m%d-%H%M%S")


def _check_memory(config: KvConfig, shape: ModelConfig) -> None:
    """Both pools, and the shared one of transport pool. Raises ConfigError."""
    from pdrelay.lab.kv.measure import pool_bytes
    from pdrelay.launch.host import inspect_host
    from pdrelay.launch.units import format_bytes

    need, available = pool_bytes(config, shape), inspect_host().available_bytes
    if need > available * _SHARE_OF_MEMORY:
        raise ConfigError(
            f"{config.lengths[-1]} tokens of {config.model} take {format_bytes(need)} in two "
            f"processes, {format_bytes(available)} are available: lower --lengths, leave transport "
            "pool out, or use --predict-only"
        )
