"""From the log of an engine that failed to the cause, the fix, and the line that shows it."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from pdrelay.doctor.rule import NEAR_LINES, Rule
from pdrelay.doctor.rules import LAST_RESORT, RULES
from pdrelay.doctor.version import Version, parse_version

_MAX_QUOTE = 300  # characters
_UNRECOGNISED = "unrecognised"

# "(EngineCore pid=7) ERROR 11-24 11:17:24 [core.py:718] ", "[2025-09-17 16:23:13 TP1] ",
# "[prefill-0.0] ": what loggers and launchers put before a message.
_PREFIX = re.compile(
    r"(?:\[[\w-]+\.\d+\] )?"
    r"(?:\([^()]{1,80}\bpid=\d+\)\s?)*"
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]{1,200}\] ?)?)?"
    r"(?:\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^\]]{0,60}\] ?)?"
)
_QUIET = re.compile(r"\b(?:DEBUG|INFO)\b")
_TORCH_WARNING = re.compile(r"(?:\[rank\d+\]:)?\[[IW]\d{4} ")  # IPv6 attempts that were given up
_SOURCE_FILE = re.compile(r'\s*File ".*", line \d+')
_VERSION = re.compile(
    r"(?:LLM engine \(v|vLLM API server version |\bversion |sglang==)(\d+\.\d+[\w.]*)"
)
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)(?::|$)")


@dataclass(frozen=True)
class Finding:
    """One recognised cause. `line_number` counts from 1 in the text that was read."""

    id: str  # a short stable word
    cause: str
    fix: str
    line: str  # the matched line, without its logger's prefix, cut to 300 characters
    line_number: int
    symptom: bool = False  # usually follows from another cause

    def __str__(self) -> str:
        """For an error message of one line."""
        if self.id == _UNRECOGNISED:
            return f"its earliest error: {self.line}"
        return f"cause: {self.cause}; fix: {self.fix}"


def diagnose(log_text: str, engine: str | None = None, version: str | None = None) -> list[Finding]:
    """Every recognised cause, the earliest root cause first, symptoms last.

    `engine` is native, vllm or sglang, `version` its release; None where unknown (vLLM's logs name
    their version). When no cause is recognised but an exception was raised, that one is reported
    as "unrecognised"; an empty list means that the log shows neither.
    """
    raw = log_text.splitlines()
    prefixes = [_PREFIX.match(line) for line in raw]
    lines = [line[match.end() if match else 0 :] for line, match in zip(raw, prefixes, strict=True)]
    quiet = {
        index
        for index, (line, match) in enumerate(zip(lines, prefixes, strict=True))
        if (match and _QUIET.search(match[0])) or _TORCH_WARNING.match(line)
    }
    known = parse_version(version) or _version_in(lines)
    found = _match_all(lines, RULES, quiet, engine, known)
    found.sort(key=lambda finding: (finding.symptom, finding.line_number))
    if found and not found[0].symptom:
        return found
    unknown = _unrecognised(lines)
    if unknown is not None and (not found or unknown.line_number < found[0].line_number):
        return [unknown, *found]
    return found or _match_all(lines, LAST_RESORT, frozenset(), engine, known)


def explain(findings: Sequence[Finding]) -> list[str]:
    """The first finding as lines to print after a log's tail; none when there is none."""
    if not findings:
        return []
    first = findings[0]
    return [f"cause: {first.cause}", f"fix: {first.fix}", f"seen in: {first.line}"]


def _version_in(lines: Sequence[str]) -> Version | None:
    for line in lines:
        match = _VERSION.search(line)
        if match is not None:
            return parse_version(match[1])
    return None


def _match_all(
    lines: Sequence[str],
    table: Sequence[Rule],
    quiet: Set[int],
    engine: str | None,
    version: Version | None,
) -> list[Finding]:
    """The first line of each rule; a line belongs to the first rule that takes it."""
    text = "\n".join(lines)
    rules = [
        rule
        for rule in table
        if rule.applies(engine, version)
        and (not rule.anywhere or re.search(rule.anywhere, text) is not None)
    ]
    found: dict[str, Finding] = {}
    for index, line in enumerate(lines):
        if index and line.startswith("    ") and _SOURCE_FILE.match(lines[index - 1]):
            continue  # source code quoted by a traceback
        for rule in rules:
            if index in quiet and not rule.in_info:
                continue
            match = rule.regex.search(line)
            if match is not None and _is_near(rule, lines, index):
                found.setdefault(rule.id, _finding(rule, match, line, index))
                break
    return list(found.values())


def _is_near(rule: Rule, lines: Sequence[str], index: int) -> bool:
    if not rule.near:
        return True
    before = "\n".join(lines[max(0, index - NEAR_LINES) : index + 1])
    return re.search(rule.near, before) is not None


def _finding(rule: Rule, match: re.Match[str], line: str, index: int) -> Finding:
    groups = {name: value or "" for name, value in match.groupdict().items()}
    return Finding(
        rule.id,
        rule.cause.format_map(groups),
        rule.fix.format_map(groups),
        _quote(line),
        index + 1,
        rule.symptom,
    )


def _quote(line: str) -> str:
    text = line.strip()
    return text if len(text) <= _MAX_QUOTE else text[: _MAX_QUOTE - 3] + "..."


def _unrecognised(lines: Sequence[str]) -> Finding | None:
    """The first exception that is no mere report of another."""
    reports = [rule.regex for rule in (*RULES, *LAST_RESORT) if rule.symptom]
    for index, line in enumerate(lines):
        if _EXCEPTION.match(line) and not any(regex.search(line) for regex in reports):
            return Finding(
                _UNRECOGNISED,
                "an error that pdrelay does not know; it is the earliest in the log",
                f"read the traceback that ends in line {index + 1} of the log",
                _quote(line),
                index + 1,
            )
    return None
