"""The flags of `pdrelay serve`, and the ServeConfig that they make."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pdrelay.cli.options import (
    Option,
    byte_count,
    choice,
    integer,
    number,
    read_options,
    switch,
    text,
)
from pdrelay.core.messages import Role
from pdrelay.errors import ConfigError
from pdrelay.launch.config import (
    Attach,
    EngineConfig,
    ExternalConfig,
    ServeConfig,
    TransportConfig,
)
from pdrelay.launch.topology import PrefillDecode, Replicas, Topology, make_topology

_MAX_RANKS = 1024
_MAX_TOKENS = 1 << 24
_MAX_SECONDS = 86_400.0


def _words(value: object) -> tuple[str, ...]:
    """A command line's part, split as a shell does; a list in a file."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    try:
        return tuple(shlex.split(value)) if isinstance(value, str) else ()
    except ValueError:
        raise ValueError("arguments with balanced quotes") from None


def _attachments(value: object) -> tuple[Attach, ...]:
    """`URL`, `prefill=URL`, `prefill=URL,BOOTSTRAP_PORT`, `decode=URL`, one or several."""
    wanted = (
        "http://HOST:PORT, prefill=http://HOST:PORT or decode=http://HOST:PORT; SGLang's prefill "
        "with its bootstrap port, as prefill=http://HOST:PORT,8998"
    )
    given = value if isinstance(value, list) else [value]
    found = []
    for each in given:
        if not isinstance(each, str):
            raise ValueError(wanted)
        role, separator, url = each.partition("=")
        if not separator or role not in ("prefill", "decode"):
            role, url = "both", each
        url, comma, port = url.partition(",")
        if comma and not (role == "prefill" and port.isascii() and port.isdecimal()):
            raise ValueError(wanted)
        if not url.startswith(("http://", "https://")) or not url.isprintable():
            raise ValueError(wanted)
        more = {"bootstrap_port": int(port)} if comma else {}
        found.append(Attach(url.rstrip("/"), Role(role), **more))
    return tuple(found)


_COUNT = integer(1, _MAX_RANKS)
_TOKENS = integer(1, _MAX_TOKENS)
_SECONDS = number(0.001, _MAX_SECONDS)

GROUPS: Mapping[str, Sequence[Option]] = {
    "topology (one of)": [
        Option("replicas", _COUNT, "co-located instances behind the router (default: 1)", "N"),
        Option("tp", _COUNT, "one co-located instance, tensor parallel over N ranks", "N"),
        Option("prefill", _COUNT, "prefill instances (KV producers); needs --decode", "X"),
        Option("decode", _COUNT, "decode instances (KV consumers); needs --prefill", "Y"),
        Option(
            "allow-oversubscribe",
            switch,
            "start more ranks than there are CPU cores or GPUs",
            is_switch=True,
        ),
    ],
    "hand-over": [
        Option(
            "transport",
            choice("mapped", "nccl", "tcp", "pool"),
            "how KV moves: mapped (shared memory or CUDA IPC, default), nccl (GPUs), tcp, pool "
            "(shared CPU pool)",
            "NAME",
        ),
        Option("kv-transfer-timeout", _SECONDS, "deadline of one hand-over in seconds (30)", "S"),
        Option(
            "kv-transfer-verify",
            choice("off", "sample", "full"),
            "checksum of handed-over pages: off, sample (default), full",
            "MODE",
        ),
    ],
    "engine": [
        Option(
            "engine",
            choice("native", "vllm", "sglang"),
            "native (default), vllm, sglang: the last two as servers behind this front door",
            "NAME",
        ),
        Option(
            "device",
            choice("auto", "cpu", "cuda"),
            "auto (default: cuda where there are GPUs), cpu, cuda",
            "NAME",
        ),
        Option(
            "dtype",
            choice("auto", "float32", "bfloat16"),
            "auto (default: float32 on cpu, bfloat16 on cuda), float32, bfloat16",
            "NAME",
        ),
        Option(
            "attention-backend",
            choice("auto", "triton", "fa3"),
            "what reads KV pages on GPUs: auto (default: triton), triton (own kernels), fa3 "
            "(FlashAttention-3 of a vLLM that is installed beside pdrelay; Hopper)",
            "NAME",
        ),
        Option(
            "load-format",
            choice("auto", "dummy"),
            "auto (default: safetensors; built-in shapes: dummy), dummy (seeded random weights)",
            "NAME",
        ),
        Option("seed", integer(0, (1 << 63) - 1), "seed of dummy weights (0)", "S"),
        Option("max-model-len", _TOKENS, "longest prompt + output (default: the model's)", "N"),
        Option(
            "kv-cache-memory",
            byte_count,
            "KV pool of each rank, as bytes or like 2GiB (default on CPU: 256MiB or 10%% of the "
            "memory, more for large models; on GPUs: see --gpu-memory-utilization)",
            "BYTES",
        ),
        Option(
            "gpu-memory-utilization",
            number(0.01, 1.0),
            "part of each GPU's memory for weights, activations and KV cache (0.9)",
            "X",
        ),
        Option("block-size", integer(1, 1024), "tokens a KV block (CPU: 16, GPU: 64)", "N"),
        Option(
            "max-num-seqs", integer(1, 65_536), "sequences in one step (CPU: 64, GPU: 256)", "N"
        ),
        Option(
            "max-num-batched-tokens",
            _TOKENS,
            "token budget of one step (CPU: 2048, GPU: 8192)",
            "N",
        ),
        Option(
            "enable-prefix-caching",
            switch,
            "reuse the KV of shared prompt prefixes (default: on)",
            is_switch=True,
            negatable=True,
        ),
        Option(
            "threads-per-rank",
            integer(1, 4096),
            "compute threads of a rank (default: the cores but one, shared by the ranks; at "
            "least 1)",
            "N",
        ),
    ],
    "production engines (--engine vllm, sglang)": [
        Option(
            "connector",
            text,
            "how their KV moves: auto (default); with vllm pdrelay, pdrelay-nccl (GPUs without "
            "peer access) or nixl; with sglang nixl or mooncake",
            "NAME",
        ),
        Option(
            "dispatch",
            choice("auto", "sequential", "concurrent"),
            "vllm with connector pdrelay: prefill before decode, both at once, or auto (default: "
            "what is right for the request's sampling parameters)",
            "MODE",
        ),
        Option("engine-args", _words, "more arguments for every instance, as they are", "ARGS"),
        Option(
            "engine-python",
            text,
            "interpreter of the environment that has the engine (default: pdrelay's own)",
            "PATH",
        ),
        Option(
            "attach",
            _attachments,
            "route to an instance that runs already: URL, prefill=URL or decode=URL; repeat it",
            "URL",
            repeats=True,
        ),
    ],
    "front door": [
        Option("host", text, "address to listen on (127.0.0.1)", "ADDRESS"),
        Option("port", integer(0, 65_535), "port to listen on; 0: any free one (8000)", "N"),
        Option("served-model-name", text, "the model's name in the API (default: MODEL's)", "NAME"),
        Option("api-key", text, "require this bearer token on /v1", "KEY"),
        Option("max-num-requests", integer(1, 1 << 20), "in flight; more get 429", "N"),
        Option("request-timeout", _SECONDS, "deadline of one request in seconds (600)", "S"),
    ],
    "operation": [
        Option("startup-timeout", _SECONDS, "until every worker is ready, in seconds (300)", "S"),
        Option(
            "worker-timeout", _SECONDS, "a silent worker is restarted after this, seconds (30)", "S"
        ),
        Option(
            "drain-timeout",
            number(0.0, _MAX_SECONDS),
            "after Ctrl-C or SIGTERM, for running requests, seconds (30); a second signal ends it",
            "S",
        ),
        Option(
            "busy-wait",
            choice("auto", "on", "off"),
            "while requests come the front door asks for news over and over, a core, and ranks "
            "every 50 us: auto (default: with GPUs and four cores for each of them), on, off",
            "MODE",
        ),
        Option("event-log", text, "append one JSON line per request", "PATH"),
        Option("ready-file", text, "write url and workers as JSON once ready", "PATH"),
        Option(
            "log-level",
            choice("debug", "info", "warning", "error"),
            "debug, info (default), warning, error",
            "NAME",
        ),
    ],
}

OPTIONS = [option for group in GROUPS.values() for option in group]
_MODEL = Option("model", text, "the model")
_NATIVE_ONLY = (
    "attention_backend",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "transport",
)
_EXTERNAL_ONLY = ("connector", "dispatch", "engine_args", "engine_python", "attach")
_NESTED = (
    "engine",
    "transport",
    "external",
    "topology",
)  # fields that are configurations themselves
_RENAMED = {
    "kv_transfer_timeout": "kv_transfer_timeout_s",
    "kv_transfer_verify": "verify",
    "transport": "name",
    "request_timeout": "request_timeout_s",
    "startup_timeout": "startup_timeout_s",
    "worker_timeout": "worker_timeout_s",
    "drain_timeout": "drain_timeout_s",
}


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """Flags over `--config` file over defaults. Raises ConfigError."""
    values = read_options([_MODEL, *OPTIONS], vars(args), args.config)
    if "model" not in values:
        raise ConfigError(
            "no model: give a Hugging Face directory or a built-in shape, "
            "as in 'pdrelay serve tiny'"
        )
    _check_engine(values)
    renamed = {_RENAMED.get(key, key): value for key, value in values.items()}
    return ServeConfig(
        engine=EngineConfig(**_only(EngineConfig, renamed)),
        transport=TransportConfig(**_only(TransportConfig, renamed)),
        external=ExternalConfig(**_only(ExternalConfig, renamed)),
        topology=_topology(args, values),
        **_only(ServeConfig, {k: v for k, v in renamed.items() if k not in _NESTED}),
    )


def _check_engine(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that the chosen engine does not have."""
    engine = values.get("engine", "native")
    for key in _EXTERNAL_ONLY if engine == "native" else _NATIVE_ONLY:
        if key not in values:
            continue
        flag = "--" + key.replace("_", "-")
        fix = (
            "it needs --engine vllm or sglang"
            if engine == "native"
            else f"give {engine}'s own in --engine-args"
        )
        raise ConfigError(f"{flag} is not for --engine {engine}: {fix}")
    if engine == "sglang" and "dispatch" in values:
        raise ConfigError("--dispatch is not for --engine sglang: its protocol has one way")


def _topology(args: argparse.Namespace, values: Mapping[str, Any]) -> Topology:
    attached: tuple[Attach, ...] = values.get("attach", ())
    counts = _counts(args, values)
    if not attached:
        return make_topology(*counts)
    if any(count is not None for count in counts):
        raise ConfigError("--attach says what there is: leave --replicas, --tp, --prefill out")
    roles = [each.role for each in attached]
    prefill, decode = roles.count(Role.PREFILL), roles.count(Role.DECODE)
    if not prefill and not decode:
        return Replicas(len(attached))
    if not prefill or not decode or prefill + decode < len(attached):
        raise ConfigError(
            "--attach needs URLs of one kind: all plain (replicas), or prefill=URL and decode=URL, "
            "at least one of each"
        )
    return PrefillDecode(prefill, decode)


def _counts(
    args: argparse.Namespace, values: Mapping[str, Any]
) -> tuple[int | None, int | None, int | None, int | None]:
    """Replicas, tp, prefill, decode. A topology on the command line replaces the file's whole."""
    names = ("replicas", "tp", "prefill", "decode")
    on_command_line = any(getattr(args, name) is not None for name in names)
    wanted = [
        values.get(name) if not on_command_line or getattr(args, name) is not None else None
        for name in names
    ]
    return wanted[0], wanted[1], wanted[2], wanted[3]


def _only(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: values[each.name] for each in fields(kind) if each.name in values}
