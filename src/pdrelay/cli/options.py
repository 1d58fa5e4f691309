"""Options that come from flags or from a TOML file, read and validated by the same code.

A reader takes a string (from a flag) or a TOML value and returns what it means. It raises
ValueError with what would be right; the caller names the option.
"""

from __future__ import annotations

import argparse
import difflib
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdrelay.errors import ConfigError
from pdrelay.launch.units import parse_bytes

Reader = Callable[[object], Any]


@dataclass(frozen=True)
class Option:
    """One setting: `--name` as a flag, `name` or `na_me` in a file."""

    name: str
    read: Reader
    help: str
    metavar: str = ""
    is_switch: bool = False  # a flag without a value
    negatable: bool = False  # a switch with a --no- form
    repeats: bool = False  # may be given several times; a list in a file

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


def integer(low: int, high: int) -> Reader:
    """An integer in `low .. high`."""

    def read(value: object) -> int:
        wanted = f"an integer from {low} to {high}"
        if isinstance(value, str):
            text = value.strip()
            digits = text.removeprefix("-").replace("_", "")
            if not (digits.isascii() and digits.isdecimal()) or len(digits) > 30:
                raise ValueError(wanted)
            value = int(text)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(wanted)
        return value

    return read


def byte_count(value: object) -> int:
    """Bytes, with a unit or without."""
    wanted = "a byte count from 1 to 1 PiB, such as 536870912 or 512MiB"
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(wanted)
    try:
        num = parse_bytes(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(wanted) from None
    if not 1 <= num <= 1 << 50:
        raise ValueError(wanted)
    return num


def number(low: float, high: float) -> Reader:
    """A finite number in `low .. high`."""

    def read(value: object) -> float:
        wanted = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(wanted)
        try:
            result = float(value)
        except (ValueError, OverflowError):
            raise ValueError(wanted) from None
        if not math.isfinite(result) or not low <= result <= high:
            raise ValueError(wanted)
        return result

    return read


def choice(*allowed: str) -> Reader:
    def read(value: object) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        close = difflib.get_close_matches(str(value), allowed, n=1)
        raise ValueError(f"one of {', '.join(allowed)}" + (f"; {close[0]}?" if close else ""))

    return read


def text(value: object) -> str:
    """Any non-empty text without control characters."""
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise ValueError("a non-empty text without control characters")


def switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def add_options(parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[Option]]) -> None:
    """Register flags, in titled groups. Values stay text: `read_options` reads them."""
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            flag = f"--{option.name}"
            common: dict[str, Any] = {"dest": option.key, "default": None, "help": option.help}
            if option.negatable:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            elif option.is_switch:
                group.add_argument(flag, action="store_true", **common)
            elif option.repeats:
                group.add_argument(flag, action="append", metavar=option.metavar, **common)
            else:
                group.add_argument(flag, metavar=option.metavar, **common)


def read_options(
    options: Sequence[Option], flags: Mapping[str, object], config_file: str | None
) -> dict[str, Any]:
    """Values by key, flags over file; options that neither gives are absent.

    Raises ConfigError naming the flag, or the file and key, and what would be right.
    """
    values: dict[str, Any] = {}
    if config_file is not None:
        values = _read_file(options, config_file)
    for option in options:
        given = flags.get(option.key)
        if given is not None:
            values[option.key] = _read(option, given, f"--{option.name}")
    return values


def _read(option: Option, value: object, where: str) -> Any:
    try:
        return option.read(value)
    except ValueError as error:
        shown = str(value) if isinstance(value, str) else repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(f"{where} is {shown!r}; it must be {error}") from None


def _read_file(options: Sequence[Option], path: str) -> dict[str, Any]:
    by_key = {option.key: option for option in options}
    values: dict[str, Any] = {}
    for name, value in _load_toml(path).items():
        key = name.replace("-", "_")
        if key not in by_key:
            close = difflib.get_close_matches(key, by_key, n=1)
            hint = f"; did you mean {by_key[close[0]].name}?" if close else ""
            raise ConfigError(f"{path}: unknown key {name!r}{hint}")
        if key in values:
            raise ConfigError(f"{path}: {by_key[key].name} is given twice: remove one")
        values[key] = _read(by_key[key], value, f"{path}: {name}")
    return values


def _load_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
