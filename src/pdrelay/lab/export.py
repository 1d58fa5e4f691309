"""The part of a run that is kept beside documents: what was measured, where, and on what settings.

Raw records and server logs stay in the run directory: they are large.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pdrelay.errors import ConfigError
from pdrelay.lab.rundir import claim_directory

EXPORTED = ("run.json", "environment.json", "summary.json")


def export_summary(root: Path, to: Path) -> None:
    """Copy EXPORTED from a run directory whose report was built into `to`, a new or empty one.

    Raises ConfigError when `to` is in use or a file cannot be copied.
    """
    claim_directory(to)
    for name in EXPORTED:
        try:
            shutil.copyfile(root / name, to / name)
        except OSError as error:
            raise ConfigError(
                f"{root / name} cannot be copied to {to}: {error.strerror}; check both"
            ) from error
