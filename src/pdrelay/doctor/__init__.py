"""What is wrong: before a launch (`preflight`) and after a failed one (`diagnose`)."""

from pdrelay.doctor.diagnose import Finding, diagnose, explain

__all__ = ["Finding", "diagnose", "explain"]
