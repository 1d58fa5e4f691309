"""Service levels: thresholds that one request must meet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from pdrelay.bench.record import ClientRecord
from pdrelay.errors import ConfigError

MAX_SLO_MS = 1e9


class Slo(msgspec.Struct, frozen=True):
    """Upper limits in ms; None does not count. At least one is set."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def met_by(self, record: ClientRecord) -> bool:
        """Whether the request was answered in full and within every limit.

        An answer of one token has no TPOT and meets any, as in `vllm bench serve`.
        """
        if not record.ok:
            return False
        limits = (
            (self.ttft_ms, record.ttft_ms),
            (self.tpot_ms, record.tpot_ms),
            (self.e2el_ms, record.e2e_ms),
        )
        return all(
            limit is None or (value if value is not None else 0.0) <= limit
            for limit, value in limits
        )


# MLPerf Inference's server and interactive scenarios: its limits on p99 TTFT and p99 TPOT.
SLO_PRESETS: Mapping[str, Slo] = MappingProxyType(
    {
        "llama3.1-8b": Slo(2000, 100),
        "llama3.1-8b-interactive": Slo(500, 30),
        "llama2-70b": Slo(2000, 200),
        "llama2-70b-interactive": Slo(450, 40),
        "llama3.1-405b": Slo(6000, 175),
        "llama3.1-405b-interactive": Slo(4500, 80),
    }
)


def slo_preset(name: str) -> Slo:
    """Raises ConfigError for a name that is not in SLO_PRESETS."""
    try:
        return SLO_PRESETS[name]
    except KeyError:
        known = ", ".join(SLO_PRESETS)
        raise ConfigError(f"unknown service level {name!r}: choose one of {known}") from None


def parse_goodput(pairs: Iterable[str]) -> Slo:
    """`ttft:500 tpot:50 e2el:9000`, in ms, as `vllm bench serve --goodput` takes them.

    Raises:
        ConfigError: another name, a repeated one, or no number above 0.
    """
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        if name not in ("ttft", "tpot", "e2el") or name in limits:
            raise ConfigError(f"service level {pair!r}: write ttft:MS, tpot:MS, e2el:MS, each once")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= MAX_SLO_MS:
            raise ConfigError(f"service level {pair!r}: write milliseconds above 0 after the colon")
        limits[name] = value
    if not limits:
        raise ConfigError("no service level given: write ttft:MS, tpot:MS or e2el:MS")
    return Slo(limits.get("ttft"), limits.get("tpot"), limits.get("e2el"))
