"""One known cause of a failure, and how its log line looks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from pdrelay.doctor.version import Version, in_range

Engine = Literal["native", "vllm", "sglang"]

NEAR_LINES = 24  # of a traceback, before the line that names the exception


@dataclass(frozen=True)
class Rule:
    """`pattern` is searched in each line, without its logger's prefix.

    `near` must match one of the lines shortly before (or the line itself), `anywhere` any line of
    the log. `cause` and `fix` may use the pattern's named groups as `{name}`. A symptom is a line
    that often follows from another cause: it is reported after those.
    """

    id: str
    pattern: str
    cause: str
    fix: str
    near: str = ""
    anywhere: str = ""
    engines: tuple[Engine, ...] = ()  # all, when empty
    since: Version | None = None
    before: Version | None = None
    symptom: bool = False
    in_info: bool = False  # also look at messages below the level WARNING
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "regex", re.compile(self.pattern))

    def applies(self, engine: str | None, version: Version | None) -> bool:
        """Whether this engine in this version can fail so; what is unknown (None) can."""
        known = not self.engines or engine is None or engine in self.engines
        return known and in_range(version, self.since, self.before)
