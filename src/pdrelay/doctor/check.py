"""One answer of the preflight."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"
    WARNING = "warning"  # it may start, but slower or not for long
    FAILURE = "failure"  # the launch would stop here


@dataclass(frozen=True)
class Check:
    """`what` was looked at, `cause` what was found; `fix` is empty where nothing needs one."""

    what: str
    level: Level
    cause: str
    fix: str = ""


def ok(what: str, cause: str) -> Check:
    return Check(what, Level.OK, cause)


def note(what: str, cause: str, fix: str = "") -> Check:
    return Check(what, Level.NOTE, cause, fix)


def warning(what: str, cause: str, fix: str) -> Check:
    return Check(what, Level.WARNING, cause, fix)


def failure(what: str, cause: str, fix: str) -> Check:
    return Check(what, Level.FAILURE, cause, fix)
