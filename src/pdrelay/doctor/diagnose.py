"""From the log of an engine that failed to the cause, the fix, and the line that shows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pdrelay.doctor.rule import NEAR_LINES, Rule
from pdrelay.doctor.rules import LAST_RESORT, RULES
from pdrelay.doctor.version import Version, parse_version

_MAX_QUOTE = 300  # characters
_UNRECOGNISED = "unrecognised"

# "(EngineCore pid=7) ERROR 11-24 11:17:24 [core.py:718] ", "[2025-09-17 16:23:13 TP1] ",
# "[prefill-0.0] ", "[prefill-0] ", "prefill-1  | ": what loggers and launchers put before a
# message.
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX = re.compile(
    r"(?:[\w.-]{1,64}\s{1,8}\| )?"
    r"(?:\[[\w-]+[.-]\d+\] )?"
    r"(?:\([^()]{1,80}\bpid=\d+\)\s?)*"
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d "
    r"(?:\[?[^\]\s]{1,200}\] ?)?)?"
    r"(?:\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^\]]{0,60}\] ?)?"
)
_QUIET = re.compile(r"\b(?:DEBUG|INFO)\b")
_WARNING = re.compile(r"\bWARNING\b")
_TRACEBACK = "Traceback (most recent call last):"
# Attempts of torch over IPv6 that it gave up; uvicorn's lines; what pdrelay said of this log.
_OTHERS_QUIET = re.compile(
    r"(?:\[rank\d+\]:)?\[[IW]\d{4} |INFO:\s|pdrelay: error: worker .* its log says: "
)
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
    log = _parse(log_text)
    known = parse_version(version) or _version_in(log.lines)
    found = _match_all(log, RULES, engine, known)
    found.sort(key=lambda finding: (finding.symptom, finding.line_number))
    if found and not found[0].symptom:
        return found
    unknown = _unrecognised(log.lines)
    if unknown is not None and (not found or unknown.line_number < found[0].line_number):
        return [unknown, *found]
    return found or _match_all(log, LAST_RESORT, engine, known)


def explain(findings: Sequence[Finding]) -> list[str]:
    """The first finding as lines to print after a log's tail; none when there is none."""
    if not findings:
        return []
    first = findings[0]
    return [f"cause: {first.cause}", f"fix: {first.fix}", f"seen in: {first.line}"]


@dataclass(frozen=True)
class _Log:
    # Without their loggers' prefixes; blank where they are of a traceback that was logged as a
    # warning: its process went on.
    lines: list[str]
    quiet: frozenset[int]  # indices of messages below the level WARNING
    quoted: frozenset[int]  # of files and source that tracebacks quote


def _parse(text: str) -> _Log:
    lines, quiet, quoted = [], set(), set()
    warned: set[str] = set()  # prefixes of the messages that warn with a traceback
    in_source = False
    for index, raw in enumerate(_COLOURS.sub("", text).splitlines()):
        prefix = _PREFIX.match(raw)
        line = raw[prefix.end() :] if prefix else raw
        if prefix and line.startswith(_TRACEBACK) and _WARNING.search(prefix[0]):
            warned.add(prefix[0])
        if prefix and prefix[0] in warned:
            line = ""
        lines.append(line)
        if (prefix and _QUIET.search(prefix[0])) or _OTHERS_QUIET.match(line):
            quiet.add(index)
        names_file = _SOURCE_FILE.match(line) is not None
        if names_file or (in_source and line.startswith("    ")):
            quoted.add(index)
        in_source = names_file
    return _Log(lines, frozenset(quiet), frozenset(quoted))


def _version_in(lines: Sequence[str]) -> Version | None:
    for line in lines:
        match = _VERSION.search(line)
        if match is not None:
            return parse_version(match[1])
    return None


def _match_all(
    log: _Log, table: Sequence[Rule], engine: str | None, version: Version | None
) -> list[Finding]:
    """The first line of each rule; a line belongs to the first rule that takes it."""
    text = "\n".join(log.lines)
    rules = [
        rule
        for rule in table
        if rule.applies(engine, version)
        and (not rule.anywhere or re.search(rule.anywhere, text) is not None)
    ]
    in_info = [rule for rule in rules if rule.in_info]
    candidates: dict[str, list[Rule]] = {}  # of lines that were seen: logs repeat themselves
    found: dict[str, Finding] = {}
    for index, line in enumerate(log.lines):
        if index in log.quoted:
            continue
        if index in log.quiet:
            taken = [rule for rule in in_info if rule.regex.search(line)]
        elif (seen := candidates.get(line)) is not None:
            taken = seen
        else:
            taken = candidates[line] = [rule for rule in rules if rule.regex.search(line)]
        rule = next((rule for rule in taken if _is_near(rule, log.lines, index)), None)
        if rule is not None and rule.id not in found:
            found[rule.id] = _finding(rule, line, index)
    return list(found.values())


def _is_near(rule: Rule, lines: Sequence[str], index: int) -> bool:
    if not rule.near:
        return True
    before = "\n".join(lines[max(0, index - NEAR_LINES) : index + 1])
    return re.search(rule.near, before) is not None


def _finding(rule: Rule, line: str, index: int) -> Finding:
    match = rule.regex.search(line)
    assert match is not None
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
